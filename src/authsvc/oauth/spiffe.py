"""SPIFFE IDs: what a name of a workload may look like (SPIFFE-ID standard, section 2)."""

import re
from dataclasses import dataclass

SPIFFE_ID_BYTES_MAX = 2048
TRUST_DOMAIN_BYTES_MAX = 255

# ASCII by its character classes: `\w` and flags would let other scripts in.
_SPIFFE_ID = re.compile(r"spiffe://([a-z0-9._-]+)((?:/[A-Za-z0-9._-]+)*)")


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A SPIFFE ID in its parts; `str()` gives the URI back, byte for byte."""

    trust_domain: str
    path: str
    """Starts with a slash; empty where the ID names the trust domain itself."""

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}{self.path}"


def parse(text: str) -> SpiffeId:
    """The SPIFFE ID that `text` is; ValueError where it is none (SPIFFE-ID sections 2.1 to 2.3).

    Nothing is normalised: an ID has one spelling, so that comparing strings compares identities.
    """
    if len(text) > SPIFFE_ID_BYTES_MAX:
        raise ValueError(f"a SPIFFE ID has at most {SPIFFE_ID_BYTES_MAX} bytes")
    found = _SPIFFE_ID.fullmatch(text)
    if found is None:
        raise ValueError("not a SPIFFE ID: spiffe://trust-domain/path with a-z 0-9 . - _ is")
    trust_domain, path = found.groups()
    if len(trust_domain) > TRUST_DOMAIN_BYTES_MAX:
        raise ValueError(f"a trust domain has at most {TRUST_DOMAIN_BYTES_MAX} bytes")
    if not {".", ".."}.isdisjoint(path.split("/")):
        raise ValueError("the path of a SPIFFE ID has no '.' and '..' segments")
    return SpiffeId(trust_domain, path)


def parse_workload(text: str) -> SpiffeId:
    """A SPIFFE ID that may stand in a leaf certificate: it has a path (X509-SVID section 5.2)."""
    spiffe_id = parse(text)
    if not spiffe_id.path:
        raise ValueError("the SPIFFE ID of a workload has a path")
    return spiffe_id


def check_trust_domain(name: str) -> None:
    """ValueError where `name` is no trust domain (SPIFFE-ID section 2.1)."""
    if parse(f"spiffe://{name}").path:
        raise ValueError("a trust domain has no path")
