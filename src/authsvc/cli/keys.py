"""Commands about signing keys."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from authsvc.cli.calls import (
    ALL,
    Comment,
    DryRun,
    Limit,
    Session,
    Yes,
    carefully,
    connected,
    more,
    time_of,
)
from authsvc.cli.output import Column, Failure, command

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
    for step in (show, prepare, activate, retire, taint):
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


def show(session: Session, kid: Kid) -> None:
    """Show a signing key: its state, and since when."""
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    method = KeyServiceStub(session.channel).ListSigningKeys
    found = session.pages(method, keys_pb2.ListSigningKeysRequest(), "signing_keys", ALL)
    for key in found.signing_keys:
        if key.kid == kid:
            if session.out.json:
                return session.out.document({"signing_key": key})
            return session.out.pairs(_pairs(session, key))
    raise Failure("no such signing key", code="NOT_FOUND", reason="SIGNING_KEY_NOT_FOUND")


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
    comment: Comment = "",
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Declare a key stolen: all its tokens are dead, for good, and another key signs.

    Tells first what would be, and asks; --yes does not.
    """
    from authsvc_client.v1 import keys_pb2
    from authsvc_client.v1.keys_pb2_grpc import KeyServiceStub

    def tell(answer: Any, rehearsal: bool) -> None:
        signs = answer.current_signing_key.kid or "a key that is made then"
        _answer(session, answer, ("would sign" if rehearsal else "signs now", signs))
        if not rehearsal and not answer.revision:
            session.out.note("It was tainted before.")
        else:
            would = "would be" if rehearsal else "is"
            session.out.note(f"Every token of it {would} dead.")

    carefully(
        session,
        KeyServiceStub(session.channel).TaintSigningKey,
        keys_pb2.TaintSigningKeyRequest(kid=kid, comment=comment),
        tell,
        f"Taint the signing key {kid}?",
        dry_run=dry_run,
        yes=yes,
    )


def _answer(session: Session, answer: Any, *also: tuple[str, str]) -> None:
    if session.out.json:
        return session.out.document(answer)
    pairs = _pairs(session, answer.signing_key)
    return session.out.pairs((*pairs, *also, ("revision", answer.revision or "")))


def _pairs(session: Session, key: "keys_pb2.SigningKey") -> list[tuple[str, object]]:
    times = ("create_time", "ready_time", "activate_time", "retire_time", "taint_time")
    names = ("made", "ready", "signed from", "retired", "tainted")
    return [
        ("kid", key.kid),
        ("state", _state(key)),
        ("alg", key.alg),
        *((n, time_of(key, time, session.now)) for n, time in zip(names, times, strict=True)),
    ]


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
