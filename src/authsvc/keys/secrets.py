"""Random values, secrets that are shown once, and what is encrypted at rest."""

import base64
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CLIENT_SECRET_PREFIX = "asvc_cs_"
ACCESS_TOKEN_PREFIX = "asvc_at_"
API_KEY_PREFIX = "asvc_ak_"
INITIAL_ACCESS_TOKEN_PREFIX = "asvc_it_"
REGISTRATION_TOKEN_PREFIX = "asvc_rg_"
REFRESH_TOKEN_PREFIX = "asvc_rt_"
RESET_CODE_PREFIX = "asvc_rc_"
SEAL_KEY_BYTES = 32
_NONCE_BYTES = 12
_IDS_DRAWN = 64
_CHECK_CHARS = 6
_SECRET_CHARS = 43  # 32 bytes in base64url


def new_id() -> str:
    """128 random bits: identity of tokens, clients, incidents, signing keys.

    Hexadecimal, so that no id begins with a hyphen and each is one word to a double click. Many
    are drawn at once, which costs as much as one does; no secret is made of them.
    """
    try:
        return _ids.pop()
    except IndexError:
        drawn = secrets.token_hex(16 * _IDS_DRAWN)
        _ids.extend(drawn[at : at + 32] for at in range(32, len(drawn), 32))
        return drawn[:32]


_ids: list[str] = []
os.register_at_fork(after_in_child=_ids.clear)  # else both would use the same


def new_handle() -> bytes:
    """16 random bytes that find a grant, and stand in no other token."""
    return secrets.token_bytes(16)


def new_seal_key() -> bytes:
    """A key for Sealer."""
    return secrets.token_bytes(SEAL_KEY_BYTES)


def jitter(span: float) -> float:
    """A random share of a span, to keep processes apart."""
    return secrets.SystemRandom().random() * span


def new_secret(prefix: str) -> str:
    """256 random bits behind a prefix that scanners find, with a checksum that spots typing errors.

    Stored as `digest` of it: with this much entropy a slow hash would add nothing.
    """
    body = prefix + secrets.token_urlsafe(32)
    return body + _check(body)


def is_secret(text: str, prefix: str) -> bool:
    """Whether it has the form and the checksum of one of ours."""
    if not text.startswith(prefix) or len(text) != len(prefix) + _SECRET_CHARS + _CHECK_CHARS:
        return False
    if not text.isascii():
        return False
    return hmac.compare_digest(text[-_CHECK_CHARS:], _check(text[:-_CHECK_CHARS]))


def digest(secret: str) -> bytes:
    """SHA-256 of a secret, as it is stored."""
    return hashlib.sha256(secret.encode()).digest()


def matches(secret: str, prefix: str, stored: bytes | None) -> bool:
    """Whether a presented secret is the stored one, in constant time."""
    return is_secret(secret, prefix) and hmac.compare_digest(digest(secret), stored or bytes(32))


def _check(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:_CHECK_CHARS]


@dataclass(frozen=True, slots=True)
class Sealer:
    """Encrypts at rest (AES-256-GCM) by the first key; opens by any, so keys can be rotated."""

    keys: tuple[bytes, ...] = field(repr=False)

    def seal(self, plain: bytes, purpose: str) -> bytes:
        """Encrypts for a purpose: what was sealed for one cannot be opened for another."""
        value = secrets.token_bytes(_NONCE_BYTES)
        return value + AESGCM(self.keys[0]).encrypt(value, plain, purpose.encode())

    def open(self, sealed: bytes, purpose: str) -> bytes:
        """Decrypts; raises ValueError where no key fits or a bit was changed."""
        for key in self.keys:
            try:
                return AESGCM(key).decrypt(
                    sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], purpose.encode()
                )
            except (InvalidTag, ValueError):
                continue
        raise ValueError(f"cannot be opened with the configured keys: {purpose}")

    def seal_text(self, plain: str, purpose: str) -> str:
        """As `seal`, in base64url without padding."""
        return base64.urlsafe_b64encode(self.seal(plain.encode(), purpose)).rstrip(b"=").decode()

    def open_text(self, sealed: str, purpose: str) -> str:
        """As `open`, of `seal_text`; another spelling of the same bytes is refused too."""
        raw = base64.urlsafe_b64decode(sealed + "=" * (-len(sealed) % 4))
        if base64.urlsafe_b64encode(raw).rstrip(b"=") != sealed.encode():
            raise ValueError("not canonical")
        return self.open(raw, purpose).decode()


class Mac:
    """Marks what passes through a place that anybody may write to: HMAC-SHA256, keys as Sealer's.

    Its keys are derived from those, and from the deployment's issuer: two that share a place, or
    even the keys, believe nothing of each other.
    """

    __slots__ = ("_keys",)

    def __init__(self, sealer: Sealer, issuer: str) -> None:
        purpose = b"authsvc mac 1 " + issuer.encode()
        self._keys = tuple(hmac.digest(key, purpose, "sha256") for key in sealer.keys)

    def seal(self, label: str, payload: bytes) -> bytes:
        """The payload behind its mark, good for this label alone."""
        return _mark(self._keys[0], label, payload) + payload

    def open(self, label: str, sealed: bytes) -> bytes | None:
        """The payload; None where it was made or changed by somebody else, or for another label."""
        mark, payload = sealed[:_MARK_BYTES], sealed[_MARK_BYTES:]
        if any(hmac.compare_digest(mark, _mark(key, label, payload)) for key in self._keys):
            return payload
        return None


_MARK_BYTES = 32


def _mark(key: bytes, label: str, payload: bytes) -> bytes:
    raw = label.encode()
    return hmac.digest(key, len(raw).to_bytes(4, "big") + raw + payload, "sha256")
