"""Refresh tokens as bytes: a handle and a generation under an HMAC."""

import base64
import hashlib
import hmac
import re
from dataclasses import dataclass, field

from authsvc.keys.secrets import REFRESH_TOKEN_PREFIX

_form = re.compile(re.escape(REFRESH_TOKEN_PREFIX) + r"[A-Za-z0-9_-]{80}").fullmatch


def has_form(token: str) -> bool:
    """Whether it looks like a refresh token, whoever made it."""
    return _form(token) is not None


@dataclass(frozen=True, slots=True)
class Presented:
    """What a refresh token of ours says."""

    handle: bytes = field(repr=False)
    generation: int
    key_id: str


class RefreshKeys:
    """HMAC keys of refresh tokens; the first one signs."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        """ValueError where two keys have one id."""
        ids = [hashlib.sha256(b"authsvc refresh key" + key).hexdigest()[:8] for key in keys]
        if len(set(ids)) != len(ids):
            raise ValueError("refresh_keys: a key twice")
        self.current = ids[0]
        self._keys = dict(zip(ids, keys, strict=True))

    def mint(self, handle: bytes, generation: int, key_id: str = "") -> str:
        """The token of a generation; LookupError where its key is not configured any more."""
        key_id = key_id or self.current
        body = bytes.fromhex(key_id) + handle + generation.to_bytes(8, "big")
        raw = body + self._tag(self._keys[key_id], body)
        return REFRESH_TOKEN_PREFIX + base64.urlsafe_b64encode(raw).decode()

    def read(self, token: str) -> Presented | None:
        """None for what is not ours: refused before any I/O."""
        if not has_form(token):
            return None
        raw = base64.urlsafe_b64decode(token.removeprefix(REFRESH_TOKEN_PREFIX))
        body, tag = raw[:28], raw[28:]
        key = self._keys.get(body[:4].hex())
        if key is None or not hmac.compare_digest(tag, self._tag(key, body)):
            return None
        return Presented(body[4:20], int.from_bytes(body[20:], "big"), body[:4].hex())

    @staticmethod
    def _tag(key: bytes, body: bytes) -> bytes:
        return hmac.digest(key, REFRESH_TOKEN_PREFIX.encode() + body, "sha256")
