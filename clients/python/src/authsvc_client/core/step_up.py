"""The step-up challenge (RFC 9470): what a person must do so that its token passes."""

import re
from typing import NamedTuple

is_acr = re.compile(r"[\x21\x23-\x5B\x5D-\x7E]{1,128}").fullmatch
"""Whether a text can stand in the list `acr_values`, and between quotes in a header."""


class StepUp(NamedTuple):
    """Which authentication is asked for."""

    acr_values: tuple[str, ...] = ()
    """Classes of which one is needed, the preferred first; empty takes any."""
    max_age_s: int | None = None
    """Longest time since the person authenticated, in seconds; None takes any."""

    def is_met(self, acr: str, auth_time: int | None, now: float) -> bool:
        """Whether an authentication was one of these; without a time its age is not known."""
        if self.acr_values and acr not in self.acr_values:
            return False
        return self.max_age_s is None or (
            auth_time is not None and now - auth_time <= self.max_age_s
        )

    def metadata(self) -> dict[str, str]:
        """As the metadata of an error (`google.rpc.ErrorInfo`)."""
        found = {"acr_values": " ".join(self.acr_values)} if self.acr_values else {}
        return found if self.max_age_s is None else found | {"max_age": str(self.max_age_s)}

    def www_authenticate(self) -> str:
        """Text of a `WWW-Authenticate` header (RFC 9470 section 3)."""
        parts = [
            'error="insufficient_user_authentication"',
            'error_description="a stronger or more recent authentication is needed"',
        ]
        parts += [f'{name}="{value}"' for name, value in self.metadata().items()]
        return f"Bearer {', '.join(parts)}"


NO_STEP_UP = StepUp()
