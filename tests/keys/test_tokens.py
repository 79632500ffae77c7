"""Secrets and refresh tokens as texts: one spelling each, and everything else refused unread."""

import base64
import hashlib
import hmac
import string
from itertools import chain
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authsvc.keys import secrets
from authsvc.keys.refresh import RefreshKeys
from authsvc.keys.secrets import digest, is_secret, matches, new_handle, new_secret

ALPHABET = string.ascii_letters + string.digits + "-_"
PREFIXES = [
    getattr(secrets, name)
    for name in dir(secrets)
    if name.endswith("_PREFIX") and name != "REFRESH_TOKEN_PREFIX"
]
ONE, TWO = (bytes([n]) * 32 for n in (1, 2))
KEYS = RefreshKeys((ONE, TWO))


def neighbours(text: str) -> set[str]:
    """Every proper prefix, extension by one, case flip and substitution of one character."""
    cut = (text[:end] for end in range(len(text)))
    longer = (
        extended for c in [*ALPHABET, "=", " ", "\n", "\0"] for extended in (text + c, c + text)
    )
    flipped = (text[:at] + text[at].swapcase() + text[at + 1 :] for at in range(len(text)))
    other = (
        text[:at] + c + text[at + 1 :] for at in range(len(text)) for c in (*ALPHABET, "é", "\0")
    )
    return set(chain(cut, longer, flipped, other)) - {text}


def test_every_kind_of_secret_has_a_prefix_of_its_own() -> None:
    assert len(set(PREFIXES)) == len(PREFIXES) == 6
    assert all(prefix.startswith("asvc_") and len(prefix) == 8 for prefix in PREFIXES)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_no_neighbour_of_a_secret_is_one(prefix: str) -> None:
    with patch("authsvc.keys.secrets.secrets.token_urlsafe", lambda _: "aZ09-_b" * 6 + "A"):
        made = new_secret(prefix)  # always the same: 24 bits of checksum let one in 16 million by
    assert is_secret(made, prefix)
    assert matches(made, prefix, digest(made))
    for wrong in neighbours(made):
        assert not is_secret(wrong, prefix), wrong
        assert not matches(wrong, prefix, digest(made)), wrong
    assert not any(is_secret(made, other) for other in PREFIXES if other != prefix)


def test_a_checksum_saves_no_other_length() -> None:
    for size in (0, 1, 42, 44, 1000):
        body = "asvc_cs_" + "A" * size
        assert not is_secret(body + hashlib.sha256(body.encode()).hexdigest()[:6], "asvc_cs_")


def test_no_neighbour_of_a_refresh_token_is_one() -> None:
    token = KEYS.mint(new_handle(), 7)
    assert KEYS.read(token) is not None
    for wrong in neighbours(token):
        assert KEYS.read(wrong) is None, wrong


@given(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**63 - 1),
    st.sampled_from(["first", "old"]),
)
def test_a_refresh_token_says_what_it_was_made_of(
    handle: bytes, generation: int, which: str
) -> None:
    key_id = KEYS.current if which == "first" else RefreshKeys((TWO,)).current
    token = KEYS.mint(handle, generation, key_id)
    assert len(token) == 88
    read = KEYS.read(token)
    assert read is not None
    assert (read.handle, read.generation, read.key_id) == (handle, generation, key_id)
    assert KEYS.mint(handle, generation, key_id) == token


@given(st.text(max_size=100) | st.text(ALPHABET, min_size=80, max_size=80).map("asvc_rt_".__add__))
def test_whatever_else_is_read_as_nothing(text: str) -> None:
    assert KEYS.read(text) is None


def test_a_refresh_token_octet_by_octet() -> None:
    handle = bytes(range(16))
    raw = (
        hashlib.sha256(b"authsvc refresh key" + ONE).digest()[:4] + handle + (7).to_bytes(8, "big")
    )
    raw += hmac.digest(ONE, b"asvc_rt_" + raw, "sha256")
    token = "asvc_rt_" + base64.urlsafe_b64encode(raw).decode()
    assert KEYS.mint(handle, 7) == token
    assert KEYS.current == raw[:4].hex()


def test_keys_that_are_gone_and_keys_twice() -> None:
    old = RefreshKeys((TWO,))
    token = old.mint(new_handle(), 1)
    assert KEYS.read(token) is not None
    assert RefreshKeys((ONE,)).read(token) is None
    with pytest.raises(LookupError):
        RefreshKeys((ONE,)).mint(new_handle(), 1, old.current)
    with pytest.raises(ValueError, match="twice"):
        RefreshKeys((ONE, ONE))


def test_nothing_secret_is_shown() -> None:
    token = KEYS.mint(b"h" * 16, 1)
    shown = repr(KEYS) + repr(KEYS.read(token)) + str(vars(KEYS).keys())
    for secret in (ONE.hex(), TWO.hex(), repr(ONE), repr(b"h" * 16)):
        assert secret not in shown
