"""A valid token with anything changed is not active, and ECDSA's second signature is no way out."""

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from authsvc_client.core.markers import MarkerKind
from authsvc_client.core.reason import Reason

from .tokens import KEY, Key, Rig, active, b64, claims

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
ODD = "=.+/ \n\r\t\0!,~\u00e9\u0130\u2028\ud800\U0001f600"
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
RIG = Rig()
TOKEN = RIG.token()


def _near(char: str) -> str:
    """Its neighbours in value, with each single bit of the six flipped."""
    place = ALPHABET.find(char)
    return "".join(ALPHABET[place ^ (1 << bit)] for bit in range(6)) if place >= 0 else "A-"


def test_every_character_replaced_is_refused() -> None:
    assert RIG(TOKEN).active
    mutants = [
        TOKEN[:place] + other + TOKEN[place + 1 :]
        for place, char in enumerate(TOKEN)
        for other in _near(char) + char.swapcase() + ODD
        if other != char
    ]
    assert len(mutants) > 20 * len(TOKEN)
    assert active(map(RIG, mutants)) == []
    assert RIG(TOKEN).active


def test_every_character_of_the_signature_by_every_other_is_refused() -> None:
    start = TOKEN.rindex(".") + 1
    mutants = (
        TOKEN[:place] + other + TOKEN[place + 1 :]
        for place in range(start, len(TOKEN))
        for other in ALPHABET
        if other != TOKEN[place]
    )
    assert active(map(RIG, mutants)) == []


def test_every_character_dropped_doubled_or_swapped_and_every_cut_is_refused() -> None:
    mutants = {
        edited
        for place in range(len(TOKEN))
        for edited in (
            TOKEN[:place] + TOKEN[place + 1 :],
            TOKEN[:place] + TOKEN[place] + TOKEN[place:],
            TOKEN[:place] + TOKEN[place : place + 2][::-1] + TOKEN[place + 2 :],
            TOKEN[:place],
            TOKEN[place + 1 :],
        )
    } - {TOKEN}
    assert active(map(RIG, mutants)) == []


@pytest.mark.parametrize(
    "around",
    [
        "=",
        "==",
        "====",
        ".",
        "..",
        " ",
        "\n",
        "\r\n",
        "\t",
        "\0",
        "A",
        "AAAA",
        "\ufeff",
        "%3D",
        "&",
    ],
)
def test_anything_before_between_or_after_is_refused(around: str) -> None:
    header, payload, signature = TOKEN.split(".")
    assert RIG(TOKEN).active
    for mutant in (
        around + TOKEN,
        TOKEN + around,
        f"{header}{around}.{payload}.{signature}",
        f"{header}.{around}{payload}.{signature}",
        f"{header}.{payload}{around}.{signature}",
        f"{header}.{payload}.{around}{signature}",
        TOKEN.replace(".", around),
        around,
    ):
        if mutant != TOKEN:
            assert not RIG(mutant).active


@pytest.mark.parametrize(
    "mutant",
    ["", ".", "..", "...", "Bearer " + TOKEN, TOKEN + "." + TOKEN, TOKEN * 2, TOKEN.upper()],
)
def test_what_has_another_form_is_refused(mutant: str) -> None:
    assert RIG(TOKEN).active
    assert not RIG(mutant).active


@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("alg", ["ES256", "EdDSA"])
def test_trailing_bits_of_a_segment_are_refused_even_where_they_are_signed(
    segment: int, alg: str
) -> None:
    """A lenient decoder drops them, so that one token would have several spellings."""
    rig = Rig(Key(alg=alg))
    found = 0
    for pad in range(4):
        token = rig.token(jti="j" * (pad + 1))
        assert rig(token).active
        parts = token.split(".")
        unused = {0: 0, 2: 4, 3: 2}[len(parts[segment]) % 4]
        place = ALPHABET.index(parts[segment][-1])
        for bits in range(1, 1 << unused):
            found += 1
            parts[segment] = parts[segment][:-1] + ALPHABET[place ^ bits]
            assert not rig(".".join(parts)).active
            body = f"{parts[0]}.{parts[1]}"
            if segment < 2:
                assert not rig(f"{body}.{b64(rig.key.raw(body.encode()))}").active
    assert found or segment == 0


def test_standard_alphabet_is_refused_where_it_would_decode_to_the_same() -> None:
    seen = set()
    for index in range(200):
        token = RIG.token(jti=f"jti-{index}>?>?~~")
        body, _, signature = token.rpartition(".")
        for safe, standard in (("-", "+"), ("_", "/")):
            if safe in signature:
                seen.add(safe)
                assert RIG(token).active
                mutant = f"{body}.{signature.replace(safe, standard)}"
                assert RIG(mutant).reason is Reason.TOKEN_MALFORMED
        if seen == {"-", "_"}:
            return
    raise AssertionError("no signature held both")


def test_the_second_ecdsa_signature_is_the_same_token_and_dies_with_it() -> None:
    """(r, n-s) verifies too (FIPS 186-5): identity is the `jti`, never the string."""
    rig = Rig()
    token = rig.token()
    body = token.rpartition(".")[0]
    raw = rig.key.raw(body.encode())
    r, s = raw[:32], int.from_bytes(raw[32:], "big")
    twins = [f"{body}.{b64(r + value.to_bytes(32, 'big'))}" for value in (s, P256_ORDER - s)]
    assert len({token, *twins}) == 3
    verdicts = [rig(text) for text in (token, *twins)]
    assert all(verdict.active for verdict in verdicts)
    assert len({verdict.claims for verdict in verdicts}) == 1
    rig.mark(MarkerKind.TOKEN_DEAD, "jti-1")
    assert {rig(text).reason for text in (token, *twins)} == {Reason.TOKEN_REVOKED}


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63, 65, 66, 70, 72, 96, 128])
def test_ecdsa_signature_of_another_length_is_refused(length: int) -> None:
    body = TOKEN.rpartition(".")[0]
    raw = (KEY.raw(body.encode()) + bytes(64))[:length]
    assert not RIG(f"{body}.{b64(raw)}").active


def test_ecdsa_halves_of_another_length_but_equal_value_are_refused() -> None:
    body = TOKEN.rpartition(".")[0]
    found: set[str] = set()
    while found != {"r", "s"}:
        raw = KEY.raw(body.encode())
        assert RIG(f"{body}.{b64(raw)}").active
        r, s = raw[:32], raw[32:]
        wrong = [r + b"\0" + s, b"\0" + raw, b"\0" + r + b"\0" + s]
        for name, half, other in (("r", r, r[1:] + s), ("s", s, r + s[1:])):
            if half[0] == 0:
                found.add(name)
                wrong.append(other)
        assert active(RIG(f"{body}.{b64(mutant)}") for mutant in wrong) == []


def test_ecdsa_special_values_and_der_are_refused() -> None:
    """CVE-2022-21449: r = s = 0 verified anything."""
    body = TOKEN.rpartition(".")[0]
    values = [0, 1, P256_ORDER - 1, P256_ORDER, P256_ORDER + 1, 2**256 - 1]
    for r in values:
        for s in values:
            raw = r.to_bytes(32, "big") + s.to_bytes(32, "big")
            assert RIG(f"{body}.{b64(raw)}").reason is Reason.TOKEN_SIGNATURE_INVALID
    der = KEY.private.sign(body.encode(), ec.ECDSA(hashes.SHA256()))
    assert RIG(f"{body}.{b64(der)}").reason is Reason.TOKEN_SIGNATURE_INVALID


@pytest.mark.parametrize("alg", ["RS256", "PS256", "EdDSA"])
def test_other_algorithms_refuse_each_flipped_byte_and_each_other_length(alg: str) -> None:
    rig = Rig(Key(alg=alg))
    token = rig.token()
    assert rig(token).active
    body = token.rpartition(".")[0]
    raw = rig.key.raw(body.encode())
    changed = [
        raw[:place] + bytes((raw[place] ^ flip,)) + raw[place + 1 :]
        for place in range(len(raw))
        for flip in (1, 0x80)
    ]
    changed += [raw[:-1], raw[1:], raw + b"\0", b"\0" + raw, bytes(len(raw)), b"\xff" * len(raw)]
    assert active(rig(f"{body}.{b64(mutant)}") for mutant in changed) == []


EDITS = st.lists(
    st.tuples(
        st.integers(0, len(TOKEN)),
        st.integers(0, 3),
        st.one_of(st.text(ALPHABET + "=.", max_size=3), st.text(max_size=3)),
    ),
    min_size=1,
    max_size=5,
)


@given(EDITS)
@settings(max_examples=500)
def test_random_edits_are_refused_unless_they_change_nothing(
    edits: list[tuple[int, int, str]],
) -> None:
    token = TOKEN
    for place, dropped, inserted in edits:
        token = token[:place] + inserted + token[place + dropped :]
    assert RIG(token).active == (token == TOKEN)


@given(st.text() | st.from_regex(r"[\w-]{0,80}\.[\w-]{0,200}\.[\w-]{0,90}"))
@settings(max_examples=300)
def test_any_text_gets_a_verdict(text: str) -> None:
    assert not RIG(text).active


def test_parts_of_two_valid_tokens_do_not_mix() -> None:
    other = RIG.key.sign(claims(jti="jti-2", scope="pay.admin"))
    assert RIG(other).active
    one, two = TOKEN.split("."), other.split(".")
    for mix in ((0, 0, 1), (0, 1, 0), (1, 0, 1), (1, 1, 0)):
        mixed = ".".join((one, two)[pick][place] for place, pick in enumerate(mix))
        assert RIG(mixed).reason is Reason.TOKEN_SIGNATURE_INVALID
