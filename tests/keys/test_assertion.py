"""private_key_jwt: every mutation of a good assertion is refused, and the good one is not."""

import hmac
import json
import string
from base64 import urlsafe_b64encode
from collections.abc import Callable
from functools import partial
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from authsvc.keys.assertion import Assertion, ClientKeys
from authsvc_client.core.jws import ALGORITHMS
from authsvc_client.core.markers import LEEWAY_S

NOW = 1_800_000_000
ALPHABET = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
ISSUER, CLIENT = "https://issuer.test", "client"
KEY, OTHER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
RSA = rsa.generate_private_key(65537, 2048)


def jwk(key: Any, **more: Any) -> dict[str, Any]:
    algorithm: Any = ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else RSAAlgorithm
    members = algorithm.to_jwk(key.public_key(), as_dict=True)
    members.pop("key_ops", None)
    return {**members, "alg": "ES256" if algorithm is ECAlgorithm else "RS256", **more}


def jwks(*keys: dict[str, Any]) -> str:
    return json.dumps({"keys": keys})


KEYS = ClientKeys(jwks(jwk(KEY, kid="k"), jwk(RSA, kid="r")))


def claims(**changes: Any) -> dict[str, Any]:
    made = {"iss": CLIENT, "sub": CLIENT, "aud": ISSUER, "exp": NOW + 60, "jti": "j"} | changes
    return {name: value for name, value in made.items() if value is not ...}


def sign(payload: Any = None, key: Any = KEY, alg: str = "ES256", **header: Any) -> str:
    """By PyJWT; a header of ... is left out."""
    merged = {"kid": "k", "typ": "JWT"} | header
    kept = {name: value for name, value in merged.items() if value is not ...}
    return jwt.api_jws.encode(json.dumps(payload or claims()).encode(), key, alg, headers=kept)


def verify(assertion: str, now: float = NOW) -> Assertion:
    return KEYS.verify(assertion, CLIENT, ISSUER, now)


GOOD: dict[str, Callable[[], str]] = {
    "plain": sign,
    "audience in a list": lambda: sign(claims(aud=[ISSUER])),
    "typ of rfc7523bis": lambda: sign(typ="client-authentication+jwt"),
    "typ as a media type": lambda: sign(typ="application/client-authentication+JWT"),
    "without kid": lambda: sign(kid=...),
    "another algorithm's key": lambda: sign(key=RSA, alg="RS256", kid="r"),
    "another algorithm's key, without kid": lambda: sign(key=RSA, alg="RS256", kid=...),
    "iat and nbf": lambda: sign(claims(iat=NOW + LEEWAY_S, nbf=NOW - 5)),
    "the longest life": lambda: sign(claims(exp=NOW + 600)),
    "a clock that is slow": lambda: sign(claims(exp=NOW - LEEWAY_S + 1)),
    "signed by hand": lambda: raw(payload=claims()),
    "a long jti": lambda: sign(claims(jti="j" * 256)),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_one_is_taken(name: str) -> None:
    found = verify(GOOD[name]())
    assert (found.client_id, found.jti.rstrip("j")) == (CLIENT, "")
    assert NOW - LEEWAY_S < found.expires <= NOW + 600


def part(value: Any) -> str:
    """A text as it stands; anything else as JSON."""
    raw = value if isinstance(value, str) else json.dumps(value)
    return urlsafe_b64encode(raw.encode()).rstrip(b"=").decode()


def raw(header: Any = ..., payload: Any = ..., signature: str | None = None) -> str:
    """Whatever it says, the client itself signed it, by ES256; or the signature is given."""
    header = {"alg": "ES256", "kid": "k"} if header is ... else header
    body = f"{part(header)}.{part(claims() if payload is ... else payload)}"
    if signature is None:
        made = ALGORITHMS["ES256"].sign(body.encode(), KEY)
        signature = urlsafe_b64encode(made).rstrip(b"=").decode()
    return f"{body}.{signature}"


def headed(**changes: Any) -> str:
    return raw({"alg": "ES256", "kid": "k"} | changes)


def by_hmac(key: bytes, **header: Any) -> str:
    """RFC 8725 section 2.1: the public key taken for a shared secret."""
    body = raw({"alg": "HS256", **header}, signature="")
    made = hmac.digest(key, body.rstrip(".").encode(), "sha256")
    return body + urlsafe_b64encode(made).rstrip(b"=").decode()


def public_key(encoding: Encoding) -> bytes:
    return KEY.public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)


def respelled(token: str) -> str:
    """Another last character, the same bytes to a lenient decoder."""
    return token[:-1] + ALPHABET[ALPHABET.index(token[-1]) ^ 1]


def as_text(name: str, value: str) -> str:
    """A claim that json.dumps would not write so."""
    return raw(payload=json.dumps(claims(**{name: "@"})).replace('"@"', value))


NO_ALGORITHMS: list[Any] = ["none", "None", "nOnE", "", "es256", "ES384", None, 1, ["ES256"], {}]
BAD: dict[str, Callable[[], str]] = {
    "iss": lambda: sign(claims(iss="other")),
    "iss is a prefix": lambda: sign(claims(iss=CLIENT[:-1])),
    "iss in a list": lambda: sign(claims(iss=[CLIENT])),
    "iss with a NUL": lambda: sign(claims(iss=CLIENT + "\0")),
    "no iss": lambda: sign(claims(iss=...)),
    "sub": lambda: sign(claims(sub="other")),
    "no sub": lambda: sign(claims(sub=...)),
    "aud": lambda: sign(claims(aud="https://other.test")),
    "aud is the token endpoint": lambda: sign(claims(aud=f"{ISSUER}/token")),
    "aud with a slash": lambda: sign(claims(aud=f"{ISSUER}/")),
    "aud is a prefix": lambda: sign(claims(aud=ISSUER[:-1])),
    "two audiences": lambda: sign(claims(aud=[ISSUER, "https://other.test"])),
    "one audience twice": lambda: sign(claims(aud=[ISSUER, ISSUER])),
    "no audience": lambda: sign(claims(aud=[])),
    "aud nested": lambda: sign(claims(aud=[[ISSUER]])),
    "aud an object": lambda: sign(claims(aud={ISSUER: 1})),
    "aud in capitals": lambda: sign(claims(aud=ISSUER.upper())),
    "aud missing": lambda: sign(claims(aud=...)),
    "exp past": lambda: sign(claims(exp=NOW - LEEWAY_S)),
    "exp of 1e400": lambda: as_text("exp", "1e400"),
    "exp NaN": lambda: as_text("exp", "NaN"),
    "exp as 1.8e9": lambda: as_text("exp", f"{NOW + 60}.0"),
    "exp negative": lambda: sign(claims(exp=-1)),
    "exp of 2^63": lambda: sign(claims(exp=2**63)),
    "exp of 5000 digits": lambda: as_text("exp", "9" * 5000),
    "exp null": lambda: sign(claims(exp=None)),
    "exp too far": lambda: sign(claims(exp=NOW + 601)),
    "exp missing": lambda: sign(claims(exp=...)),
    "exp a text": lambda: sign(claims(exp=str(NOW + 60))),
    "exp a fraction": lambda: sign(claims(exp=NOW + 60.5)),
    "exp true": lambda: sign(claims(exp=True)),
    "iat ahead": lambda: sign(claims(iat=NOW + LEEWAY_S + 1)),
    "nbf ahead": lambda: sign(claims(nbf=NOW + LEEWAY_S + 1)),
    "iat true": lambda: sign(claims(iat=True)),
    "nbf negative": lambda: sign(claims(nbf=-1)),
    "nbf a text": lambda: sign(claims(nbf="0")),
    "jti missing": lambda: sign(claims(jti=...)),
    "jti empty": lambda: sign(claims(jti="")),
    "jti a number": lambda: sign(claims(jti=1)),
    "jti too long": lambda: sign(claims(jti="j" * 257)),
    "an access token": lambda: sign(typ="at+jwt"),
    "a DPoP proof": lambda: sign(typ="dpop+jwt"),
    "an access token as a media type": lambda: sign(typ="application/at+JWT"),
    "a logout token": lambda: sign(typ="logout+jwt"),
    "a typ of nothing": lambda: headed(typ=""),
    "a typ of nothing but a tree": lambda: headed(typ="application/"),
    "typ with a space": lambda: headed(typ="JWT "),
    "a typ that is no text": lambda: headed(typ=1),
    "typ null": lambda: headed(typ=None),
    "a nested token": lambda: raw({"alg": "ES256", "kid": "k", "cty": "JWT"}, sign()),
    "crit": lambda: sign(crit=["x"], x=1),
    "crit of what is known": lambda: sign(crit=["exp"]),
    "crit of nothing": lambda: headed(crit=[]),
    "b64": lambda: headed(crit=["b64"], b64=False),
    "b64 without crit": lambda: headed(b64=False),
    "embedded key": lambda: sign(key=OTHER, jwk=jwk(OTHER)),
    "jku": lambda: sign(jku="https://evil.test/keys"),
    "x5u": lambda: sign(x5u="https://evil.test/certificate"),
    "x5c": lambda: sign(x5c=["MIIB"]),
    "zip": lambda: sign(zip="DEF"),
    "another's key": lambda: sign(key=OTHER),
    "another's kid": lambda: sign(kid="r"),
    "unknown kid": lambda: sign(kid="../../dev/null"),
    "kid of SQL": lambda: headed(kid="' UNION SELECT 'x"),
    "kid a NUL": lambda: headed(kid="k\0"),
    "kid empty": lambda: headed(kid=""),
    "kid null, among several": lambda: raw({"alg": "RS256", "kid": None}),
    "kid a number": lambda: headed(kid=1),
    "kid a list": lambda: headed(kid=["k"]),
    "kid an object": lambda: headed(kid={"k": 1}),
    "kid of a megabyte": lambda: headed(kid="k" * 2**20),
    **{f"alg {alg!r}": partial(headed, alg=alg) for alg in NO_ALGORITHMS},
    "alg none, no signature": lambda: raw({"alg": "none", "kid": "k"}, signature=""),
    "alg none, no kid": lambda: raw({"alg": "none"}, signature="AAAA"),
    "alg a list, no kid": lambda: raw({"alg": ["ES256"]}),
    "alg missing": lambda: raw({"kid": "k"}),
    "another algorithm of the key": lambda: sign(key=RSA, alg="PS256", kid="r"),
    "HMAC by the public key in PEM": lambda: by_hmac(public_key(Encoding.PEM), kid="k"),
    "HMAC by the public key in DER": lambda: by_hmac(public_key(Encoding.DER)),
    "HMAC by the JWK": lambda: by_hmac(json.dumps(jwk(KEY, kid="k")).encode(), kid="k"),
    "HMAC by nothing": lambda: by_hmac(b"", kid="/dev/null"),
    "zero signature": lambda: sign().rpartition(".")[0] + "." + "A" * 86,
    "trailing bits": lambda: respelled(sign()),
    "another signature": lambda: f"{sign().rpartition('.')[0]}.{sign(claims(jti='2'))[-86:]}",
    "padding": lambda: sign() + "=",
    "a space": lambda: sign() + " ",
    "a line end": lambda: sign() + "\r\n",
    "the alphabet of the standard": lambda: "+" + sign()[1:],
    "not ASCII": lambda: sign()[:-1] + "\u00e9",
    "four parts": lambda: sign() + ".e30",
    "an array for claims": lambda: sign([1]),
    "a claim twice": lambda: raw(payload=json.dumps(claims())[:-1] + f', "sub": "{CLIENT}"}}'),
    "a header twice": lambda: raw('{"alg":"ES256","kid":"k","alg":"ES256"}'),
    "something behind the claims": lambda: raw(payload=json.dumps(claims()) + "{}"),
    "no claims": lambda: raw(payload=""),
    "nothing": lambda: "",
    "dots": lambda: "." * 10**6,
    "long": lambda: "e30." + "A" * 10**6 + ".AAAA",
}


BY_SIGNATURE = {"another's key", "zero signature", "another signature"}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_one_is_refused_and_never_quoted(name: str) -> None:
    """RFC 7523 section 3, RFC 8725 sections 3.1, 3.8, 3.10, 3.11."""
    bad = BAD[name]()
    with pytest.raises(ValueError, match=r"\w") as caught:
        verify(bad)
    message = str(caught.value)
    assert len(message) < 60
    assert "evil" not in message
    assert ("TOKEN_SIGNATURE_INVALID" in message) == (name in BY_SIGNATURE), "for its own reason"
    assert verify(sign()).jti == "j"


def test_of_two_keys_for_one_algorithm_the_kid_chooses() -> None:
    keys = ClientKeys(jwks(jwk(KEY, kid="k"), jwk(OTHER, kid="o")))
    for key, kid in ((KEY, "k"), (OTHER, "o")):
        assert keys.verify(sign(key=key, kid=kid), CLIENT, ISSUER, NOW).jti == "j"
        with pytest.raises(ValueError, match="no such key"):
            keys.verify(sign(key=key, kid=...), CLIENT, ISSUER, NOW)


def test_one_clients_assertion_is_not_anothers() -> None:
    with pytest.raises(ValueError, match="not the client"):
        KEYS.verify(sign(), "another", ISSUER, NOW)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"keys":{}}',
        jwks(),
        jwks(*[jwk(KEY, kid=str(n)) for n in range(17)]),
        json.dumps({"keys": ["x"]}),
        jwks(jwk(KEY, kid="k"), jwk(OTHER, kid="k")),
        jwks(jwk(KEY), jwk(OTHER, kid="k")),
        jwks(jwk(KEY), jwk(OTHER)),
        jwks(jwk(KEY, d="AA")),
        jwks(jwk(KEY, use="enc")),
        jwks(jwk(KEY, alg="HS256")),
        jwks({"kty": "oct", "k": "AAAA", "alg": "HS256"}),
        jwks({name: value for name, value in jwk(KEY).items() if name != "alg"}),
        jwks(jwk(KEY, kid=1)),
        jwks(jwk(KEY, y=jwk(KEY)["x"])),
        jwks(jwk(KEY, alg="RS256")),
        jwks(jwk(KEY, kid="k"), jwk(RSA, d="AA", kid="r")),
        json.dumps(jwk(KEY)),
        '{"keys":[],"keys":[]}',
        jwks(jwk(KEY)) + " ",
        "\ud800",
        "[" * 100_000,
    ],
)
def test_a_set_that_cannot_authenticate_anybody_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        ClientKeys(text)
