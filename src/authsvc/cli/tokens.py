"""Commands about tokens."""

import base64
import binascii
import json
import sys
from enum import StrEnum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from authsvc.cli.calls import (
    Scopes,
    Session,
    client_secret,
    connected,
    named,
    password_of,
    seconds,
    secret_in,
    secret_of_stdin,
    span,
    time_of,
    words,
)
from authsvc.cli.output import Column, Exit, Failure, Output, command, moment, reporting

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from authsvc_client.v1 import auth_pb2, explain_pb2

tokens = typer.Typer(no_args_is_help=True, help="Tokens: issue, validate, explain, revoke.")

WHY = {
    "GRANT_REVOKED": "its grant is dead",
    "INSUFFICIENT_PERMISSIONS": "its subject lacks a permission",
    "INSUFFICIENT_SCOPE": "it lacks a scope",
    "INSUFFICIENT_USER_AUTHENTICATION": "its person must authenticate again, or better",
    "PROOF_MISMATCH": "it is bound to another certificate than that of the presenter",
    "PROOF_MISSING": "it is bound to a certificate: name the presenter's, --presenter-cert FILE",
    "SESSION_ENDED": "the login session is over",
    "TOKEN_AUDIENCE_WRONG": "it is for another audience",
    "TOKEN_CUT_OFF": "it was made before its client or subject was cut off",
    "TOKEN_EXPIRED": "it is past its end",
    "TOKEN_ISSUER_WRONG": "another issuer made it",
    "TOKEN_KEY_TAINTED": "its signing key is tainted",
    "TOKEN_KEY_UNKNOWN": "its signing key is none of this server",
    "TOKEN_MALFORMED": "it is no token of authsvc",
    "TOKEN_NOT_BOUND": "it is not bound to a certificate",
    "TOKEN_NOT_YET_VALID": "it is not valid yet",
    "TOKEN_REVOKED": "it was revoked",
    "TOKEN_SIGNATURE_INVALID": "its signature does not hold",
    "TOKEN_TYPE_WRONG": "it is another kind of token",
    "UNSPECIFIED": "the caller may not validate tokens for this audience, and so not know why",
}
"""Reasons of a verdict, for people."""

MARKS = {"PASSED": ("✓", "green"), "FAILED": ("✗", "bold red"), "NOT_REACHED": ("-", "dim")}
"""Outcomes of a check."""
FIRST_PARTY = (
    "The grant password is for first parties only: it shows a person's password to the client"
    " (RFC 9700 section 2.4)."
)

STDIN = "-"
Token = Annotated[
    str,
    typer.Argument(
        metavar="TOKEN",
        show_default=False,
        help="The token; - or nothing: from standard input, which is better: other users of the"
        " machine see arguments.",
    ),
]
SecretStdin = Annotated[
    bool,
    typer.Option(
        "--client-secret-stdin",
        help="Authenticate by the client's secret, from standard input; or set"
        " AUTHSVC_CLIENT_SECRET or AUTHSVC_CLIENT_SECRET_FILE. Never an argument.",
    ),
]
Audience = Annotated[
    str,
    typer.Option(
        metavar="RESOURCE_ID",
        help="Expected audience.",
        show_default="any that the caller may validate",
    ),
]
Permissions = Annotated[
    list[str] | None,
    typer.Option(
        "--permission",
        metavar="NAME",
        help="Permission that its subject must hold on the audience, now; may be repeated.",
    ),
]
AcrValues = Annotated[
    list[str] | None,
    typer.Option(
        "--acr",
        metavar="ACR",
        help="Level of authentication that does; may be repeated: any of them.",
    ),
]
MaxAge = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="Longest time since its person authenticated: 300, 12h."),
]
PresenterCert = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Certificate of whom the token came from, in PEM."),
]
RequireBound = Annotated[
    bool, typer.Option("--require-bound", help="Refuse a token that is bound to none.")
]


class View(StrEnum):
    """How much of a verdict is wanted."""

    VERDICT = auto()
    CLAIMS = auto()
    FULL = auto()


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(tokens, connected)(issue)
    command(tokens, connected)(validate)
    command(tokens, connected)(explain)
    command(tokens, reporting)(inspect)
    command(tokens, connected)(revoke)
    app.add_typer(tokens, name="token")


def issue(
    session: Session,
    client_id: Annotated[
        str,
        typer.Option(envvar="AUTHSVC_CLIENT_ID", metavar="ID", help="The client that asks."),
    ],
    scope: Scopes = None,
    resource: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RESOURCE_ID",
            help="Audience; may be repeated.",
            show_default="the owners of the scopes",
        ),
    ] = None,
    client_secret_stdin: SecretStdin = False,
    user: Annotated[
        str,
        typer.Option(
            metavar="USERNAME",
            help="For this person, by a password (grant password): first parties only.",
        ),
    ] = "",
    password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with that password; - for standard input.",
            show_default="asked for, or standard input",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the access token alone.")
    ] = False,
) -> None:
    """Issue an access token for a client itself (client_credentials), or for a person (--user).

    The client authenticates by its certificate (--as NAME, or --cert and --key) or its secret.
    """
    from authsvc_client.v1 import auth_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    request = auth_pb2.IssueTokenRequest(
        client_id=client_id, scopes=words(scope), resources=words(resource)
    )
    if password_file is not None and not user:
        raise Failure("--password-file goes with --user")
    by_stdin = str(password_file or STDIN) == STDIN
    if user and client_secret_stdin and by_stdin and not sys.stdin.isatty():
        raise Failure(
            "standard input cannot hold both the password and the secret", "--password-file FILE"
        )
    if secret := client_secret(client_secret_stdin):
        request.client_credential.client_secret = secret
    if user:
        session.out.note(FIRST_PARTY, "yellow")
        request.password.username = user
        request.password.password = password_of(password_file)
    else:
        request.client_credentials.SetInParent()
    answer = session.call(AuthServiceStub(session.channel).IssueToken, request)
    out, token = session.out, answer.token
    if out.json:
        return out.document(answer)
    if quiet:
        return out.raw(token.access_token)
    return out.pairs(
        (
            ("scopes", list(token.scopes)),
            ("audiences", list(token.audiences)),
            ("expires", moment(seconds(token.expire_time), session.now)),
            ("type", token.token_type),
            ("jti", token.jti),
            ("access_token", token.access_token),
            ("refresh_token", token.refresh_token),
        )
    )


def validate(
    session: Session,
    token: Token = STDIN,
    audience: Audience = "",
    scope: Scopes = None,
    permission: Permissions = None,
    acr: AcrValues = None,
    max_age: MaxAge = None,
    presenter_cert: PresenterCert = None,
    require_bound: RequireBound = False,
    claims: Annotated[bool, typer.Option("--claims", help="As --view claims.")] = False,
    view: Annotated[
        View | None,
        typer.Option(
            metavar="VIEW",
            help="What to tell: verdict; claims, with its claims; full, with the permissions of its"
            " subject too.",
            show_default="verdict",
        ),
    ] = None,
) -> None:
    """Ask the server whether a token is active; exit code 7 where it is not."""
    from authsvc_client.v1 import auth_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    wanted = view or (View.CLAIMS if claims else View.VERDICT)
    request = _question(
        _token(token), audience, scope, permission, acr, max_age, presenter_cert, require_bound
    )
    request.view = auth_pb2.TokenView.Value(f"TOKEN_VIEW_{wanted.name}")
    answer = session.call(AuthServiceStub(session.channel).ValidateToken, request)
    out = session.out
    if out.json:
        out.document(answer)
    elif answer.active:
        out.title("active", "bold green")
        told = _claims(answer.claims, session.now) if wanted is not View.VERDICT else []
        if wanted is View.FULL:
            told.append(("permissions now", list(answer.permissions) or "none"))
        out.pairs([*told, ("revision", answer.revision)])
    else:
        name = _reason(answer.reason)
        out.title(f"not active: {WHY.get(name, name)}", "bold red")
        out.pairs(
            (
                ("reason", name if answer.reason else ""),
                ("missing scopes", list(answer.missing_scopes)),
                ("missing permissions", list(answer.missing_permissions)),
                ("step up", answer.step_up_challenge.www_authenticate),
                ("revision", answer.revision or ""),
            )
        )
    if not answer.active:
        raise typer.Exit(Exit.NOT_ACTIVE)


def explain(
    session: Session,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            show_default="standard input",
            help="File with the token; - for standard input. The token itself is no argument.",
        ),
    ] = Path(STDIN),
    audience: Audience = "",
    scope: Scopes = None,
    permission: Permissions = None,
    acr: AcrValues = None,
    max_age: MaxAge = None,
    presenter_cert: PresenterCert = None,
    require_bound: RequireBound = False,
    as_client: Annotated[
        str,
        typer.Option(
            metavar="CLIENT_ID",
            help="Judge as for this client, which asks.",
            show_default="for one that may know all",
        ),
    ] = "",
) -> None:
    """Tell what a token is, each check of it, and what killed it; exit code 7 if it is not active.

    Access tokens, refresh tokens and API keys; for administrators.
    """
    from authsvc_client.v1 import explain_pb2
    from authsvc_client.v1.explain_pb2_grpc import ExplainServiceStub

    try:
        token = secret_in(file, "Token")
    except (OSError, UnicodeDecodeError) as error:  # its name may be a token
        hint = "the token itself is no argument: other users of the machine see those"
        raise Failure("FILE cannot be read", hint, code="NOT_FOUND") from error
    request = explain_pb2.ExplainTokenRequest(
        question=_question(
            token, audience, scope, permission, acr, max_age, presenter_cert, require_bound
        ),
        caller_client_id=as_client,
    )
    answer = session.call(ExplainServiceStub(session.channel).ExplainToken, request)
    if session.out.json:
        session.out.document(answer)
    else:
        _explained(session, answer)
    if not answer.active:
        raise typer.Exit(Exit.NOT_ACTIVE)


def inspect(out: Output, token: Token = STDIN) -> None:
    """Show what a token says, WITHOUT verifying it: anyone can write such a token."""
    from authsvc.clock import SystemClock

    parts = _token(token).split(".")
    try:
        if len(parts) != 3:
            raise ValueError
        header, claims = (_part(part) for part in parts[:2])
    except (ValueError, RecursionError) as error:
        raise Failure(
            "this is no JWT", "a token of authsvc has three parts with dots between"
        ) from error
    if out.json:
        return out.document({"verified": False, "header": header, "claims": claims})
    out.title("NOT VERIFIED: anyone can write this. Ask the server: authsvc token validate", "red")
    now = SystemClock().wall()
    for name, part in (("header", header), ("claims", claims)):
        out.title(name)
        out.pairs((key, _value(key, value, now)) for key, value in part.items())
    return None


def revoke(
    session: Session,
    token: Token = STDIN,
    jti: Annotated[
        str,
        typer.Option(metavar="JTI", help="Revoke by this identity instead; administrators only."),
    ] = "",
    client_id: Annotated[
        str,
        typer.Option(
            metavar="ID",
            help="Client of the token, where its secret authenticates it.",
            envvar="AUTHSVC_CLIENT_ID",
        ),
    ] = "",
    client_secret_stdin: SecretStdin = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would die; change nothing.")
    ] = False,
) -> None:
    """Revoke a token: as its client (--as NAME), or by --jti as an administrator.

    When it answers the token is dead for good. One that is unknown, forged or expired is fine too.
    """
    from authsvc_client.v1 import auth_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    if jti and token != STDIN:
        raise Failure("TOKEN and --jti exclude each other")
    if client_secret_stdin and not jti and token == STDIN:
        raise Failure(
            "standard input cannot hold both the token and the secret",
            "set AUTHSVC_CLIENT_SECRET_FILE",
        )
    if jti:
        request = auth_pb2.RevokeTokenRequest(jti=jti, validate_only=dry_run)
    else:
        request = auth_pb2.RevokeTokenRequest(token=_token(token), validate_only=dry_run)
        secret = client_secret(client_secret_stdin)
        if secret or client_id:
            request.client_id = client_id
        if secret:
            request.client_credential.client_secret = secret
    answer = session.call(AuthServiceStub(session.channel).RevokeToken, request)
    out = session.out
    if out.json:
        return out.document(answer)
    if not answer.revoked:
        return out.title("nothing to revoke: the token is unknown, forged or expired")
    out.title("would be revoked" if dry_run else "revoked", "bold")
    return out.pairs(
        (
            ("jti", [each.id for each in answer.revoked]),
            ("revision", answer.revision or ""),
        )
    )


def _token(argument: str) -> str:
    return secret_of_stdin("Token") if argument == STDIN else argument.strip()


def _question(
    token: str,
    audience: str,
    scope: list[str] | None,
    permission: list[str] | None,
    acr: list[str] | None,
    max_age: str | None,
    presenter_cert: Path | None,
    require_bound: bool,
) -> "auth_pb2.ValidateTokenRequest":
    """What the options ask of a token."""
    from google.protobuf.duration_pb2 import Duration

    from authsvc_client.v1 import auth_pb2

    request = auth_pb2.ValidateTokenRequest(
        token=token,
        audience=audience,
        required_scopes=words(scope),
        required_permissions=words(permission),
        acr_values=words(acr),
        max_age=None if max_age is None else Duration(seconds=span(max_age, "--max-age")),
        require_bound=require_bound,
    )
    if presenter_cert is not None:
        request.presenter.certificate_thumbprint = _thumbprint(presenter_cert)
    return request


def _explained(session: Session, answer: "explain_pb2.ExplainTokenResponse") -> None:
    from authsvc_client.v1 import auth_pb2, explain_pb2, resources_pb2

    out, now = session.out, session.now
    kind = named(explain_pb2.TokenKind, answer.kind, "TOKEN_KIND_").lower().replace("_", " ")
    form = named(resources_pb2.TokenFormat, answer.format, "TOKEN_FORMAT_")
    out.pairs(
        (
            ("kind", kind if answer.kind else "none of authsvc's"),
            ("form", form if answer.format else ""),
            ("judged", time_of(answer, "check_time", now)),
            ("by revision", answer.revision),
        )
    )
    if answer.HasField("claims"):
        passed = explain_pb2.CHECK_OUTCOME_PASSED
        if any(each.name == "signature" and each.outcome == passed for each in answer.checks):
            out.title("claims")
        else:
            out.title("claims, NOT VERIFIED: anyone can write these", "red")
        out.pairs(_claims(answer.claims, now))
    if answer.checks:
        out.title("checks")
        columns = [Column("", is_id=True), Column("CHECK", is_id=True), Column("REASON")]
        rows = [(*_check(check), check.detail) for check in answer.checks]
        out.table([*columns, Column("DETAIL")], rows)
    for marker in answer.markers:
        name = named(auth_pb2.MarkerKind, marker.kind, "MARKER_KIND_")
        event = marker.audit_event
        out.title(f"killed by {name}", "bold red")
        out.pairs(
            (
                ("of", list(marker.ids)),
                ("when", time_of(marker, "create_time", now)),
                ("revision", marker.revision),
                ("by whom", event.actor or ("" if marker.HasField("audit_event") else "not known")),
                ("for", event.on_behalf_of),
                ("from", " ".join(filter(None, (event.peer, event.address)))),
                ("action", event.action),
                ("why", event.comment),
            )
        )
    if answer.active:
        return out.title("active", "bold green")
    name = _reason(answer.reason)
    why = f" ({WHY[name]})" if name in WHY else ""
    return out.title(f"not active: {name}{why}", "bold red")


def _check(check: "explain_pb2.TokenCheck") -> tuple[Text, Text, str]:
    """Mark, name and reason of a check."""
    from authsvc_client.v1 import explain_pb2

    outcome = named(explain_pb2.CheckOutcome, check.outcome, "CHECK_OUTCOME_")
    mark, style = MARKS.get(outcome, (outcome, ""))
    reason = _reason(check.reason) if check.reason else ""
    return Text(mark, style), Text(check.name, style), reason


def _reason(number: int) -> str:
    from authsvc_client.v1.error_reason_pb2 import ErrorReason

    return named(ErrorReason, number, "ERROR_REASON_")


def _thumbprint(file: Path) -> str:
    """`x5t#S256` (RFC 8705 section 3.1) of a certificate."""
    from authsvc import pki
    from authsvc.rpc.peer import x5t_s256

    try:
        return x5t_s256(pki.read(file))
    except ValueError as error:
        raise Failure(str(error)) from error


def _part(text: str) -> dict[str, Any]:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError from error
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise ValueError
    return found


def _value(key: str, value: Any, now: float) -> object:
    if key in ("exp", "iat", "nbf", "auth_time") and isinstance(value, (int, float)):
        return Text(moment(value, now))
    if isinstance(value, str):
        return value.split() if key == "scope" else value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    return json.dumps(value, ensure_ascii=False)


def _claims(claims: Any, now: float) -> list[tuple[str, object]]:
    """Claims that the server vouches for."""
    found: list[tuple[str, object]] = [
        ("subject", claims.subject),
        ("client_id", claims.client_id),
        ("scopes", list(claims.scopes)),
        ("audiences", list(claims.audiences)),
        ("expires", time_of(claims, "expire_time", now)),
        ("issued", time_of(claims, "issue_time", now)),
        ("issuer", claims.issuer),
        ("jti", claims.jti),
        ("rev", claims.revision or ""),
        ("certificate", claims.certificate_thumbprint),
        ("jwk", claims.jwk_thumbprint),
        ("grant", claims.grant_id),
        ("session", claims.session_id),
        ("acr", claims.acr),
        ("amr", list(claims.amr)),
        ("root jti", claims.root_jti),
        ("may act", claims.may_act),
        ("authenticated", time_of(claims, "auth_time", now)),
        ("actor", claims.actor.subject if claims.HasField("actor") else ""),
    ]
    if claims.permissions_revision:
        frozen = list(claims.permissions) or "none"
        found += (("frozen permissions", frozen), ("of revision", claims.permissions_revision))
    return found
