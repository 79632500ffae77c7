"""The key ring: who signs now, and whose signatures are taken."""

import asyncio

from authsvc.errors import AuthError, Reason
from authsvc.keys.jwt import Signer, generate
from authsvc.keys.secrets import Sealer
from authsvc.model import KeyState, SigningKey
from authsvc.store.port import KeyStore
from authsvc_client.core.state import State


class KeyRing:
    """Follows the stored keys; the state's verifiers change together with the signer."""

    def __init__(self, store: KeyStore, sealer: Sealer, state: State) -> None:
        self._store = store
        self._sealer = sealer
        self._state = state
        self._signer: Signer | None = None
        self._loading = asyncio.Lock()

    @property
    def signer(self) -> Signer:
        """The current key; AuthError STORE_UNAVAILABLE while none is loaded."""
        if self._signer is None:
            raise AuthError(Reason.STORE_UNAVAILABLE, cause="no signing key loaded")
        return self._signer

    async def ensure(self, now: float) -> None:
        """Makes the first key where there is none; one of many workers wins."""
        if not any(key.state is KeyState.CURRENT for key in await self._store.all()):
            await self._store.add_first(generate(self._sealer, KeyState.CURRENT, now))

    async def load(self) -> None:
        """Takes the stored keys over, all or none; ValueError where one cannot be used."""
        async with self._loading:
            keys = await self._store.all()
            signer = self._signer_of(keys)
            self._state.replace_keys([key.public_jwk for key in keys if trusted(key)])
            self._signer = signer

    def _signer_of(self, keys: tuple[SigningKey, ...]) -> Signer | None:
        for key in keys:
            if key.state is KeyState.CURRENT:
                held = self._signer
                return held if held and held.kid == key.kid else Signer(key, self._sealer)
        return None


def trusted(key: SigningKey) -> bool:
    """Whether the key's signatures are taken; a tainted one's never are, marker or not."""
    return key.state is not KeyState.TAINTED
