"""The key ring: who signs now, whose signatures are taken, and how keys take turns."""

import asyncio
from collections.abc import Iterable

import structlog

from authsvc.acting import by_itself
from authsvc.errors import AuthError, Reason
from authsvc.keys.jwt import DEFAULT_ALGORITHM, Signer, generate
from authsvc.keys.secrets import Sealer
from authsvc.model import KeyState, SigningKey
from authsvc.store.port import KeyStore, Tainted
from authsvc_client.core.markers import MARKER_LIFETIME_S
from authsvc_client.core.state import State

KEYS_MAX_AGE_S = 300
"""How long a validator may hold the JWK set without asking again, unless the settings say."""
READY_MARGIN_S = 10
"""For the commit, the poll and the fetch between publishing a key and knowing it."""

log = structlog.get_logger()

_OVERTAKEN = (
    Reason.SIGNING_KEY_NOT_FOUND,
    Reason.SIGNING_KEY_STATE_CONFLICT,
    Reason.SIGNING_KEY_NOT_READY,
)
"""What a rotation meets where another worker or an administrator was faster."""


class KeyRing:
    """Follows the stored keys; the state's verifiers change together with the signer."""

    def __init__(
        self,
        store: KeyStore,
        sealer: Sealer,
        state: State,
        *,
        algorithm: str = DEFAULT_ALGORITHM,
        rotate_s: float = 0.0,
        publish_ahead_s: float = 0.0,
        max_age_s: int = KEYS_MAX_AGE_S,
    ) -> None:
        """A key signs for `rotate_s`, 0 for ever; the next one is published so long before.

        `max_age_s` is how long a validator may hold the JWK set without asking again.
        """
        self._store = store
        self._sealer = sealer
        self._state = state
        self._algorithm = algorithm
        self._rotate_s = rotate_s
        self._publish_ahead_s = publish_ahead_s
        # Who has not confirmed its keys for so long refuses all tokens anyway.
        self._wait_s = max(state.staleness_max_s, max_age_s) + READY_MARGIN_S
        # A worker cut off from the database signs on until its state is stale.
        self._retired_s = state.staleness_max_s + MARKER_LIFETIME_S
        self._signer: Signer | None = None
        self._loading = asyncio.Lock()

    @property
    def signer(self) -> Signer:
        """The current key; AuthError STORE_UNAVAILABLE while none is loaded."""
        if self._signer is None:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="no signing key loaded")
        return self._signer

    async def ensure(self) -> None:
        """Makes the first key where there is none; one of many workers wins."""
        if _in_state(KeyState.CURRENT, await self._store.all()) is None:
            await self._store.add_first(await self._generate(KeyState.CURRENT, self._algorithm))

    async def load(self) -> None:
        """Takes the stored keys over, all or none; ValueError where one cannot be used."""
        async with self._loading:
            keys = await self._store.all()
            signer = self._signer_of(keys)
            self._state.replace_keys([key.public_jwk for key in keys if key.verifies])
            self._signer = signer

    def _signer_of(self, keys: Iterable[SigningKey]) -> Signer | None:
        key = _in_state(KeyState.CURRENT, keys)
        if key is None:
            return None
        held = self._signer
        return held if held and held.kid == key.kid else Signer(key, self._sealer)

    async def page(self, after: str, limit: int) -> list[SigningKey]:
        """The newest first, from the one after `after`."""
        keys = sorted(
            await self._store.all(), key=lambda key: (key.create_time, key.kid), reverse=True
        )
        kids = [key.kid for key in keys]
        start = 0
        if after:  # its row may be gone, and with it those that are older
            start = kids.index(after) + 1 if after in kids else len(kids)
        return keys[start : start + limit]

    async def prepare(self, algorithm: str = "") -> tuple[SigningKey, int]:
        """As KeyStore; the algorithm of the settings where none is named."""
        key = await self._generate(KeyState.NEXT, algorithm or self._algorithm)
        made, revision = await self._store.prepare(key, self._wait_s)
        log.info("key.prepared", kid=made.kid, alg=made.alg, ready=made.ready_time)
        return made, revision

    async def activate(self, kid: str) -> tuple[SigningKey, int]:
        """As KeyStore."""
        key, revision = await self._store.activate(kid)
        log.info("key.activated", kid=kid)
        return key, revision

    async def retire(self, kid: str) -> tuple[SigningKey, int]:
        """As KeyStore."""
        key, revision = await self._store.retire(kid)
        log.info("key.retired", kid=kid)
        return key, revision

    async def taint(self, kid: str, *, dry: bool) -> Tainted:
        """As KeyStore."""
        spare = await self._generate(KeyState.CURRENT, self._algorithm)
        return await self._store.taint(kid, spare, self._wait_s, dry=dry)

    async def rotate(self, now: float) -> None:
        """Does what is due at `now`, the database's time; of many workers one does it."""
        keys = await self._store.all()
        with by_itself("RotateSigningKeys"):
            try:
                await self._turn(keys, now)
            except AuthError as error:
                if error.reason not in _OVERTAKEN:
                    raise
            if any(key.is_over(now - self._retired_s) for key in keys):
                await self._store.purge(self._retired_s)

    async def _turn(self, keys: tuple[SigningKey, ...], now: float) -> None:
        current, heir = (_in_state(s, keys) for s in (KeyState.CURRENT, KeyState.NEXT))
        if not self._rotate_s or current is None or current.activate_time is None:
            return
        due = current.activate_time + self._rotate_s
        if heir is None:
            if now >= due - self._publish_ahead_s:
                await self.prepare()
        elif now >= max(due, heir.ready_time):
            await self.activate(heir.kid)

    async def _generate(self, state: KeyState, algorithm: str) -> SigningKey:
        """In a thread: an RSA key takes a while. Its times are the store's business."""
        return await asyncio.to_thread(generate, self._sealer, state, 0.0, algorithm)


def _in_state(state: KeyState, keys: Iterable[SigningKey]) -> SigningKey | None:
    return next((key for key in keys if key.state is state), None)
