"""Other people's JWS, JWK and JSON vectors: our decision, and how many there were of each."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwe
from joserfc.jwk import import_key

from authsvc.keys.jwe import Encrypter, is_jwe
from authsvc_client.core.jws import ALGORITHMS, KeyRefused, Refused, Verifier, verify_compact
from authsvc_client.core.reason import Reason
from authsvc_client.core.state import State
from clients.python.tests.core.tokens import KEY, Rig, claims, dump

ROOT = Path(os.environ["AUTHSVC_VECTORS"])
WYCHEPROOF = ROOT / "wycheproof"
COOKBOOK = ROOT / "rfc7520-cookbook"
JSON_FILES = sorted((ROOT / "JSONTestSuite" / "test_parsing").glob("*.json"))

Cases = Iterator[tuple[dict[str, Any], dict[str, Any]]]


def _cases(name: str) -> Cases:
    for group in json.loads((WYCHEPROOF / name).read_text())["testGroups"]:
        for test in group["tests"]:
            yield group, test


def _accepts(jwk: dict[str, Any], token: Any) -> bool:
    """By a key alone; a token that is no text is none of ours."""
    try:
        verifier = Verifier(jwk)
        verify_compact(token if isinstance(token, str) else json.dumps(token), verifier)
    except (KeyRefused, Refused):
        return False
    return True


def _is_ours(jwk: dict[str, Any]) -> bool:
    """Whether we offer the algorithm at all; one we do not offer is refused, valid or not."""
    return jwk.get("alg") in ALGORITHMS


# Wycheproof


def test_wycheproof_signatures() -> None:
    counts: Counter[str] = Counter()
    wrong: list[tuple[int, str]] = []
    for group, test in _cases("json_web_signature_test.json"):
        jwk = group.get("public") or group["private"]
        accepted = _accepts(jwk, test["jws"])
        if not _is_ours(jwk):
            counts[f"not offered, {test['result']}"] += 1
            expected = False
        else:
            counts[f"{jwk['alg']} {test['result']}"] += 1
            expected = test["result"] == "valid"
        if accepted != expected:
            wrong.append((test["tcId"], test["comment"]))
    assert {tc_id for tc_id, _ in wrong} == DIFFERS
    assert counts == COUNTS
    assert counts.total() == 401


# RFC 7520 figure 20: signed by PS384, with a key that is given to PS256. One algorithm per key
# (RFC 8725 section 3.1), so ours is the stricter answer.
DIFFERS = {346, 350}
COUNTS = {
    "ES256 valid": 2,
    "ES256 invalid": 37,
    "RS256 valid": 8,
    "RS256 invalid": 225,
    "PS256 valid": 8,
    "PS256 invalid": 42,
    "not offered, valid": 28,
    "not offered, invalid": 51,
}


def test_wycheproof_private_keys_verify_nothing() -> None:
    groups = {id(group): group for group, _ in _cases("json_web_signature_test.json")}
    privates = [group["private"] for group in groups.values() if "private" in group]
    assert len(privates) == 23
    for jwk in privates:
        with pytest.raises(KeyRefused):
            Verifier(jwk)


def _loads(jwks: dict[str, Any]) -> State | None:
    state = State(120.0)
    try:
        state.replace_keys(jwks["keys"])
    except KeyRefused:
        assert state.keys.by_kid == {}
        return None
    return state


def _public(jwk: dict[str, Any]) -> dict[str, Any]:
    if jwk["kty"] == "oct":
        return jwk
    secret = {"d", "p", "q", "dp", "dq", "qi"}
    return {name: value for name, value in jwk.items() if name not in secret}


def test_wycheproof_key_sets() -> None:
    decided: dict[int, str] = {}
    for group, test in _cases("json_web_key_test.json"):
        jwks = group.get("public") or {"keys": [_public(jwk) for jwk in group["private"]["keys"]]}
        state = _loads(jwks)
        if state is None:
            decided[test["tcId"]] = "set refused"
            continue
        (verifier,) = state.keys.by_kid.values()
        accepted = _accepts(verifier.jwk, test["jws"])
        decided[test["tcId"]] = "accepted" if accepted else "token refused"
        assert accepted == (test["result"] == "valid")
    valid = {t["tcId"] for _, t in _cases("json_web_key_test.json") if t["result"] == "valid"}
    assert len(decided) == 26
    assert {tc for tc, what in decided.items() if what == "accepted"} == {5}
    assert valid - {5} == {2, 13, 14, 15}, "symmetric ones, which we do not offer"
    assert {tc for tc, what in decided.items() if what == "token refused"} == set()


# RFC 7520 and the other RFCs


def _read(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((COOKBOOK / path).read_text())
    return loaded


def test_cookbook_keys() -> None:
    """A key without `alg` is refused: its algorithm would be taken from the token."""
    rsa, ec = _read("jwk/3_3.rsa_public_key.json"), _read("jwk/3_1.ec_public_key.json")
    for alg in ("RS256", "PS256"):
        assert Verifier({**rsa, "alg": alg}).alg == alg
    assert ec["crv"] == "P-521"
    names = sorted(path.name for path in (COOKBOOK / "jwk").iterdir())
    assert len(names) == 6
    for name in names:
        jwk = _read(f"jwk/{name}")
        algs = {"", *ALGORITHMS} if "private" in name or "symmetric" in name or jwk is ec else {""}
        for alg in algs:
            with pytest.raises(KeyRefused):
                Verifier({**jwk, "alg": alg} if alg else jwk)
    for alg in ("ES256", "EdDSA"):
        for jwk in (rsa, ec):
            with pytest.raises(KeyRefused):
                Verifier({**jwk, "alg": alg})


@pytest.mark.parametrize(
    ("path", "accepted"),
    [
        ("jws/4_1.rsa_v15_signature.json", True),
        ("jws/4_2.rsa-pss_signature.json", False),  # PS384
        ("jws/4_3.ecdsa_signature.json", False),  # ES512
        ("jws/4_4.hmac-sha2_integrity_protection.json", False),
        ("jws/4_5.signature_with_detached_content.json", False),
        ("rfc7797/hmac-sha2_b64_false.json", False),
        ("curve25519/jws.json", True),
    ],
)
def test_cookbook_signatures(path: str, accepted: bool) -> None:
    vector = _read(path)
    jwk = {**_public(vector["input"]["key"]), "alg": vector["input"]["alg"]}
    token = vector["output"]["compact"]
    assert _accepts(jwk, token) == accepted
    if accepted:
        payload = verify_compact(token, Verifier(jwk))
        assert payload.decode() == vector["input"]["payload"]
        body, _, signature = token.rpartition(".")
        assert not _accepts(jwk, f"{body}.{signature[::-1]}")
        header, _, signature = token.split(".")
        assert not _accepts(jwk, f"{header}..{signature}"), "detached"


def _cookbook_tokens() -> list[str]:
    """Everything signed or encrypted in the cookbook, in each of its forms."""
    tokens: list[str] = []
    for path in sorted(COOKBOOK.rglob("*.json")):
        vector = json.loads(path.read_text())
        for part in (vector, vector.get("sign", {}), vector.get("encrypt", {})):
            forms = part.get("output", {}).values()
            tokens += [form if isinstance(form, str) else json.dumps(form) for form in forms]
    return tokens


def test_cookbook_no_form_is_an_access_token() -> None:
    tokens = _cookbook_tokens()
    assert len(tokens) == 69
    rig = Rig()
    assert rig(rig.token()).active
    for token in tokens:
        verdict = rig(token, audiences=frozenset({"*"}), audience="")
        assert verdict.reason is Reason.TOKEN_MALFORMED
    assert rig.verifier.checked == 1


def test_cookbook_encryption() -> None:
    """RFC 7520 sections 5, 6: four of the ten keys fit an algorithm of ours."""
    vectors = [_read(f"jwe/{path.name}") for path in sorted((COOKBOOK / "jwe").iterdir())]
    nested = _read("6.nesting_signatures_and_encryption.json")
    assert not is_jwe(nested["sign"]["output"]["compact"])
    taken: list[tuple[str, str]] = []
    for vector in (*vectors, nested["encrypt"]):
        if "compact" not in vector["output"]:
            continue
        assert is_jwe(vector["output"]["compact"])
        key = vector["input"].get("key", {"kty": "oct", "k": vector["input"].get("pwd")})
        with pytest.raises(ValueError, match=r"\w"):
            Encrypter(json.dumps(key))
        for alg in (vector["input"]["alg"], "RSA-OAEP-256"):
            try:
                encrypter = Encrypter(json.dumps({**_public(key), "alg": alg}))
            except ValueError:
                continue
            private = import_key({**key, "alg": alg})
            opened = jwe.decrypt_compact(
                encrypter.encrypt("signed"), private, algorithms=[alg, "A256GCM"]
            )
            assert opened.plaintext == b"signed"
            assert opened.headers()["kid"] == key["kid"]
            taken.append((key["kty"], alg))
    assert taken == [
        ("RSA", "RSA-OAEP-256"),
        ("RSA", "RSA-OAEP-256"),
        ("EC", "ECDH-ES"),
        ("RSA", "RSA-OAEP-256"),
    ]


RFC_SIGNED = {"rfc7515-A.1": False, "rfc7515-A.3": True, "rfc7515-A.5": False, "rfc8037-A.4": True}


def test_rfc_signatures() -> None:
    vectors = {v["id"]: v["data"] for v in json.loads((ROOT / "rfc/rfc_vectors.json").read_text())}
    algs = {"rfc7515-A.3": "ES256", "rfc8037-A.4": "EdDSA", "rfc7515-A.1": "HS256"}
    seen = {name for name, data in vectors.items() if "token" in data}
    assert seen == set(RFC_SIGNED)
    rig = Rig()
    for name, accepted in RFC_SIGNED.items():
        jwk, token = vectors[name].get("jwk", KEY.jwk), vectors[name]["token"]
        assert _accepts({**jwk, "alg": algs.get(name, "ES256")}, token) == accepted
        assert not _accepts(jwk, token) or jwk is KEY.jwk, "no alg in the key"
        assert not rig(token, audiences=frozenset({"*"}), audience="").active
    proof = vectors["rfc9449-4.1"]["proof"]
    assert not _accepts({**vectors["rfc9449-4.1"]["jwk"], "alg": "ES256"}, proof)
    assert not rig(proof, audiences=frozenset({"*"}), audience="").active
    assert rig(rig.token()).active


def test_rfc_thumbprint_binds() -> None:
    """RFC 8705 appendix A: the confirmation of that certificate, and of no other spelling."""
    vectors = {v["id"]: v["data"] for v in json.loads((ROOT / "rfc/rfc_vectors.json").read_text())}
    confirmation = vectors["rfc8705-A"]["jwt_claims_cnf"]
    rig = Rig()
    token, thumbprint = rig.token(cnf=confirmation), vectors["rfc8705-A"]["x5t_S256"]
    assert rig(token, thumbprint=thumbprint).active
    for other in (thumbprint + "=", thumbprint.lower(), thumbprint[:-1], thumbprint[::-1]):
        assert rig(token, thumbprint=other).reason is Reason.PROOF_MISMATCH


# JSONTestSuite


def test_json_suite_is_whole() -> None:
    assert Counter(path.name[0] for path in JSON_FILES) == {"y": 95, "n": 188, "i": 35}


def test_json_suite_as_payload_and_header_of_a_signed_token() -> None:
    rig = Rig()
    assert rig(rig.token()).active
    for path in JSON_FILES:
        raw = path.read_bytes()
        for token in (KEY.sign(raw), KEY.sign(claims(), raw), KEY.sign(raw, raw)):
            verdict = rig(token, audiences=frozenset({"*"}), audience="")
            assert verdict.reason in {Reason.TOKEN_MALFORMED, Reason.TOKEN_TYPE_WRONG}, path.name


def test_json_suite_as_a_claim_that_we_do_not_read() -> None:
    """What all parsers must read stays active; what none may read is refused."""
    rig = Rig()
    text = dump(claims())
    wrong: list[str] = []
    for path in JSON_FILES:
        token = KEY.sign(text[:-1] + b',"x":' + path.read_bytes() + b"}")
        verdict = rig(token)
        assert verdict.reason in {Reason.UNSPECIFIED, Reason.TOKEN_MALFORMED}
        if path.name[0] != "i" and verdict.active != (path.name[0] == "y"):
            wrong.append(path.name)
    assert sorted(wrong) == REFUSED_ALTHOUGH_JSON


# Duplicate names, which RFC 7519 section 4 lets us refuse, and lone surrogates.
REFUSED_ALTHOUGH_JSON = [
    "y_object_duplicated_key.json",
    "y_object_duplicated_key_and_value.json",
]


def test_json_suite_as_a_key() -> None:
    for path in JSON_FILES:
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            continue
        for jwk in (value if isinstance(value, dict) else {}, {**KEY.jwk, "x": value}):
            with pytest.raises(KeyRefused):
                Verifier(jwk)
