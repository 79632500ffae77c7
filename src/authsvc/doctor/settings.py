"""Settings that are valid, and yet not what one wants."""

from urllib.parse import urlsplit

from authsvc.config import Settings
from authsvc.doctor.finding import Report
from authsvc.doctor.ports import is_loopback

ISSUER = str(Settings.model_fields["issuer"].default)


def look(settings: Settings, report: Report) -> None:
    """What is left to choose before others rely on it."""
    listen = settings.listen
    public = not is_loopback(listen.host) or (listen.tls_only and not is_loopback(listen.tls_host))
    own_pki = settings.tls.certificate is None
    issuer, host = settings.issuer, urlsplit(settings.issuer).hostname
    if not host:
        found = "names no host"
        report.problem("issuer", issuer, found, "set AUTHSVC_ISSUER to an https URL of yours")
    elif issuer == ISSUER and public:
        advice = "set AUTHSVC_ISSUER before tokens are issued: changing it ends all of them"
        report.warning("issuer", issuer, "the default, on a server for other machines", advice)
    elif issuer.endswith("/"):
        advice = "leave it away before tokens are issued: changing the issuer ends all of them"
        report.warning("issuer", issuer, "ends in a slash, which others forget", advice)
    else:
        report.ok("issuer", issuer, "an https URL")
    if own_pki and public:
        advice = "set tls.certificate, tls.key and tls.client_ca"
        found = "the development PKI, on a server for other machines"
        report.warning("trust_domain", settings.trust_domain, found, advice)
    else:
        found = "of the development PKI" if own_pki else "not used: there is no own PKI"
        report.ok("trust_domain", settings.trust_domain, found)
    _admins(settings, report, own_pki=own_pki)
    if settings.grants.password:
        advice = "turn it off once people log in another way (RFC 9700 section 2.4)"
        report.warning("grants.password", "grants.password", "the password grant is on", advice)
    else:
        report.ok("grants.password", "grants.password", "the password grant is off")
    for name, keys in (("seal_keys", settings.seal_keys), ("refresh_keys", settings.refresh_keys)):
        if keys is not None or settings.database.url is None:
            report.ok(name, name, "set" if keys is not None else "made in the state directory")
        elif settings.database.url.get_secret_value().startswith("sqlite"):
            report.ok(name, name, "made in the state directory")
        else:
            found = "made in the state directory: each machine has another"
            advice = f"set AUTHSVC_{name.upper()}_FILE on all that use this database, to the same"
            report.warning(name, name, found, advice)


def _admins(settings: Settings, report: Report, *, own_pki: bool) -> None:
    admins = list(settings.admins)
    if own_pki:
        admins.append(f"spiffe://{settings.trust_domain}/admin")
    if admins:
        report.ok("admins", "admins", ", ".join(admins))
    else:
        found = "there are none: nobody approves a first client"
        report.problem("admins", "admins", found, "set AUTHSVC_ADMINS to your SPIFFE ID")
