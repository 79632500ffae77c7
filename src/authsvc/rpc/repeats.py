"""Answers that are asked for again, in the same bytes by the same certificate.

A verdict is given again, and a token is issued anew: what stands is who asks, and what for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from authsvc.clock import Clock
from authsvc.rpc.peer import AuthContext, Peers, Presented, Trust, presented
from authsvc.rpc.policy import Grounds, Policy
from authsvc_client.core.cache import BytesCache

REPEATS_BYTES_MAX = 32 * 2**20
ASKERS_MAX = 8
"""Certificates that ask the same; replicas of a service have one each."""
_ENTRY_BYTES = 4096


class Context(Protocol):
    """Of a call, as grpc.aio has it."""

    def auth_context(self) -> AuthContext:
        """Who is on the connection."""

    def set_trailing_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        """What follows the answer."""


Repeat = Callable[[float, Context, str], bytes | None]
"""The answer anew, at a boot time, to a call by its context and request id, if it has one; None
where it has to be found in full. Raises StateStale and AuthError.
"""


@dataclass(frozen=True, slots=True)
class _Kept:
    presented: Presented
    trust: Trust
    grounds: Grounds
    repeat: Repeat


Askers = tuple[_Kept, ...]


class Repeats:
    """Of one method on one listener.

    Kept is what bytes, rows and trusted CAs decided, and it stands while these are the same objects
    (docs/decisions/0023). Time, and what the feed says of the token, is judged at every call. All
    that is here runs at nearly every call, with nothing of it in the core's caches: fewer functions
    count for more than fewer instructions.
    """

    def __init__(self, peers: Peers, policy: Policy, clock: Clock) -> None:
        self._peers = peers
        self._policy = policy
        self._clock = clock
        self._kept: BytesCache[bytes, Askers] = BytesCache(REPEATS_BYTES_MAX)

    def __call__(self, raw: bytes, context: Context, request_id: str = "") -> bytes | None:
        """The answer to who asks with these bytes, and by nothing but its certificate; None where
        none stands, and where judging in full is to say why.
        """
        askers = self._kept.get(raw)
        if askers is None:
            return None
        try:
            shown = presented(context.auth_context())
            for kept in askers:
                if kept.presented == shown:
                    break
            else:
                return None
            if self._peers.trust() is not kept.trust:
                return None
            if not self._policy.stand(kept.grounds, self._clock.wall()):
                return None
            return kept.repeat(self._clock.boot(), context, request_id)
        except Exception:
            return None

    def keep(
        self, raw: bytes, auth_context: AuthContext, grounds: Grounds, repeat: Repeat, now: float
    ) -> None:
        """Keeps what gives the answer anew that was just given to a client on such grounds."""
        trust = self._peers.trust()
        if self._peers(auth_context, now) is not grounds.caller.peer:
            return
        shown = presented(auth_context)
        others = tuple(kept for kept in self._kept.get(raw) or () if kept.presented != shown)
        askers = (_Kept(shown, trust, grounds, repeat), *others[: ASKERS_MAX - 1])
        self._kept.put(raw, askers, len(raw) + sum(map(_size, askers)))


def _size(kept: _Kept) -> int:
    return _ENTRY_BYTES + sum(len(each) for part in kept.presented for each in part or ())
