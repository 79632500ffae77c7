"""Commands about signing keys."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from authsvc.cli.calls import ALL, Limit, Session, connected, more, time_of
from authsvc.cli.output import Column, command

if TYPE_CHECKING:  # what is heavy is imported where it is used: `--help` does not wait for it
    from authsvc_client.v1 import keys_pb2

keys = typer.Typer(no_args_is_help=True, help="Signing keys: what tokens are signed with.")
STYLES = {"NEXT": "yellow", "CURRENT": "green", "TAINTED": "red"}


class Algorithm(StrEnum):
    """Algorithms of a signing key (RFC 7518 section 3.1)."""

    ES256 = "ES256"
    RS256 = "RS256"
    PS256 = "PS256"
    EDDSA = "EdDSA"


Kid = Annotated[str, typer.Argument(metavar="KID", help="Id of the key, the `kid` of its tokens.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(keys, connected, name="list")(list_keys)
    for step in (prepare, activate, retire, taint):
        command(keys, connected)(step)
    app.add_typer(keys, name="key")


def list_keys(session: Session, limit: Limit = ALL) -> None:
    """List signing keys, the newest first."""
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    out, method = session.out, KeyServiceStub(session.channel).ListSigningKeys
    found = session.pages(method, keys_pb2.ListSigningKeysRequest(), "signing_keys", limit)
    if out.json:
        return out.document(found)
    columns = [Column("KID", is_id=True), Column("STATE", is_id=True), Column("ALG", is_id=True)]
    out.table(
        [*columns, Column("MADE"), Column("SINCE")],
        [
            (
                key.kid,
                _state(key),
                key.alg,
                time_of(key, "create_time", session.now),
                _since(key, session.now),
            )
            for key in found.signing_keys
        ],
    )
    return more(session, found.next_page_token)


def prepare(
    session: Session,
    alg: Annotated[
        Algorithm | None,
        typer.Option(
            metavar="ALG",
            help=f"Its algorithm: {', '.join(Algorithm)}.",
            show_default="the server's setting",
        ),
    ] = None,
) -> None:
    """Make the next key and publish it; once every validator knows it, it may sign."""
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    method = KeyServiceStub(session.channel).PrepareSigningKey
    answer = session.call(method, keys_pb2.PrepareSigningKeyRequest(alg=alg.value if alg else ""))
    _answer(session, answer)
    session.out.steps(f"authsvc key activate {answer.signing_key.kid}")


def activate(session: Session, kid: Kid) -> None:
    """Let the next key sign; tokens of the key before it live out their time."""
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    method = KeyServiceStub(session.channel).ActivateSigningKey
    _answer(session, session.call(method, keys_pb2.ActivateSigningKeyRequest(kid=kid)))


def retire(session: Session, kid: Kid) -> None:
    """Take the next key back before it signs."""
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    method = KeyServiceStub(session.channel).RetireSigningKey
    _answer(session, session.call(method, keys_pb2.RetireSigningKeyRequest(kid=kid)))


def taint(
    session: Session,
    kid: Kid,
    comment: Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the audit.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be; change nothing.")
    ] = False,
) -> None:
    """Declare a key stolen: all its tokens are dead, for good, and another key signs."""
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    request = keys_pb2.TaintSigningKeyRequest(kid=kid, comment=comment, validate_only=dry_run)
    answer = session.call(KeyServiceStub(session.channel).TaintSigningKey, request)
    signs = answer.current_signing_key.kid or "a key that is made then"
    _answer(session, answer, ("signs now" if not dry_run else "would sign", signs))
    if dry_run:
        session.out.note("Nothing was changed.")
    elif answer.revision:
        session.out.note("Every token of it is dead.")
    else:
        session.out.note("It was tainted before.")


def _answer(session: Session, answer: Any, *also: tuple[str, str]) -> None:
    if session.out.json:
        return session.out.document(answer)
    key: keys_pb2.SigningKey = answer.signing_key
    times = ("create_time", "ready_time", "activate_time", "retire_time", "taint_time")
    names = ("made", "ready", "signed from", "retired", "tainted")
    return session.out.pairs(
        (
            ("kid", key.kid),
            ("state", _state(key)),
            ("alg", key.alg),
            *((n, time_of(key, time, session.now)) for n, time in zip(names, times, strict=True)),
            *also,
            ("revision", answer.revision or ""),
        )
    )


def _since(key: "keys_pb2.SigningKey", now: float) -> str:
    """Since when it is what it is."""
    for field in ("taint_time", "retire_time", "activate_time"):
        if key.HasField(field):
            return time_of(key, field, now)
    return time_of(key, "create_time", now)


def _state(key: "keys_pb2.SigningKey") -> Text:
    from authsvc_client.v1 import keys_pb2

    try:
        name = keys_pb2.SigningKeyState.Name(key.state).removeprefix("SIGNING_KEY_STATE_")
    except ValueError:  # of a newer server
        name = str(key.state)
    return Text(name.lower(), STYLES.get(name, ""))
