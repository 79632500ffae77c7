"""The certificates of the listeners, and whom they take."""

import shlex
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from authsvc.config import Settings
from authsvc.doctor.finding import Report
from authsvc.doctor.ports import is_loopback
from authsvc.rpc.peer import (
    Authorities,
    certificate_validity,
    check_pair,
    read_authorities,
    read_bundle,
    read_certificates,
    spki_sha256,
)
from authsvc.rpc.tls import ServerTls

DAY_S = 24 * 3600.0
SOON_S = 30 * DAY_S
"""Less left than this, or than a third of its life, and it is time for another certificate."""
NAMES, EXTENDED_USAGE = "2.5.29.17", "2.5.29.37"  # RFC 5280 sections 4.2.1.6 and 4.2.1.12
SERVER_AUTH = "1.3.6.1.5.5.7.3.1"


def look(settings: Settings, report: Report, now: float) -> None:
    """The listener's certificate and key, the CAs it takes, and those of its own PKI."""
    tls, directory = settings.tls, settings.state_dir / "pki"
    own = tls.certificate is None or tls.key is None or tls.client_ca is None
    if own and not (directory / "server.pem").exists():
        report.skipped("certificate", directory, "not there yet: authsvc serve makes it")
        _bundles(settings, report, now)
        return
    files = (
        (directory / "server.pem", directory / "server-key.pem", directory / "ca.pem")
        if tls.certificate is None or tls.key is None or tls.client_ca is None
        else (tls.certificate, tls.key, tls.client_ca)
    )
    renew = "authsvc serve makes another one by itself; is it running?" if own else _ANOTHER
    _certificate(files[0], settings, report, now, renew)
    with report.running("key", files[1], "give certificate and key that belong together"):
        try:
            check_pair(files[0].read_bytes(), files[1].read_bytes())
        except ValueError as error:
            report.problem("key", files[1], _told(error), "give the key of the certificate")
        else:
            report.ok("key", files[1], "is the one of the certificate")
    client_cas = _authorities("client_ca", files[2], report, now)
    _admin_ca(settings, client_cas, files[2], report)
    empty = _bundles(settings, report, now)
    if own:
        _issued(directory, report, now)
    if not report.has_problems():
        bundles = {name: file for name, file in tls.bundles.items() if name not in empty}
        try:
            ServerTls(*files, bundles)
        except ValueError as error:
            report.problem("together", files[2], _told(error), "each CA belongs in one file alone")
        else:
            report.ok("together", files[2], "the listener takes all of these")


_ANOTHER = "have another one issued, and put it in the place of this one"


def _certificate(file: Path, settings: Settings, report: Report, now: float, renew: str) -> None:
    with report.running("certificate", file, "give the chain of the server in PEM, leaf first"):
        try:
            chain = read_certificates(file.read_bytes())
            for below, above in pairwise(chain):
                _require_issued(below, above)
        except ValueError as error:
            advice = (
                "give the chain of the server in PEM: its certificate first, then who issued it"
            )
            report.problem("certificate", file, _told(error), advice)
            return
        usages = _extension(chain[0], EXTENDED_USAGE)
        if usages is not None and SERVER_AUTH not in {usage.dotted_string for usage in usages}:
            found = "extendedKeyUsage lacks serverAuth: clients refuse it"
            report.problem("certificate", file, found, "have one issued for servers")
        else:
            report.ok("certificate", file, f"a chain of {len(chain)}")
        for certificate in chain:
            _end("certificate_end", file, certificate, report, now, renew)
        _names(file, chain[0], settings, report)


def _require_issued(below: Any, above: Any) -> None:
    try:
        below.verify_directly_issued_by(above)
    except Exception as error:  # the signature, the names, or a key that cannot sign
        subject = above.subject.rfc4514_string()
        raise ValueError(
            f"the chain is broken: {subject!r} did not issue the one before"
        ) from error


def _names(file: Path, certificate: Any, settings: Settings, report: Report) -> None:
    """A client looks for the name it dialled; a name of the network cannot be known here."""
    names = [str(name.value) for name in _extension(certificate, NAMES) or ()]
    listen, host = settings.listen, settings.listen.host
    advice = f"have one issued for the name that clients use, or for {host}"
    if not names:
        found = "no subjectAltName: no client can tell that it is this server's"
        report.problem("names", file, found, advice)
    elif all(name.startswith("spiffe:") for name in names):
        found = f"only {', '.join(names)}: clients that look for a DNS name refuse it"
        report.warning("names", file, found, advice)
    elif set(names) <= {"localhost", "127.0.0.1", "::1"} | {
        name for name in names if name.startswith("spiffe:")
    } and not is_loopback(listen.host):
        found = f"{', '.join(names)}: callers on other machines refuse it, and it listens on {host}"
        report.warning("names", file, found, advice)
    else:
        report.ok("names", file, ", ".join(names))


def _authorities(check: str, file: Path, report: Report, now: float) -> Authorities:
    with report.running(check, file, "give the CAs of the clients in PEM"):
        try:
            found = read_authorities(file.read_bytes())
        except ValueError as error:
            report.problem(check, file, _told(error), "give CA certificates in PEM, and no others")
            return ()
        told = "; ".join(f"{_subject(ca)}, pin {spki_sha256(ca)}" for ca in found)
        report.ok(check, file, told)
        for ca in found:
            advice = "put the next CA beside it, and have its clients' certificates issued anew"
            _end(f"{check}_end", file, ca, report, now, advice)
        return found
    return ()


def _admin_ca(settings: Settings, cas: Authorities, file: Path, report: Report) -> None:
    pins = {spki_sha256(ca) for ca in cas}
    which = f"set admin_ca to the pin of the administrators' CA: {' or '.join(sorted(pins))}"
    if not pins:
        report.skipped("admin_ca", file, "there is no client CA that can be read")
    elif settings.admin_ca and settings.admin_ca not in pins:
        found = "is none of the client CAs: nobody is an administrator"
        report.problem("admin_ca", settings.admin_ca, found, which)
    elif not settings.admin_ca and len(pins) > 1:
        found = f"not set, with {len(pins)} client CAs: nobody is an administrator"
        report.problem("admin_ca", file, found, which)
    else:
        report.ok("admin_ca", file, settings.admin_ca or "the only client CA")


def _bundles(settings: Settings, report: Report, now: float) -> set[str]:
    """Trust domains without any CA."""
    empty = set()
    for domain, file in settings.tls.bundles.items():
        check, advice = f"bundle {domain}", "what writes this file must write it whole"
        with report.running(check, file, advice):
            try:
                found = read_bundle(file.read_bytes())
            except ValueError as error:
                report.problem(check, file, _told(error), advice)
                continue
            if not found:
                empty.add(domain)
                text = "no CA: nobody of this trust domain gets in"
                report.warning(check, file, text, "nothing, if that is meant; or write its CAs")
                continue
            report.ok(check, file, f"CAs: {len(found)}")
            for ca in found:
                _end(f"{check} end", file, ca, report, now, "fetch the bundle anew")
    return empty


def _issued(directory: Path, report: Report, now: float) -> None:
    """What else the own PKI issued."""
    for file in sorted(directory.glob("*.pem")):
        name = file.stem
        if name.endswith("-key") or name in ("ca", "server"):
            continue
        renew = f"authsvc pki issue {shlex.quote(name)}"
        if name == "admin":
            renew = "authsvc serve makes another one by itself; is it running?"
        with report.running(f"pki {name}", file, renew):
            (certificate, *_) = read_certificates(file.read_bytes())
            _end(f"pki {name}", file, certificate, report, now, renew)


def _end(check: str, file: Path, certificate: Any, report: Report, now: float, advice: str) -> None:
    life = certificate_validity(certificate)
    left, whole = life.not_after - now, life.not_after - life.not_before
    what = f"{_subject(certificate)}: " if certificate.subject.rfc4514_string() else ""
    if now < life.not_before:
        found = f"{what}not valid before {_when(life.not_before)}"
        report.problem(check, file, found, f"is the clock of this machine right? else {advice}")
    elif left <= 0:
        report.problem(check, file, f"{what}ended at {_when(life.not_after)}", advice)
    elif left < min(SOON_S, whole / 3):
        report.warning(check, file, f"{what}ends at {_when(life.not_after)}", advice)
    else:
        report.ok(check, file, f"{what}ends at {_when(life.not_after)}")


def _extension(certificate: Any, oid: str) -> Any:
    for extension in certificate.extensions:
        if extension.oid.dotted_string == oid:
            return extension.value
    return None


def _subject(certificate: Any) -> str:
    return certificate.subject.rfc4514_string() or "no subject"


def _told(error: ValueError) -> str:
    """Texts of ours; those of a parser speak of what it met."""
    text = str(error)
    return text if text.isprintable() and len(text) < 300 else type(error).__name__


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
