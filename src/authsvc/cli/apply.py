"""Commands that make a server what files declare, and write such files: apply, export."""

import hashlib
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from authsvc.apply import (
    APPROVED,
    EXPIRED,
    FIELDS,
    PENDING,
    SETS,
    Assignment,
    Change,
    ClientKey,
    Current,
    Declared,
    Difference,
    Fields,
    Found,
    Kind,
    Plan,
    Problem,
    Refused,
    Step,
    Type,
    Value,
    Verb,
    assignment_name,
    bearers,
    defaults,
    key_of,
    needs_secret,
    permission_name,
    plan,
)
from authsvc.cli.calls import ALL, Session, connected, named
from authsvc.cli.declared import ENUMS, choices, dump, read, written
from authsvc.cli.output import Exit, Failure, command, explained

# What is heavy is imported where it is used: `--help` does not wait for it.
CHANGES: Final = 2
"""Exit code of --dry-run where there is something to do."""
SHOWN: Final = 20
"""Most of what is not listed, of a kind."""
TEXT_MAX: Final = 64
"""Longer texts are told by their length and digest."""
COMMENT: Final = "authsvc apply"
_MEANWHILE: Final = frozenset({"ETAG_MISMATCH", "ALREADY_EXISTS", "CLIENT_STATE_CONFLICT"})
_RENAMED: Final = {"owner": "owner_client_id"}
"""Fields that hold the name of a client where the contract has its id."""


def register(app: typer.Typer) -> None:
    """Adds the commands to the root."""
    command(app, connected, name="apply")(apply)
    command(app, connected, name="export")(export)


def apply(
    session: Session,
    file: Annotated[
        Path,
        typer.Option(
            "--file", "-f", metavar="DIR", help="Directory with *.yaml or *.yml, or one such file."
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Apply without asking.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Tell the difference alone: exit code 0 if there is none, else 2."
        ),
    ] = False,
    secrets_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the secret (NAME.secret) and the registration access token (NAME.token) of"
            " each new client go, in files that only you can read; else nobody gets them.",
        ),
    ] = None,
) -> None:
    """Make resources, permissions, clients, roles and assignments what files declare.

    It tells the difference, asks, and makes it; what is not listed is told, and never deleted. A
    field that is left out has its default. A run that was stopped is finished by running again.
    """
    out = session.out
    if out.json and not (yes or dry_run):
        raise Failure("--json asks nobody", "add --yes, or --dry-run")
    server = _Server(session)
    try:
        declared = read(file)
        found = plan(declared, server.current(declared))
    except Refused as refused:
        raise _broken(refused) from refused
    secrets = _Secrets(secrets_dir, found.steps)
    document = _shown(session, server, found)
    if dry_run:
        if secrets.missing:
            out.note(f"to apply it: --secrets-dir, for the secret of {secrets.missing}")
        if out.json:
            out.document({**document, "applied": 0})
        raise typer.Exit(CHANGES if found.steps else Exit.OK)
    if secrets.missing:
        raise _failed(
            f"client {secrets.missing} needs a secret, and nobody would get it",
            "--secrets-dir DIR puts it into a file there",
        )
    if found.steps and not yes:
        _ask()
    secrets.make()
    _Execution(session, found, secrets).run()
    if out.json:
        out.document({**document, "applied": len(found.steps)})
    elif found.steps:
        out.note(f"applied: {_summary(found.changes, 'created', 'changed')}", "green")
        if secrets.written:
            out.note(f"{secrets.written} files in {secrets.directory}, for their clients alone")


def _ask() -> None:
    if not sys.stdin.isatty():
        raise _failed("nobody is there to be asked", "--yes applies without asking")
    if not typer.confirm("Apply?", err=True):
        raise _failed("not applied: nothing was changed", "")


def _failed(message: str, hint: str, **more: Any) -> Failure:
    """Ends with 1: --dry-run has another meaning for USAGE."""
    failure = Failure(message, hint, code="FAILED_PRECONDITION", **more)
    failure.exit = Exit.FAILED
    return failure


def _broken(refused: Refused) -> Failure:
    problems = sorted(refused.problems, key=_by_line)
    what = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return _failed(f"{what}, nothing was changed", "", violations=problems)


def _by_line(problem: Problem) -> tuple[str, int]:
    file, _, line = problem.place.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.place, 0)


class _Server:
    """Reads what is there, each kind once."""

    def __init__(self, session: Session) -> None:
        from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
        from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub
        from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub
        from authsvc_client.v1.users_pb2_grpc import UserServiceStub

        self._session = session
        self._resources = ResourceServiceStub(session.channel)
        self._clients = ClientServiceStub(session.channel)
        self._roles = RoleServiceStub(session.channel)
        self._users = UserServiceStub(session.channel)
        self._usernames: dict[str, str] = {}

    def current(self, declared: Sequence[Declared] = ()) -> Current:
        """All that can be declared, and the users that are named there."""
        from authsvc_client.v1 import clients_pb2, resources_pb2, roles_pb2

        pages = self._session.pages
        resources = pages(
            self._resources.ListResources, resources_pb2.ListResourcesRequest(), "resources", ALL
        ).resources
        clients = pages(
            self._clients.ListClients, clients_pb2.ListClientsRequest(), "clients", ALL
        ).clients
        permissions = pages(
            self._roles.ListPermissions, roles_pb2.ListPermissionsRequest(), "permissions", ALL
        ).permissions
        roles = pages(self._roles.ListRoles, roles_pb2.ListRolesRequest(), "roles", ALL).roles
        assignments = pages(
            self._roles.ListRoleAssignments,
            roles_pb2.ListRoleAssignmentsRequest(),
            "role_assignments",
            ALL,
        ).role_assignments
        found = [_client(each) for each in clients]
        waits = declared and any(each.state in (PENDING, EXPIRED) for each in found)
        named_users = {str(each.fields["user"]) for each in declared if "user" in each.fields}
        return Current(
            resources={
                each.resource_id: Found(_fields(Kind.RESOURCE, each), each.etag)
                for each in resources
            },
            permissions={
                (each.ref.resource_id, each.ref.name): each.description for each in permissions
            },
            clients=found,
            roles={each.role_id: Found(_fields(Kind.ROLE, each), each.etag) for each in roles},
            assignments=frozenset(map(_assignment, assignments)),
            users={
                name: user_id for name in sorted(named_users) if (user_id := self._user_id(name))
            },
            me=self._me() if waits else "",
            now_ns=int(self._session.now * 10**9),
        )

    def _me(self) -> str:
        """What the server calls who calls: the registrant of a client that is not registered."""
        from authsvc_client.v1 import auth_pb2, clients_pb2
        from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

        metadata = clients_pb2.ClientMetadata(client_name=COMMENT)
        request = auth_pb2.RegisterClientRequest(metadata=metadata, validate_only=True)
        method = AuthServiceStub(self._session.channel).RegisterClient
        registrant: str = self._session.call(method, request).client.registrant
        return registrant

    def _user_id(self, username: str) -> str:
        from authsvc_client.v1 import users_pb2

        request = users_pb2.ListUsersRequest(username=username, page_size=1)
        users = self._session.call(self._users.ListUsers, request).users
        return users[0].user_id if users else ""

    def username(self, user_id: str) -> str:
        """Its id where it is gone."""
        from authsvc_client import AuthsvcError
        from authsvc_client.v1 import users_pb2

        if user_id not in self._usernames:
            request = users_pb2.GetUserRequest(user_id=user_id)
            try:
                user = self._session.call(self._users.GetUser, request).user
            except AuthsvcError as error:
                if error.reason_name != "USER_NOT_FOUND":
                    raise
                return user_id
            self._usernames[user_id] = user.username
        return self._usernames[user_id]


def _client(message: Any) -> Found:
    from authsvc_client.v1 import clients_pb2

    ends = message.approval_expire_time
    return Found(
        {
            **_fields(Kind.CLIENT, message.metadata),
            "approval_expire_time": (
                ends.ToNanoseconds() if message.HasField("approval_expire_time") else None
            ),
        },
        etag=message.etag,
        client_id=message.client_id,
        state=named(clients_pb2.ClientState, message.state, "CLIENT_STATE_").lower(),
        registrant=message.registrant,
        was_reviewed=message.HasField("review_time"),
    )


def _assignment(message: Any) -> Assignment:
    client = ClientKey("client_id", message.client_id) if message.client_id else None
    return Assignment(message.role_id, client, message.user_id, message.resource_id)


def _fields(kind: Kind, message: Any) -> Fields:
    """Of a message, as they are declared."""
    return {
        name: _value(type_, message, _RENAMED.get(name, name))
        for name, type_ in FIELDS[kind].items()
        if type_ is not Type.MOMENT
    }


def _value(type_: Type, message: Any, name: str) -> Value:
    value = getattr(message, name)
    if type_ is Type.SPAN:
        return int(value.seconds) if message.HasField(name) else None
    if type_ is Type.SCOPES:
        return tuple(sorted((each.name, each.description) for each in value))
    if type_ is Type.PERMISSIONS:
        return tuple(sorted((each.resource_id, each.name) for each in value))
    if type_ in ENUMS:
        names = {number: name for name, number in choices(type_).items()}
        if type_ is Type.TOKEN_FORMAT:
            return names.get(value, str(value))
        return tuple(sorted(names.get(each, str(each)) for each in value))
    if type_ is Type.NAMES:
        return tuple(sorted(value))
    return tuple(value) if type_ is Type.TEXTS else value


# --- the difference ---


def _shown(session: Session, server: _Server, found: Plan) -> dict[str, Any]:
    """Tells a plan to a person; answers it for a program."""
    out, names = session.out, found.client_names
    others: dict[Kind, list[str]] = defaultdict(list)
    for kind, name in found.not_listed:
        others[kind].append(name)
    held = found.not_listed_assignments
    for each in held if out.json else held[:SHOWN]:
        if each.client is not None:
            holder = f"client {names.get(each.client, each.client.value)}"
        else:
            holder = f"user {server.username(each.user_id)}"
        others[Kind.ASSIGNMENT].append(assignment_name(each, holder))
    if out.json:
        return {
            "changes": [_document(change, names) for change in found.changes],
            "left": [left._asdict() for left in found.left],
            "not_listed": [
                {"kind": kind, "name": name} for kind, each in others.items() for name in each
            ],
        }
    for change in found.changes:
        sign, style = ("+", "green") if change.is_new else ("~", "yellow")
        note = f"  ({'; '.join(change.notes)})" if change.notes else ""
        out.title(f"{sign} {change.kind:<10}  {change.name}{note}", style)
        for difference in change.fields:
            if change.is_new and difference.field == "client_name":
                continue  # told already
            out.title(f"      {_told(difference, names, is_new=change.is_new)}", "")
    for left in found.left:
        out.title(f"! {left.kind:<10}  {left.name}: {left.text}", "red")
    if others:
        out.title("not listed, left alone:", "dim")
    counts = Counter({kind: len(each) for kind, each in others.items()})
    counts[Kind.ASSIGNMENT] = len(held)
    for kind, told in others.items():
        for name in told[:SHOWN]:
            out.title(f"  {kind:<10}  {name}", "dim")
        if counts[kind] > SHOWN:
            out.title(f"  {kind:<10}  and {counts[kind] - SHOWN} more", "dim")
    if not found.steps:
        out.note("nothing to do" + (", but for what is told with !" if found.left else ""))
    else:
        out.note(_summary(found.changes, "to create", "to change"))
    return {}


def _summary(changes: Sequence[Change], created: str, changed: str) -> str:
    new = sum(change.is_new for change in changes)
    return f"{new} {created}, {len(changes) - new} {changed}"


def _told(each: Difference, names: Mapping[ClientKey, str], *, is_new: bool) -> str:
    """One field, for a person."""
    new = _text(each.type, each.new, names)
    if is_new:
        return f"{each.field}: {new}"
    if each.type not in SETS:
        return f"{each.field}: {_text(each.type, each.old, names)} -> {new}"
    old_items, new_items = (_items(each.type, value) for value in (each.old, each.new))
    signed = [f"+ {item}" for item in new_items if item not in old_items]
    signed += [f"- {item}" for item in old_items if item not in new_items]
    return f"{each.field}: {', '.join(signed)}"


def _text(type_: Type, value: Value, names: Mapping[ClientKey, str]) -> str:
    if isinstance(value, ClientKey):
        return names[value]
    if value in ("", None, ()):
        return "(none)"
    if isinstance(value, tuple):
        return ", ".join(_items(type_, value))
    text = str(value).lower() if type_ is Type.FLAG else str(written(type_, value))
    if len(text) <= TEXT_MAX:
        return text
    return f"{len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _items(type_: Type, value: Value) -> list[str]:
    assert isinstance(value, tuple)
    if type_ is Type.SCOPES:
        return [f"{name} ({text})" if text else name for name, text in value]
    if type_ is Type.PERMISSIONS:
        return [permission_name(key) for key in value]
    return list(value)


def _document(change: Change, names: Mapping[ClientKey, str]) -> dict[str, Any]:
    def plain(type_: Type, value: Value) -> Any:
        if isinstance(value, ClientKey):
            return names[value]
        return None if value is None else written(type_, value)

    return {
        "action": "create" if change.is_new else "change",
        "kind": change.kind,
        "name": change.name,
        "fields": [
            {"field": name, "old": plain(type_, old), "new": plain(type_, new)}
            for name, type_, old, new in change.fields
        ],
        "notes": list(change.notes),
    }


# --- what is done ---


class _Secrets:
    """Where secrets go: files that nobody else reads, and that are never overwritten."""

    def __init__(self, directory: Path | None, steps: Sequence[Step]) -> None:
        """Raises Failure where a file is there already that a new client would need."""
        self.directory = directory
        self.written = 0
        self.missing = ""
        """A client whose secret would go nowhere."""
        self._names: dict[ClientKey, str] = {}
        self.had: set[ClientKey] = set()
        """Clients whose secret a stopped run wrote."""
        verbs = (Verb.CREATE, Verb.RENEW_SECRET)
        clients = [step for step in steps if step.kind is Kind.CLIENT and step.verb in verbs]
        shared = Counter(map(_slug, clients))
        for step in clients:
            name, is_new = _slug(step), step.verb is Verb.CREATE
            if shared[name] > 1 or name != step.fields["client_name"]:
                name += "-" + hashlib.sha256(repr(tuple(step.key)).encode()).hexdigest()[:8]
            self._names[step.key] = name
            if directory is None:
                if not is_new or needs_secret(step.fields):
                    self.missing = self.missing or step.name
            elif is_new:
                for file in (self._file(step.key, "secret"), self._file(step.key, "token")):
                    if file.exists():
                        raise _failed(f"{file} is there already", "move it away, or another DIR")
            elif self._file(step.key, "secret").exists():
                self.had.add(step.key)

    def make(self) -> None:
        """Makes the directory."""
        if self.directory is not None:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, key: ClientKey, kind: str, text: str) -> None:
        """Keeps one; nowhere without a directory."""
        if self.directory is None or not text:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(self._file(key, kind), flags, 0o600), "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.written += 1

    def _file(self, key: ClientKey, kind: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{self._names[key]}.{kind}"


def _slug(step: Step) -> str:
    """A name of a client as the name of a file."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", str(step.fields["client_name"])).strip("-.")
    return slug[:64] or "client"


class _Execution:
    """Takes the steps of a plan, one after the other."""

    def __init__(self, session: Session, found: Plan, secrets: _Secrets) -> None:
        from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
        from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
        from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub
        from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub

        self._session = session
        self._auth = AuthServiceStub(session.channel)
        self._clients = ClientServiceStub(session.channel)
        self._resources = ResourceServiceStub(session.channel)
        self._roles = RoleServiceStub(session.channel)
        self._plan = found
        self._secrets = secrets
        self._ids = dict(found.client_ids)
        self._etags: dict[tuple[Kind, Any], str] = {}
        self._let_in: set[ClientKey] = set()
        """New clients whom the server's policy let in at once."""

    def run(self) -> None:
        """Raises Failure that tells how far it came."""
        steps = self._plan.steps
        with self._session.out.progress("applying", len(steps)) as advance:
            for done, step in enumerate(steps):
                try:
                    self._take(step)
                except Exception as error:
                    raise _stopped(step, error, done, len(steps)) from error
                advance(done + 1, step.name)

    def _take(self, step: Step) -> None:
        takes = {
            Kind.RESOURCE: self._resource,
            Kind.PERMISSION: self._permission,
            Kind.CLIENT: self._client,
            Kind.ROLE: self._role,
            Kind.ASSIGNMENT: self._assign,
        }
        takes[step.kind](step)

    def _etag(self, step: Step) -> str:
        return self._etags.get((step.kind, step.key), step.etag)

    def _resource(self, step: Step) -> None:
        from google.protobuf.field_mask_pb2 import FieldMask

        from authsvc_client.v1 import resources_pb2

        resource = resources_pb2.Resource(resource_id=step.key)
        paths = self._fill(resource, step)
        if step.verb is Verb.CREATE:
            create = resources_pb2.CreateResourceRequest(resource=resource)
            answer = self._session.call(self._resources.CreateResource, create)
        else:
            resource.etag = self._etag(step)
            update = resources_pb2.UpdateResourceRequest(
                resource=resource, update_mask=FieldMask(paths=paths)
            )
            answer = self._session.call(self._resources.UpdateResource, update)
        self._etags[step.kind, step.key] = answer.resource.etag

    def _permission(self, step: Step) -> None:
        from authsvc_client.v1 import roles_pb2

        resource_id, name = step.key
        permission = roles_pb2.Permission(
            ref=roles_pb2.PermissionRef(resource_id=resource_id, name=name),
            description=str(step.fields["description"]),
        )
        request = roles_pb2.CreatePermissionRequest(permission=permission)
        self._session.call(self._roles.CreatePermission, request)

    def _role(self, step: Step) -> None:
        from google.protobuf.field_mask_pb2 import FieldMask

        from authsvc_client.v1 import roles_pb2

        role = roles_pb2.Role(role_id=step.key)
        paths = self._fill(role, step)
        if step.verb is Verb.CREATE:
            create = roles_pb2.CreateRoleRequest(role=role)
            self._session.call(self._roles.CreateRole, create)
        else:
            role.etag = self._etag(step)
            update = roles_pb2.UpdateRoleRequest(role=role, update_mask=FieldMask(paths=paths))
            self._session.call(self._roles.UpdateRole, update)

    def _assign(self, step: Step) -> None:
        from authsvc_client.v1 import roles_pb2

        asked: Assignment = step.key
        assignment = roles_pb2.RoleAssignment(role_id=asked.role_id, resource_id=asked.resource_id)
        if asked.client is not None:
            assignment.client_id = self._ids[asked.client]
        else:
            assignment.user_id = asked.user_id
        request = roles_pb2.AssignRoleRequest(role_assignment=assignment)
        self._session.call(self._roles.AssignRole, request)

    def _client(self, step: Step) -> None:
        if step.verb is Verb.CREATE:
            return self._register(step)
        if step.verb is Verb.RENEW_SECRET:
            return self._renew_secret(step)
        if step.verb is Verb.APPROVE and step.key not in self._let_in:
            return self._approve(step)
        if step.verb is Verb.UPDATE or step.fields["approval_expire_time"] is not None:
            return self._update(step)
        return None

    def _register(self, step: Step) -> None:
        from authsvc_client.v1 import auth_pb2, clients_pb2

        metadata = clients_pb2.ClientMetadata()
        self._fill(metadata, step)
        request = auth_pb2.RegisterClientRequest(metadata=metadata)
        answer = self._session.call(self._auth.RegisterClient, request)
        # The secret last: where it is missing, the next run makes another.
        self._secrets.write(step.key, "token", answer.registration_access_token)
        self._secrets.write(step.key, "secret", answer.client_secret)
        self._ids[step.key] = answer.client.client_id
        self._etags[step.kind, step.key] = answer.client.etag
        if answer.client.state == clients_pb2.CLIENT_STATE_APPROVED:
            self._let_in.add(step.key)

    def _renew_secret(self, step: Step) -> None:
        """Of a client that a stopped run registered."""
        from authsvc_client.v1 import clients_pb2

        if step.key in self._secrets.had:
            return
        client_id = self._ids[step.key]
        get = clients_pb2.GetClientRequest(client_id=client_id)
        before = self._session.call(self._clients.GetClient, get).client
        rotate = clients_pb2.RotateClientSecretRequest(client_id=client_id)
        answer = self._session.call(self._clients.RotateClientSecret, rotate)
        self._secrets.write(step.key, "secret", answer.client_secret)
        after = self._session.call(self._clients.GetClient, get).client
        if before.etag != self._etag(step) or before.metadata != after.metadata:
            text = "the etag is not the current one"
            raise Failure(text, code="ABORTED", reason="ETAG_MISMATCH")
        self._etags[step.kind, step.key] = after.etag

    def _update(self, step: Step) -> None:
        from google.protobuf.field_mask_pb2 import FieldMask

        from authsvc_client.v1 import clients_pb2

        # A name is required in the message; it counts where the mask has it.
        client = clients_pb2.Client(client_id=self._ids[step.key], etag=self._etag(step))
        client.metadata.client_name = "-"
        fields = dict(step.fields)
        if "approval_expire_time" in fields:
            client.approval_expire_time.CopyFrom(_moment(fields.pop("approval_expire_time")))
        paths = [f"metadata.{path}" for path in self._fill(client.metadata, step, fields)]
        if len(fields) < len(step.fields):
            paths.append("approval_expire_time")
        request = clients_pb2.UpdateClientRequest(client=client, update_mask=FieldMask(paths=paths))
        answer = self._session.call(self._clients.UpdateClient, request)
        self._etags[step.kind, step.key] = answer.client.etag

    def _approve(self, step: Step) -> None:
        from authsvc_client.v1 import clients_pb2

        ends = step.fields["approval_expire_time"]
        request = clients_pb2.ApproveClientRequest(
            client_id=self._ids[step.key],
            etag=self._etag(step),
            comment=COMMENT,
            approval_expire_time=None if ends is None else _moment(ends),
        )
        answer = self._session.call(self._clients.ApproveClient, request)
        self._etags[step.kind, step.key] = answer.client.etag

    def _fill(self, message: Any, step: Step, fields: Fields | None = None) -> list[str]:
        """Sets fields of a message; answers their names there."""
        from authsvc_client.v1 import resources_pb2, roles_pb2

        paths = []
        for field, value in (step.fields if fields is None else fields).items():
            type_, name = FIELDS[step.kind][field], _RENAMED.get(field, field)
            paths.append(name)
            if isinstance(value, ClientKey):
                setattr(message, name, self._ids[value])
            elif type_ is Type.SPAN:
                if value is not None:
                    getattr(message, name).FromSeconds(value)
            elif type_ is Type.SCOPES:
                scopes = (resources_pb2.Scope(name=n, description=d) for n, d in _tuple(value))
                message.scopes.extend(scopes)
            elif type_ is Type.PERMISSIONS:
                message.permissions.extend(
                    roles_pb2.PermissionRef(resource_id=r, name=n) for r, n in _tuple(value)
                )
            elif type_ is Type.TOKEN_FORMAT:
                message.token_format = choices(type_)[str(value)]
            elif type_ in ENUMS:
                getattr(message, name).extend(choices(type_)[each] for each in _tuple(value))
            elif isinstance(value, tuple):
                getattr(message, name).extend(value)
            elif value or type_ is Type.FLAG:
                setattr(message, name, value)
        return paths


def _tuple(value: Value) -> tuple[Any, ...]:
    assert isinstance(value, tuple)
    return value


def _moment(nanoseconds: Value) -> Any:
    from google.protobuf.timestamp_pb2 import Timestamp

    moment = Timestamp()
    moment.FromNanoseconds(nanoseconds)  # type: ignore[arg-type] # of Type.MOMENT
    return moment


def _stopped(step: Step, error: Exception, done: int, steps: int) -> Failure:
    """What failed, after how much."""
    failure = explained(error)
    hint = f"{failure.hint}; then run again to finish" if failure.hint else "run again to finish"
    if failure.reason in _MEANWHILE or failure.reason.endswith("_NOT_FOUND"):
        hint = "somebody changed it meanwhile: run again, and look at what is different now"
    stopped = Failure(
        f"{step.kind} {step.name}: {failure.message}; {done} of {steps} steps were done",
        hint,
        code=failure.code,
        reason=failure.reason,
        violations=failure.violations,
        metadata=failure.metadata,
        request_id=failure.request_id,
        retry_after_s=failure.retry_after_s,
    )
    stopped.exit = failure.exit
    return stopped


# --- export ---


def export(
    session: Session,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write resources.yaml, clients.yaml, roles.yaml and assignments.yaml there.",
            show_default="one document to standard output",
        ),
    ] = None,
) -> None:
    """Write what `apply` would read: resources, clients, roles and who holds them; no secret.

    Defaults are left out, and what the server knows for itself. Users are named, not written.
    """
    server, out = _Server(session), session.out
    document = _exported(server, server.current(), out.note)
    if output is None:
        return out.document(document) if out.json else out.raw(dump(document).rstrip("\n"))
    output.mkdir(parents=True, exist_ok=True)
    for section, objects in document.items():
        file = output / f"{section}.yaml"
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_text(dump({section: objects}), encoding="utf-8")
        fresh.replace(file)
    if out.json:
        return out.document({section: len(each) for section, each in document.items()})
    counts = ", ".join(f"{len(each)} {section}" for section, each in document.items())
    return out.note(f"{output}: {counts}")


def _exported(
    server: _Server, current: Current, note: Callable[[str, str], None]
) -> dict[str, list[dict[str, Any]]]:
    """In an order that depends on nothing but what is there."""
    groups: dict[ClientKey, list[Found]] = defaultdict(list)
    for found in current.clients:
        groups[key_of(found.fields)].append(found)
    clients: list[Found] = []
    for key, group in sorted(groups.items(), key=lambda item: _client_order(item[1][0])):
        best = bearers(group)
        clients += sorted(best, key=lambda found: found.client_id)
        if len(best) > 1:
            text = f"{len(best)} clients are called {key.value}: apply cannot tell them apart"
            note(text, "yellow")
        if len(group) > len(best):
            text = f"{key.value}: left out {len(group) - len(best)} that were turned away"
            note(text, "dim")
    texts = Counter(
        text
        for found in clients
        for text in {str(found.fields["client_name"]), key_of(found.fields).value}
    )
    names = {
        found.client_id: next(
            (
                text
                for text in (str(found.fields["client_name"]), key_of(found.fields).value)
                if texts[text] == 1
            ),
            found.client_id,
        )
        for found in clients
    }
    permissions: dict[str, list[dict[str, str]]] = defaultdict(list)
    for (resource_id, name), text in sorted(current.permissions.items()):
        described = {"description": text} if text else {}
        permissions[resource_id].append({"name": name, **described})
    return {
        "resources": [
            {
                "resource_id": id_,
                **_written(Kind.RESOURCE, found.fields, names),
                **({"permissions": permissions[id_]} if permissions[id_] else {}),
            }
            for id_, found in sorted(current.resources.items())
        ],
        "clients": [
            _written(Kind.CLIENT, found.fields, names)
            | ({"state": found.state} if found.state != APPROVED else {})
            for found in clients
        ],
        "roles": [
            {"role_id": id_, **_written(Kind.ROLE, found.fields, names)}
            for id_, found in sorted(current.roles.items())
        ],
        "assignments": sorted(
            (_held(server, each, names) for each in current.assignments),
            key=lambda each: [
                each.get(name, "") for name in ("role_id", "client", "user", "resource_id")
            ],
        ),
    }


def _client_order(found: Found) -> tuple[str, str]:
    return str(found.fields["client_name"]), key_of(found.fields).value


def _written(kind: Kind, fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields that do not hold their defaults."""
    usual = {**dict.fromkeys(FIELDS[kind], ""), **defaults(kind, fields)}
    return {
        name: names.get(str(fields[name]), fields[name])
        if type_ is Type.CLIENT
        else written(type_, fields[name])
        for name, type_ in FIELDS[kind].items()
        if fields[name] is not None and fields[name] != usual[name]
    }


def _held(server: _Server, held: Assignment, names: Mapping[str, str]) -> dict[str, str]:
    if held.client is not None:
        holder = {"client": names.get(held.client.value, held.client.value)}
    else:
        holder = {"user": server.username(held.user_id)}
    where = {"resource_id": held.resource_id} if held.resource_id else {}
    return {"role_id": held.role_id, **holder, **where}
