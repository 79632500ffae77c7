"""Commands about tokens."""

import base64
import binascii
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from authsvc.cli.calls import (
    Scopes,
    Session,
    client_secret,
    connected,
    seconds,
    secret_of_stdin,
    words,
)
from authsvc.cli.output import Exit, Failure, Output, command, moment, reporting

tokens = typer.Typer(no_args_is_help=True, help="Tokens: issue, validate, inspect, revoke.")

WHY = {
    "GRANT_REVOKED": "its grant is dead",
    "INSUFFICIENT_SCOPE": "it lacks a scope",
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


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(tokens, connected)(issue)
    command(tokens, connected)(validate)
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
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the access token alone.")
    ] = False,
) -> None:
    """Issue an access token for a client itself (client_credentials).

    The client authenticates by its certificate (--as NAME, or --cert and --key) or its secret.
    """
    from authsvc_client.v1 import auth_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    request = auth_pb2.IssueTokenRequest(
        client_credentials=auth_pb2.ClientCredentialsGrant(),
        client_id=client_id,
        scopes=words(scope),
        resources=words(resource),
    )
    if secret := client_secret(client_secret_stdin):
        request.client_credential.client_secret = secret
    answer = session.call(AuthServiceStub(session.channel).IssueToken, request)
    out, token = session.out, answer.token
    if out.json:
        return out.document(answer)
    if quiet:
        return out.raw(token.access_token)
    out.pairs(
        (
            ("scopes", list(token.scopes)),
            ("audiences", list(token.audiences)),
            ("expires", moment(seconds(token.expire_time), session.now)),
            ("type", token.token_type),
            ("jti", token.jti),
        )
    )
    return out.pairs([("access_token", token.access_token)])


def validate(
    session: Session,
    token: Token = STDIN,
    audience: Annotated[
        str,
        typer.Option(
            metavar="RESOURCE_ID",
            help="Expected audience.",
            show_default="any that the caller may validate",
        ),
    ] = "",
    scope: Scopes = None,
    presenter_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Certificate of whom the token came from, in PEM."),
    ] = None,
    require_bound: Annotated[
        bool, typer.Option("--require-bound", help="Refuse a token that is bound to none.")
    ] = False,
    claims: Annotated[bool, typer.Option("--claims", help="Tell its claims too.")] = False,
) -> None:
    """Ask the server whether a token is active; exit code 7 where it is not."""
    from authsvc_client.v1 import auth_pb2
    from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

    request = auth_pb2.ValidateTokenRequest(
        token=_token(token),
        audience=audience,
        required_scopes=words(scope),
        require_bound=require_bound,
        view=auth_pb2.TOKEN_VIEW_CLAIMS if claims else auth_pb2.TOKEN_VIEW_VERDICT,
    )
    if presenter_cert is not None:
        request.presenter.certificate_thumbprint = _thumbprint(presenter_cert)
    answer = session.call(AuthServiceStub(session.channel).ValidateToken, request)
    out = session.out
    if out.json:
        out.document(answer)
    elif answer.active:
        out.title("active", "bold green")
        told = _claims(answer.claims, session.now) if claims else []
        out.pairs([*told, ("revision", answer.revision)])
    else:
        name = _reason(answer.reason)
        out.title(f"not active: {WHY.get(name, name)}", "bold red")
        out.pairs(
            (
                ("reason", name if answer.reason else ""),
                ("missing scopes", list(answer.missing_scopes)),
                ("revision", answer.revision or ""),
            )
        )
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


def _reason(number: int) -> str:
    from authsvc_client.v1 import error_reason_pb2

    try:
        name = error_reason_pb2.ErrorReason.Name(error_reason_pb2.ErrorReason.ValueType(number))
    except ValueError:  # of a newer server
        return str(number)
    return name.removeprefix("ERROR_REASON_")


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
        ("expires", moment(seconds(claims.expire_time), now)),
        ("issued", moment(seconds(claims.issue_time), now)),
        ("issuer", claims.issuer),
        ("jti", claims.jti),
        ("certificate", claims.certificate_thumbprint),
        ("jwk", claims.jwk_thumbprint),
        ("grant", claims.grant_id),
        ("session", claims.session_id),
        ("acr", claims.acr),
        ("root jti", claims.root_jti),
    ]
    if claims.HasField("auth_time"):
        found.append(("authenticated", moment(seconds(claims.auth_time), now)))
    if claims.HasField("actor"):
        found.append(("actor", claims.actor.subject))
    return found
