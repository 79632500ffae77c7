"""Outside certificates of go-spiffe and py-spiffe: what is good is accepted, what is bad is not."""

import os
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.verification import VerificationError

from authsvc.errors import AuthError, Reason
from authsvc.rpc.peer import Peers, Trust, _Anchor, read_authorities, read_bundle
from tests import certs

ROOT = Path(os.environ["AUTHSVC_VECTORS"]) / "spiffe"
GO = ROOT / "go-spiffe/svid/x509svid/testdata"
GO_BUNDLES = ROOT / "go-spiffe/bundle"
PY = ROOT / "py-spiffe/testutils/src/testutils/x509-certs"

_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)

# Leaf and issuer, so that the whole way can be gone; with pins as openssl gives them.
CHAINS = {
    GO / "good-leaf-and-intermediate.pem": (
        "spiffe://example.org/workload-1",
        "007ca938f2356ee218ed3897c8fddf61f6d60abd1b0c2765628104c06b046de6",
    ),
    PY / "2-chain.pem": (
        "spiffe://example.org/service",
        "d74f26e8ae9f1980352b4cb5322839a29d12bc2f47aed1f7a184ff97660a20cd",
    ),
}

# Their issuers are not at hand: how far does the judging of the leaf come?
NO_ISSUER = "no path"
# go-spiffe and py-spiffe accept it; here the extension is a must (design, section 7).
NO_EXTENDED = "clientAuth"
LEAVES = {
    GO / "good-cert-and-key.pem": NO_ISSUER,
    GO / "good-key-and-cert.pem": NO_ISSUER,
    PY / "1-chain.der": NO_ISSUER,
    PY / "4-cert.der": NO_ISSUER,
    GO / "good-leaf-only.pem": NO_EXTENDED,
    PY / "3-good-leaf-only.pem": NO_EXTENDED,
    GO / "wrong-leaf-ca-true.pem": "a CA certificate",
    PY / "wrong-leaf-ca-true.pem": "a CA certificate",
    GO / "wrong-leaf-cert-sign.pem": "sign certificates",
    PY / "wrong-leaf-cert-sign.pem": "sign certificates",
    GO / "wrong-leaf-crl-sign.pem": "sign certificates",
    PY / "wrong-leaf-crl-sign.pem": "sign certificates",
    GO / "wrong-leaf-no-digital-signature.pem": "sign certificates",
    PY / "wrong-leaf-no-digital-signature.pem": "sign certificates",
    # No SPIFFE ID, but a DNS name: for us the missing extension is what is wrong with it.
    GO / "wrong-leaf-empty-id.pem": NO_EXTENDED,
    PY / "wrong-empty-spiffe-id.pem": NO_EXTENDED,
}
"""File -> cause of the refusal by a listener that trusts none of the issuers."""

BUNDLES = {
    GO_BUNDLES / "spiffebundle/testdata/spiffebundle_valid_1.json": 1,
    GO_BUNDLES / "spiffebundle/testdata/spiffebundle_valid_2.json": 1,
    GO_BUNDLES / "spiffebundle/testdata/spiffebundle_valid_with_wit.json": 1,
    GO_BUNDLES / "spiffebundle/testdata/spiffebundle_missing_kid.json": 1,
    GO_BUNDLES / "spiffebundle/testdata/spiffebundle_multiple_x509.json": 1,  # the first counts
    GO_BUNDLES / "jwtbundle/testdata/jwks_valid_1.json": 0,
    GO_BUNDLES / "jwtbundle/testdata/jwks_valid_2.json": 0,
    GO_BUNDLES / "jwtbundle/testdata/jwks_missing_kid.json": 0,
    PY.parent / "jwks/jwks_1_ec_key.json": 0,
    PY.parent / "jwks/jwks_3_keys.json": 0,
    PY.parent / "jwks/jwks_ec_missing_x.json": 0,
    PY.parent / "jwks/jwks_missing_kid.json": 0,
}
"""File -> how many X.509 CAs it has."""

CORRUPT = (GO / "corrupt-cert.pem", GO / "not-pem", PY / "corrupted")
INTERMEDIATES = {"no-ca": "cA must be asserted", "no-key-cert-sign": "keyCertSign must be asserted"}


def _certificates(path: Path) -> list[bytes]:
    content = path.read_bytes()
    if path.suffix != ".der":
        return _BLOCK.findall(content)
    size = int.from_bytes(content[2:4], "big") + 4  # the first of the file
    return [certs.pem(x509.load_der_x509_certificate(content[:size]))]


def _middle_of_life(pem: bytes) -> float:
    leaf = x509.load_pem_x509_certificate(pem)
    return (leaf.not_valid_before_utc.timestamp() + leaf.not_valid_after_utc.timestamp()) / 2


def _peers(*authorities: bytes) -> Peers:
    trusted = tuple(x509.load_pem_x509_certificate(pem) for pem in authorities)
    trust = Trust(trusted)
    return Peers(lambda: trust)


def _cause(peers: Peers, leaf: bytes, chain: bytes = b"", now: float = certs.NOW) -> str:
    with pytest.raises(AuthError) as caught:
        peers(certs.context(leaf, chain), now)
    assert caught.value.reason is Reason.PEER_CERTIFICATE_INVALID
    return caught.value.cause


def test_vectors_good_chains_are_accepted_and_broken_ones_refused() -> None:
    accepted = 0
    for path, (spiffe_id, pin) in CHAINS.items():
        leaf, issuer = _certificates(path)
        now = _middle_of_life(leaf)
        peer = _peers(issuer)(certs.context(leaf), now)
        assert (peer.spiffe_id, set(peer.paths)) == (spiffe_id, {pin})
        accepted += 1
        assert NO_ISSUER in _cause(_peers(certs.ca().pem), leaf, issuer, now)
        der = bytearray(
            x509.load_pem_x509_certificate(leaf).public_bytes(serialization.Encoding.DER)
        )
        der[-1] ^= 1
        forged = certs.pem(x509.load_der_x509_certificate(bytes(der)))
        assert NO_ISSUER in _cause(_peers(issuer), forged, b"", now)
    assert accepted == 2


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.name)
def test_vectors_leaf_is_refused_for_its_own_fault(path: Path) -> None:
    leaf = _certificates(path)[0]
    assert LEAVES[path] in _cause(_peers(certs.ca().pem), leaf, now=_middle_of_life(leaf))


def test_vectors_all_leaves_are_there() -> None:
    found = {*GO.glob("*leaf*"), *PY.glob("*leaf*")}
    assert found <= {*LEAVES, *CHAINS}


def test_vectors_bundles_have_their_cas_and_the_rest_is_refused() -> None:
    """X509-SVID section 6.2. The certificates in PEM there are no CAs."""
    found = {path: len(read_bundle(path.read_bytes())) for path in BUNDLES}
    assert found == BUNDLES
    bad = {*GO_BUNDLES.glob("*/testdata/*"), *PY.parent.glob("x509-bundle-certs/*")} - {*BUNDLES}
    assert len(bad) == 16
    for path in bad:
        with pytest.raises(ValueError):  # noqa: PT011 - each has a fault of its own
            read_bundle(path.read_bytes())


@pytest.mark.parametrize("path", CORRUPT, ids=lambda path: path.name)
def test_vectors_corrupt_file_is_invalid(path: Path) -> None:
    _cause(_peers(certs.ca().pem), path.read_bytes())


@pytest.mark.parametrize("folder", [GO, PY], ids=["go", "py"])
@pytest.mark.parametrize("fault", INTERMEDIATES)
def test_vectors_wrong_intermediate_issues_nothing_even_as_an_anchor(
    folder: Path, fault: str
) -> None:
    pems = _certificates(folder / f"wrong-intermediate-{fault}.pem")
    leaf, intermediate = (x509.load_pem_x509_certificate(pem) for pem in pems)
    with pytest.raises(VerificationError, match=INTERMEDIATES[fault]):
        _Anchor("pin", [intermediate]).path(leaf, [], _middle_of_life(pems[0]))
    with pytest.raises(ValueError, match="not a CA certificate"):
        read_authorities(pems[1])
