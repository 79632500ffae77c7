"""Secrets, what is encrypted at rest, and the key ring."""

import asyncio
import base64
import hmac
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authsvc.errors import AuthError, Reason
from authsvc.keys import secrets as module
from authsvc.keys.jwt import ALGORITHMS_OFFERED, Signer, generate
from authsvc.keys.ring import KeyRing
from authsvc.keys.secrets import (
    CLIENT_SECRET_PREFIX,
    Sealer,
    digest,
    is_secret,
    jitter,
    matches,
    new_id,
    new_seal_key,
    new_secret,
)
from authsvc.model import KeyState, SigningKey
from authsvc.store.port import KeyStore
from authsvc_client.core.judge import Judge, Question
from authsvc_client.core.jws import KeyRefused, Verifier, decode
from authsvc_client.core.state import State
from clients.python.tests.core.tokens import BOOT, ISSUER, NOW, PAYMENTS, REVISION, claims

OTHER_PREFIX = "asvc_ak_"
ASK = Question(frozenset({PAYMENTS}), PAYMENTS)


def _sealer() -> Sealer:
    return Sealer((new_seal_key(),))


# Sealing


def test_seal_opens_for_its_purpose_and_key_only() -> None:
    sealer = _sealer()
    sealed = sealer.seal(b"plain", "purpose")
    assert sealer.open(sealed, "purpose") == b"plain"
    assert b"plain" not in sealed
    for other in ("", "purpos", "purpose ", "Purpose"):
        with pytest.raises(ValueError, match="cannot be opened"):
            sealer.open(sealed, other)
    with pytest.raises(ValueError, match="cannot be opened"):
        _sealer().open(sealed, "purpose")
    with pytest.raises(ValueError, match="cannot be opened"):
        Sealer(()).open(sealed, "purpose")


def test_seal_each_changed_byte_and_each_length_is_refused() -> None:
    sealer = _sealer()
    sealed = sealer.seal(b"plain", "p")
    changed = [
        sealed[:place] + bytes((sealed[place] ^ flip,)) + sealed[place + 1 :]
        for place in range(len(sealed))
        for flip in (1, 0x80)
    ]
    changed += [sealed[:end] for end in range(len(sealed))]
    changed += [sealed + b"\0", b"\0" + sealed, sealed * 2]
    for mutant in changed:
        with pytest.raises(ValueError, match="cannot be opened"):
            sealer.open(mutant, "p")
    assert sealer.open(sealed, "p") == b"plain"


def test_seal_key_rotation_any_key_opens_and_the_first_seals() -> None:
    old, new = new_seal_key(), new_seal_key()
    before = Sealer((old,)).seal(b"plain", "p")
    rotating = Sealer((new, old))
    assert rotating.open(before, "p") == b"plain"
    after = rotating.seal(b"plain", "p")
    assert Sealer((new,)).open(after, "p") == b"plain"
    for sealer, sealed in ((Sealer((old,)), after), (Sealer((new,)), before)):
        with pytest.raises(ValueError, match="cannot be opened"):
            sealer.open(sealed, "p")


def test_seal_is_never_the_same_twice() -> None:
    sealer = _sealer()
    assert len({sealer.seal(b"plain", "p") for _ in range(200)}) == 200


@pytest.mark.parametrize("plain", ["", "x", "\u00e9\U0001f600", "x" * 1000])
def test_seal_text_round_trip_and_every_other_spelling_is_refused(plain: str) -> None:
    sealer = _sealer()
    sealed = sealer.seal_text(plain, "page")
    assert sealer.open_text(sealed, "page") == plain
    spellings = {sealed + extra for extra in ("=", "==", "A", "AAAA", "!", " ", "\n", "\u00e9")}
    spellings |= {
        sealed[:place] + other + sealed[place + 1 :]
        for place in {0, 1, 20, len(sealed) - 2, len(sealed) - 1}
        for other in "ABQgw-_+/!= \u00e9\ud800"
    }
    spellings |= {sealed[:5] + odd + sealed[5:] for odd in "! \n="} | {""}
    for spelling in spellings - {sealed}:
        with pytest.raises(ValueError):  # noqa: PT011
            sealer.open_text(spelling, "page")


# Secrets


def test_secret_has_its_prefix_its_checksum_and_256_bits() -> None:
    secret = new_secret(CLIENT_SECRET_PREFIX)
    assert secret.startswith(CLIENT_SECRET_PREFIX)
    body = secret[len(CLIENT_SECRET_PREFIX) : -6]
    assert len(base64.urlsafe_b64decode(body + "=")) == 32
    assert is_secret(secret, CLIENT_SECRET_PREFIX)
    assert matches(secret, CLIENT_SECRET_PREFIX, digest(secret))
    assert len({new_secret(CLIENT_SECRET_PREFIX) for _ in range(100)}) == 100
    assert len({new_id() for _ in range(100)}) == 100
    assert all(0 <= jitter(2.0) < 2.0 for _ in range(100))


def test_secret_every_prefix_extension_flip_and_swap_is_refused() -> None:
    secret = new_secret(CLIENT_SECRET_PREFIX)
    stored = digest(secret)
    wrong = {secret[:end] for end in range(len(secret))}
    wrong |= {secret[start:] for start in range(1, len(secret))}
    wrong |= {secret + extra for extra in ("A", "=", " ", "\n", "\0", secret)}
    wrong |= {extra + secret for extra in ("A", " ", "Basic ")}
    for place, char in enumerate(secret):
        for other in (char.swapcase(), "A", "0", " ", "\0", "\u00e9", "\ud800", "\uff41"):
            wrong.add(secret[:place] + other + secret[place + 1 :])
    wrong |= {new_secret(CLIENT_SECRET_PREFIX), new_secret(OTHER_PREFIX), secret.upper()}
    wrong.discard(secret)
    for text in wrong:
        assert not matches(text, CLIENT_SECRET_PREFIX, stored)
    assert matches(secret, CLIENT_SECRET_PREFIX, stored)


def test_secret_of_one_kind_is_not_one_of_another() -> None:
    secret = new_secret(OTHER_PREFIX)
    assert matches(secret, OTHER_PREFIX, digest(secret))
    assert not matches(secret, CLIENT_SECRET_PREFIX, digest(secret))
    renamed = CLIENT_SECRET_PREFIX + secret.removeprefix(OTHER_PREFIX)
    assert not is_secret(renamed, CLIENT_SECRET_PREFIX)


@pytest.mark.parametrize("stored", [None, b"", bytes(32), b"x", bytes(31)])
def test_secret_against_nothing_stored_is_refused(stored: bytes | None) -> None:
    for text in (new_secret(CLIENT_SECRET_PREFIX), "", CLIENT_SECRET_PREFIX):
        assert not matches(text, CLIENT_SECRET_PREFIX, stored)


@given(st.text())
def test_secret_any_text_is_refused_and_raises_nothing(text: str) -> None:
    assert not is_secret(text, CLIENT_SECRET_PREFIX)
    assert not matches(CLIENT_SECRET_PREFIX + text, CLIENT_SECRET_PREFIX, bytes(32))


def test_secret_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    secret, compared = new_secret(CLIENT_SECRET_PREFIX), []

    def watch(one: Any, two: Any) -> bool:
        compared.append((one, two))
        return hmac.compare_digest(one, two)

    monkeypatch.setattr(
        module, "hmac", type("watched", (), {"compare_digest": staticmethod(watch)})
    )
    stored = digest(secret)
    other = new_secret(CLIENT_SECRET_PREFIX)
    assert matches(secret, CLIENT_SECRET_PREFIX, stored)
    assert not matches(other, CLIENT_SECRET_PREFIX, stored)
    assert (stored, stored) in compared
    assert (digest(other), stored) in compared
    assert not matches(other, CLIENT_SECRET_PREFIX, None), "as much work for an unknown client"
    assert (digest(other), bytes(32)) in compared


# Signing


def _judge(*jwks: Mapping[str, Any]) -> Judge:
    state = State(120.0)
    state.replace_keys(jwks)
    state.apply([], REVISION)
    state.confirm(BOOT, NOW)
    return Judge(ISSUER, state)


@pytest.mark.parametrize("alg", ALGORITHMS_OFFERED)
def test_signer_writes_canonical_tokens_that_are_active(alg: str) -> None:
    sealer = _sealer()
    key = generate(sealer, KeyState.CURRENT, NOW, alg)
    signer, judge = Signer(key, sealer), _judge(key.public_jwk)
    lengths = set()
    for index in range(20):
        token = signer.sign(claims(jti="j" * index + "\u00e9"))
        lengths.add(len(token) % 4)
        header, payload, signature = token.split(".")
        assert json.loads(decode(header)) == {"alg": alg, "kid": key.kid, "typ": "at+jwt"}
        assert b" " not in decode(header) + decode(payload).replace(b"pay.read pay.write", b"")
        assert len(decode(signature)) == (64 if alg in {"ES256", "EdDSA"} else 256)
        assert judge(token, ASK, BOOT).active
    assert len(lengths) > 1


MEMBERS = {"ES256": "crv x y", "RS256": "n e", "PS256": "n e", "EdDSA": "crv x"}


@pytest.mark.parametrize("alg", ALGORITHMS_OFFERED)
def test_generate_hides_the_private_part(alg: str) -> None:
    sealer = _sealer()
    key = generate(sealer, KeyState.NEXT, NOW, alg)
    assert set(key.public_jwk) == {"kty", "kid", "alg", "use", *MEMBERS[alg].split()}
    assert (key.alg, key.public_jwk["alg"], Verifier(key.public_jwk).alg) == (alg, alg, alg)
    assert (key.state, key.create_time, key.kid) == (KeyState.NEXT, NOW, key.public_jwk["kid"])
    for wrong in (_sealer(), Sealer(())):
        with pytest.raises(ValueError, match="cannot be opened"):
            Signer(key, wrong)
    with pytest.raises(ValueError, match="cannot be opened"):
        Signer(replace(key, kid="another"), sealer)


def test_generate_makes_nothing_else() -> None:
    for alg in ("none", "HS256", "RSA-OAEP-256", "es256", ""):
        with pytest.raises(LookupError):
            generate(_sealer(), KeyState.NEXT, NOW, alg)


# The ring


class Store:
    """Signing keys; each step lets the others run, as a database would."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys = list(keys)
        self.gate: asyncio.Event | None = None

    async def all(self) -> tuple[SigningKey, ...]:
        found, gate = tuple(self.keys), self.gate
        await (gate.wait() if gate else asyncio.sleep(0))
        return found

    async def add_first(self, key: SigningKey) -> None:
        await asyncio.sleep(0)
        if not any(held.state is KeyState.CURRENT for held in self.keys):
            self.keys.append(key)


def _ring(store: Store, sealer: Sealer) -> tuple[KeyRing, Judge]:
    judge = _judge()
    return KeyRing(cast("KeyStore", store), sealer, judge.state), judge


async def test_ensure_raced_by_many_workers_makes_one_key_that_all_take() -> None:
    store, sealer = Store(), _sealer()
    rings = [_ring(store, sealer) for _ in range(16)]
    await asyncio.gather(*(ring.ensure() for ring, _ in rings))
    assert [key.state for key in store.keys] == [KeyState.CURRENT]
    await asyncio.gather(*(ring.load() for ring, _ in rings))
    tokens = [ring.signer.sign(claims()) for ring, _ in rings]
    assert all(judge(token, ASK, BOOT).active for _, judge in rings for token in tokens)
    await rings[0][0].ensure()
    assert len(store.keys) == 1


async def test_ensure_makes_a_current_key_beside_others() -> None:
    sealer = _sealer()
    store = Store(generate(sealer, KeyState.RETIRED, NOW), generate(sealer, KeyState.TAINTED, NOW))
    ring, _ = _ring(store, sealer)
    await ring.ensure()
    assert [key.state for key in store.keys].count(KeyState.CURRENT) == 1


async def test_signer_before_any_key_is_unavailable() -> None:
    ring, _ = _ring(Store(), _sealer())
    for _ in range(2):
        with pytest.raises(AuthError) as caught:
            _ = ring.signer
        assert caught.value.reason is Reason.STORE_UNAVAILABLE
        await ring.load()


async def test_load_follows_each_state_of_a_key() -> None:
    sealer = _sealer()
    keys = {state: generate(sealer, state, NOW) for state in KeyState}
    store = Store(*keys.values())
    ring, judge = _ring(store, sealer)
    await ring.load()
    assert ring.signer.kid == keys[KeyState.CURRENT].kid
    for state, key in keys.items():
        token = Signer(key, sealer).sign(claims())
        verdict = judge(token, ASK, BOOT)
        assert verdict.active == (state is not KeyState.TAINTED)
        if state is KeyState.TAINTED:
            assert verdict.reason is Reason.TOKEN_KEY_UNKNOWN


async def test_load_keeps_the_signer_of_the_same_key_and_changes_it_with_the_key() -> None:
    sealer = _sealer()
    first, second = (generate(sealer, KeyState.CURRENT, NOW) for _ in range(2))
    store = Store(first)
    ring, judge = _ring(store, sealer)
    await ring.load()
    signer, token = ring.signer, ring.signer.sign(claims())
    await ring.load()
    assert ring.signer is signer
    store.keys = [replace(first, state=KeyState.RETIRED), second]
    await ring.load()
    assert ring.signer.kid == second.kid
    assert judge(token, ASK, BOOT).active
    assert judge(ring.signer.sign(claims()), ASK, BOOT).active


async def test_load_without_a_current_key_stops_signing() -> None:
    """Tainted with no successor: better no token than one that is dead already."""
    sealer = _sealer()
    key = generate(sealer, KeyState.CURRENT, NOW)
    store = Store(key)
    ring, _ = _ring(store, sealer)
    await ring.load()
    assert ring.signer.kid == key.kid
    store.keys = [replace(key, state=KeyState.TAINTED)]
    await ring.load()
    with pytest.raises(AuthError):
        _ = ring.signer


def _broken(sealer: Sealer, what: str) -> SigningKey:
    key = generate(sealer, KeyState.CURRENT, NOW)
    if what == "sealed by another key":
        return generate(_sealer(), KeyState.CURRENT, NOW)
    if what == "sealed for another kid":
        sealed = sealer.seal(b"x", "signing-key:other")
    elif what == "no key inside":
        sealed = sealer.seal(b"x", "signing-key:" + key.kid)
    elif what == "public part":
        return replace(key, public_jwk={**key.public_jwk, "x": "AAAA"})
    else:
        return replace(key, public_jwk={**key.public_jwk, "kid": ""})
    return replace(key, sealed_private=sealed)


@pytest.mark.parametrize(
    "what",
    ["sealed by another key", "sealed for another kid", "no key inside", "public part", "kid"],
)
async def test_load_of_an_unusable_key_changes_nothing(what: str) -> None:
    sealer = _sealer()
    good = generate(sealer, KeyState.CURRENT, NOW)
    store = Store(good)
    ring, judge = _ring(store, sealer)
    await ring.load()
    signer, keys = ring.signer, judge.state.keys
    token = signer.sign(claims())
    store.keys = [replace(good, state=KeyState.TAINTED), _broken(sealer, what)]
    with pytest.raises(ValueError):  # noqa: PT011
        await ring.load()
    assert ring.signer is signer
    assert judge.state.keys is keys
    assert judge(token, ASK, BOOT).active
    store.keys = [good]
    await ring.load()
    assert ring.signer is signer


async def test_load_of_a_twice_used_kid_changes_nothing() -> None:
    sealer = _sealer()
    good = generate(sealer, KeyState.CURRENT, NOW)
    twin = generate(sealer, KeyState.RETIRED, NOW)
    twin = replace(twin, kid=good.kid, public_jwk={**twin.public_jwk, "kid": good.kid})
    ring, judge = _ring(Store(good, twin), sealer)
    with pytest.raises(KeyRefused):
        await ring.load()
    assert judge.state.keys.by_kid == {}
    with pytest.raises(AuthError):
        _ = ring.signer


async def test_load_overtaken_by_a_later_one_does_not_bring_old_keys_back() -> None:
    sealer = _sealer()
    old, new = (generate(sealer, KeyState.CURRENT, NOW) for _ in range(2))
    store = Store(old)
    ring, judge = _ring(store, sealer)
    store.gate = slow = asyncio.Event()
    first = asyncio.create_task(ring.load())
    await asyncio.sleep(0)
    store.gate, store.keys = None, [replace(old, state=KeyState.TAINTED), new]
    second = asyncio.create_task(ring.load())
    for _ in range(5):
        await asyncio.sleep(0)
    slow.set()
    await asyncio.gather(first, second)
    assert ring.signer.kid == new.kid
    assert set(judge.state.keys.by_kid) == {new.kid}
