"""Page tokens: opaque, sealed, and good for the list and filter that they were made for."""

from authsvc.errors import AuthError, Reason
from authsvc.keys.secrets import Sealer

PAGE_SIZE_DEFAULT = 50


class Pages:
    """Seals and opens page tokens."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def after(self, token: str, what: str) -> str:
        """The id that the page before ended with. Raises AuthError PAGE_TOKEN_INVALID."""
        if not token:
            return ""
        try:
            return self._sealer.open_text(token, f"page:{what}")
        except ValueError as error:
            raise AuthError(Reason.PAGE_TOKEN_INVALID) from error

    def next(self, ids: list[str], size: int, what: str) -> str:
        """The token of the next page where this one is full and one more was found."""
        return self._sealer.seal_text(ids[size - 1], f"page:{what}") if len(ids) > size else ""
