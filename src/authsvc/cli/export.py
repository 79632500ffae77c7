"""What is there, read for `apply`, and written for it: export."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from authsvc.apply import (
    APPROVED,
    ENDS,
    FIELDS,
    SETS,
    Assignment,
    ClientKey,
    Current,
    Fields,
    Found,
    Kind,
    Type,
    Value,
    defaults,
    key_of,
    names_of,
)
from authsvc.cli.calls import ALL, Session, connected, named
from authsvc.cli.declared import ENUMS, PAIRS, WIRE_NAMES, dump, enum_of, moment, written
from authsvc.cli.output import command


def register(app: typer.Typer) -> None:
    """Adds the command to the root."""
    command(app, connected, name="export")(export)


def current(session: Session, usernames: Iterable[str] = ()) -> Current:
    """All that can be declared, each kind of list read once; of users only those who are named."""
    from authsvc_client.v1 import clients_pb2, resources_pb2, roles_pb2, users_pb2
    from authsvc_client.v1.clients_pb2_grpc import ClientServiceStub
    from authsvc_client.v1.resources_pb2_grpc import ResourceServiceStub
    from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    clients, roles = ClientServiceStub(session.channel), RoleServiceStub(session.channel)
    resources, users = ResourceServiceStub(session.channel), UserServiceStub(session.channel)

    def listed(stub: Any, messages: Any, name: str, field: str) -> Any:
        request = getattr(messages, f"List{name}Request")()
        return getattr(session.pages(getattr(stub, f"List{name}"), request, field, ALL), field)

    there = {
        each.resource_id: Found(_fields(Kind.RESOURCE, each), each.etag)
        for each in listed(resources, resources_pb2, "Resources", "resources")
    }
    permissions = listed(roles, roles_pb2, "Permissions", "permissions")
    held = listed(roles, roles_pb2, "RoleAssignments", "role_assignments")
    user_ids = {}
    for name in sorted(usernames):
        request = users_pb2.ListUsersRequest(username=name, page_size=1)
        for user in session.call(users.ListUsers, request).users:
            user_ids[name] = user.user_id
    return Current(
        resources=there,
        permissions={
            (each.ref.resource_id, each.ref.name): each.description for each in permissions
        },
        clients=[_client(each) for each in listed(clients, clients_pb2, "Clients", "clients")],
        roles={
            each.role_id: Found(_fields(Kind.ROLE, each), each.etag)
            for each in listed(roles, roles_pb2, "Roles", "roles")
        },
        assignments=frozenset(map(_assignment, held)),
        users=user_ids,
    )


def _assignment(message: Any) -> Assignment:
    client = ClientKey("client_id", message.client_id) if message.client_id else None
    return Assignment(message.role_id, client, message.user_id, message.resource_id)


def _client(message: Any) -> Found:
    from authsvc_client.v1 import clients_pb2

    ends = moment(message.approval_expire_time) if message.HasField(ENDS) else ""
    return Found(
        {**_fields(Kind.CLIENT, message.metadata), ENDS: ends},
        etag=message.etag,
        client_id=message.client_id,
        state=named(clients_pb2.ClientState, message.state, "CLIENT_STATE_").lower(),
        registrant=message.registrant,
        was_reviewed=message.HasField("review_time"),
    )


def _fields(kind: Kind, message: Any) -> Fields:
    """Of a message, as they are declared."""
    return {
        name: _value(type_, message, WIRE_NAMES.get(name, name))
        for name, type_ in FIELDS[kind].items()
        if name != ENDS
    }


def _value(type_: Type, message: Any, name: str) -> Value:
    value: Any = getattr(message, name)
    if type_ is Type.SPAN:
        return f"{value.seconds}s" if message.HasField(name) else ""
    if type_ in ENUMS:
        enum, prefix = enum_of(type_)
        if type_ not in SETS:
            return named(enum, value, prefix).lower()
        value = [named(enum, each, prefix).lower() for each in value]
    elif type_ in PAIRS:
        value = [tuple(getattr(each, part) for part in PAIRS[type_]) for each in value]
    return tuple(sorted(value)) if type_ in SETS else value


def export(
    session: Session,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Write a file there for each: resources.yaml, permissions.yaml, clients.yaml,"
            " roles.yaml, assignments.yaml.",
            show_default="one document to standard output",
        ),
    ] = None,
) -> None:
    """Write what `apply` would read: resources, permissions, clients, roles and who holds them.

    No secret is in it, and no client that is not let in. Defaults are left out, and authsvc's own
    resource. Users are named, not written.
    """
    out, there = session.out, current(session)
    clients = [each for each in there.clients if each.state == APPROVED]
    if left_out := len(there.clients) - len(clients):
        out.note(f"not let in, left out: {left_out} clients", "yellow")
    for key, number in Counter(key_of(each.fields) for each in clients).items():
        if number > 1:
            text = f"{number} clients are called {key.value}: apply cannot tell them apart"
            out.note(text, "yellow")
    document = _document(session, there, clients)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for section, objects in document.items():
            text = dump({section: objects})
            (output / f"{section}.yaml").write_text(text, encoding="utf-8")
        counts = ", ".join(f"{len(each)} {section}" for section, each in document.items())
        out.note(f"{output}: {counts}")
    if out.json:
        out.document(document)
    elif output is None:
        out.raw(dump(document).rstrip("\n"))


def _document(
    session: Session, there: Current, clients: Sequence[Found]
) -> dict[str, list[dict[str, Any]]]:
    """In an order that depends on nothing but what is there."""
    texts = Counter(text for each in clients for text in names_of(each.fields))
    names = {}
    """Of clients, by their ids: a text that means no other, or the id."""
    for each in clients:
        name, key = str(each.fields["client_name"]), key_of(each.fields)
        unique = (text for text in (name, key.value) if texts[text] == 1)
        names[each.client_id] = next(unique, each.client_id)
    return {
        "resources": [
            {"resource_id": id_, **_written(Kind.RESOURCE, each.fields, names)}
            for id_, each in sorted(there.resources.items())
            if id_ != there.own_resource
        ],
        "permissions": [
            {"resource_id": id_, "name": name} | ({"description": text} if text else {})
            for (id_, name), text in sorted(there.permissions.items())
        ],
        "clients": [
            _written(Kind.CLIENT, each.fields, names)
            for each in sorted(
                clients,
                key=lambda each: (each.fields["client_name"], key_of(each.fields), each.client_id),
            )
        ],
        "roles": [
            {"role_id": id_, **_written(Kind.ROLE, each.fields, names)}
            for id_, each in sorted(there.roles.items())
        ],
        "assignments": _assignments(session, there, names),
    }


def _written(kind: Kind, fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields that do not hold their defaults."""
    usual = defaults(kind, fields)
    return {
        name: names.get(str(fields[name]), fields[name])
        if type_ is Type.CLIENT
        else written(type_, fields[name])
        for name, type_ in FIELDS[kind].items()
        if fields[name] != usual.get(name, "")
    }


def _assignments(
    session: Session, there: Current, names: Mapping[str, str]
) -> list[dict[str, str]]:
    """Of users, and of the clients that have names."""
    from authsvc_client.v1 import users_pb2
    from authsvc_client.v1.users_pb2_grpc import UserServiceStub

    method, usernames = UserServiceStub(session.channel).GetUser, {}
    for user_id in {each.user_id for each in there.assignments if each.user_id}:
        request = users_pb2.GetUserRequest(user_id=user_id)
        usernames[user_id] = session.call(method, request).user.username
    found = []
    for each in there.assignments:
        client_id = each.client.value if each.client else ""
        fields = {
            "role_id": each.role_id,
            "client": names.get(client_id, ""),
            "user": usernames.get(each.user_id, ""),
            "resource_id": each.resource_id,
        }
        if not client_id or client_id in names:
            found.append({name: text for name, text in fields.items() if text})
    return sorted(found, key=lambda fields: list(fields.items()))
