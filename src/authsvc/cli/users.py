"""Commands about users."""

import sys
from enum import StrEnum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from authsvc.cli.calls import (
    ALL,
    Limit,
    Session,
    connected,
    more,
    named,
    password_of,
    secret_in,
    span,
    time_of,
)
from authsvc.cli.output import Column, Failure, command
from authsvc.cli.user_import import import_users

if TYPE_CHECKING:  # all else is imported where it is used: `--help` does not wait for it
    from authsvc_client.v1 import users_pb2

users = typer.Typer(no_args_is_help=True, help="Users: people, and their passwords.")

STYLES = {"ACTIVE": "green", "DISABLED": "red"}


class State(StrEnum):
    """States of a user, to filter by."""

    ACTIVE = auto()
    DISABLED = auto()


UserId = Annotated[
    str,
    typer.Argument(
        metavar="USER_ID", help="Id of the user, the `sub` of its tokens; not its name."
    ),
]
DisplayName = Annotated[
    str | None, typer.Option("--display-name", metavar="TEXT", help="Name for people.")
]
Email = Annotated[str | None, typer.Option("--email", metavar="ADDRESS", help="Mail address.")]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        metavar="FILE",
        help="File with the password, in one line; - for standard input.",
        show_default="asked for, or standard input",
    ),
]
Comment = Annotated[str, typer.Option(metavar="TEXT", help="Why; kept in the audit.")]
Etag = Annotated[
    str,
    typer.Option(
        metavar="ETAG", help="Only if the user is still as `user show` told with this etag."
    ),
]
STDIN = Path("-")


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(users, connected)(create)
    command(users, connected, name="import")(import_users)
    command(users, connected, name="list")(list_users)
    for step in (show, update, disable, enable, delete):
        command(users, connected)(step)
    command(users, connected, name="set-password")(set_password)
    command(users, connected, name="reset-code")(reset_code)
    command(users, connected, name="reset-password")(reset_password)
    app.add_typer(users, name="user")


def create(
    session: Session,
    username: Annotated[
        str, typer.Argument(metavar="USERNAME", help="What it logs in with; not its id.")
    ],
    display_name: DisplayName = None,
    email: Email = None,
    password: Annotated[
        bool,
        typer.Option("--password", help="Ask for its password, or read it from standard input."),
    ] = False,
    password_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with its password; - for standard input."),
    ] = None,
    request_id: Annotated[
        str,
        typer.Option(
            metavar="ID",
            help="8 to 64 of A-Z a-z 0-9 _ -; the same one again answers the same user.",
        ),
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the id alone.")] = False,
) -> None:
    """Create a user, who has no password unless one is asked for or read; never an argument."""
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    given = password or password_file is not None
    user = users_pb2.User(username=username, display_name=display_name or "", email=email or "")
    answer = session.call(
        UserServiceStub(session.channel).CreateUser,
        users_pb2.CreateUserRequest(
            user=user,
            password=password_of(password_file, new=True) if given else "",
            request_id=request_id,
        ),
    )
    if quiet and not session.out.json:
        return session.out.raw(answer.user.user_id)
    return _answer(session, answer)


def list_users(
    session: Session,
    username: Annotated[
        str, typer.Option(metavar="USERNAME", help="Only the user of this name, in any case.")
    ] = "",
    email: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Only users with this mail address, in any case.")
    ] = "",
    state: Annotated[
        State | None,
        typer.Option(metavar="STATE", help=f"Only users in this state: {', '.join(State)}."),
    ] = None,
    limit: Limit = ALL,
) -> None:
    """List users, in the order of their ids."""
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    out, method = session.out, UserServiceStub(session.channel).ListUsers
    request = users_pb2.ListUsersRequest(username=username, email=email)
    if state is not None:
        request.state = users_pb2.UserState.Value(f"USER_STATE_{state.name}")
    found = session.pages(method, request, "users", limit)
    if out.json:
        return out.document(found)
    if not found.users:
        return out.note("no users" if state is None else f"no {state} users")
    columns = [Column("USER ID", is_id=True), Column("USERNAME", is_id=True), Column("NAME")]
    columns += [Column("EMAIL"), Column("STATE", is_id=True), Column("CREATED")]
    out.table(
        columns,
        [
            (
                user.user_id,
                user.username,
                user.display_name,
                user.email,
                _state(user),
                time_of(user, "create_time", session.now),
            )
            for user in found.users
        ],
    )
    return more(session, found.next_page_token)


def show(session: Session, user_id: UserId) -> None:
    """Show all that there is about a user; never its password."""
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    method = UserServiceStub(session.channel).GetUser
    _answer(session, session.call(method, users_pb2.GetUserRequest(user_id=user_id)))


def update(
    session: Session,
    user_id: UserId,
    username: Annotated[
        str | None, typer.Option(metavar="USERNAME", help="What it logs in with.")
    ] = None,
    display_name: DisplayName = None,
    email: Email = None,
    etag: Etag = "",
) -> None:
    """Change what the options name, and nothing else; an empty value takes it away."""
    from google.protobuf.field_mask_pb2 import FieldMask

    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    options = {"username": username, "display_name": display_name, "email": email}
    given: dict[str, Any] = {field: value for field, value in options.items() if value is not None}
    if not given:
        raise Failure("nothing to change", "authsvc user update --help tells what there is")
    answer = session.call(
        UserServiceStub(session.channel).UpdateUser,
        users_pb2.UpdateUserRequest(
            user=users_pb2.User(user_id=user_id, etag=etag, **given),
            update_mask=FieldMask(paths=list(given)),
        ),
    )
    _answer(session, answer)


def disable(session: Session, user_id: UserId, comment: Comment = "", etag: Etag = "") -> None:
    """Stop a user: its sessions and grants end, and every token that it has is dead."""
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    request = users_pb2.DisableUserRequest(user_id=user_id, comment=comment, etag=etag)
    _answer(session, session.call(UserServiceStub(session.channel).DisableUser, request))
    session.out.note("Its sessions and grants ended; every token that it had is dead.")


def enable(session: Session, user_id: UserId, comment: Comment = "", etag: Etag = "") -> None:
    """Let a disabled user in again; what it had before stays dead."""
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    request = users_pb2.EnableUserRequest(user_id=user_id, comment=comment, etag=etag)
    _answer(session, session.call(UserServiceStub(session.channel).EnableUser, request))


def delete(
    session: Session,
    user_id: UserId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    etag: Etag = "",
) -> None:
    """Delete a user for good, and kill every token that it has."""
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    stub = UserServiceStub(session.channel)
    if not yes:
        if not sys.stdin.isatty():
            raise Failure("this is for good", "--yes says that you mean it")
        user = session.call(stub.GetUser, users_pb2.GetUserRequest(user_id=user_id)).user
        etag = etag or user.etag
        session.out.pairs((("username", user.username), ("name", user.display_name)))
        typer.confirm("Delete this user for good?", abort=True, err=True)
    answer = session.call(stub.DeleteUser, users_pb2.DeleteUserRequest(user_id=user_id, etag=etag))
    if session.out.json:
        return session.out.document(answer)
    session.out.pairs((("user_id", user_id), ("revision", answer.revision)))
    return session.out.note("Its sessions and grants ended; every token that it had is dead.")


def set_password(
    session: Session,
    user_id: Annotated[
        str,
        typer.Argument(metavar="USER_ID", help="Whose.", show_default="that of --token"),
    ] = "",
    password_file: PasswordFile = None,
    token: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="As the user itself: file with its access token. Asks for its current password.",
        ),
    ] = None,
    current_password_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with that password; - for standard input, before the new one.",
            show_default="asked for, or standard input",
        ),
    ] = None,
    keep_session: Annotated[
        bool,
        typer.Option(
            "--keep-session", help="With --token: its session lives on, and first parties in it."
        ),
    ] = False,
) -> None:
    """Set a password: the user's sessions end, and so do the grants of third parties.

    Administrators set that of anybody; the user itself its own, with --token.
    """
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    if token is None and not user_id:
        raise Failure("USER_ID is missing", "or --token FILE, as the user itself")
    if token is None and (keep_session or current_password_file is not None):
        raise Failure("--keep-session and --current-password-file go with --token")
    request = users_pb2.SetPasswordRequest(user_id=user_id, keep_session=keep_session)
    method: Any = UserServiceStub(session.channel).SetPassword
    if token is not None:
        bearer = f"Bearer {secret_in(token, 'Access token')}"
        method = partial(method, metadata=(("authorization", bearer),))
        request.current_password = password_of(current_password_file, "Current password")
    request.new_password = password_of(password_file, "New password", new=True)
    answer = session.call(method, request)
    _password_set(session, answer, kept=keep_session)


def reset_code(
    session: Session,
    user_id: UserId,
    lifetime: Annotated[
        str, typer.Option(metavar="SPAN", help="How long it is good: 1m to 24h.")
    ] = "1h",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the code alone.")] = False,
) -> None:
    """Make a code that lets its bearer set the user's password once; it is shown once, here."""
    from google.protobuf.duration_pb2 import Duration

    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    request = users_pb2.CreatePasswordResetCodeRequest(
        user_id=user_id, lifetime=Duration(seconds=span(lifetime, "--lifetime"))
    )
    answer = session.call(UserServiceStub(session.channel).CreatePasswordResetCode, request)
    out = session.out
    if out.json:
        return out.document(answer)
    if quiet:
        return out.raw(answer.code)
    out.pairs(
        (
            ("user_id", user_id),
            ("good until", time_of(answer, "expire_time", session.now)),
            ("code", Text(answer.code, "bold")),
        )
    )
    out.note("Shown this once: code. A code from before is dead.", "yellow")
    return out.steps("authsvc user reset-password")


def reset_password(
    session: Session,
    code_file: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="File with the code; - for standard input, before the password.",
            show_default="asked for, or standard input",
        ),
    ] = STDIN,
    password_file: PasswordFile = None,
) -> None:
    """Set a password by a code; all the user's sessions end, and so do the grants of third parties.

    What standard input holds is one line each: the code, then the new password.
    """
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    request = users_pb2.ResetPasswordRequest(
        code=secret_in(code_file, "Code"),
        new_password=password_of(password_file, "New password", new=True),
    )
    answer = session.call(UserServiceStub(session.channel).ResetPassword, request)
    _password_set(session, answer)


def _password_set(session: Session, answer: Any, *, kept: bool = False) -> None:
    if session.out.json:
        return session.out.document(answer)
    session.out.pairs((("revision", answer.revision),))
    others = "other sessions" if kept else "sessions"
    return session.out.note(
        f"The password is set. The user's {others} and the grants of third parties ended."
    )


def _answer(session: Session, answer: Any) -> None:
    """Of any call that answers a user."""
    if session.out.json:
        return session.out.document(answer)
    user: users_pb2.User = answer.user
    return session.out.pairs(
        (
            ("user_id", user.user_id),
            ("username", user.username),
            ("name", user.display_name),
            ("email", user.email),
            ("state", _state(user)),
            ("password set", time_of(user, "password_set_time", session.now) or "never"),
            ("created", time_of(user, "create_time", session.now)),
            ("updated", time_of(user, "update_time", session.now)),
            ("etag", user.etag),
            ("revision", getattr(answer, "revision", "")),
        )
    )


def _state(user: "users_pb2.User") -> Text:
    from authsvc_client.v1 import users_pb2

    name = named(users_pb2.UserState, user.state, "USER_STATE_")
    return Text(name.lower(), STYLES.get(name, ""))
