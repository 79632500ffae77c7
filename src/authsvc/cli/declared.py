"""What is declared, as YAML: read by the line, with no guess about types, and written.

A scalar is its text; the field says what it has to be. So `on` is a name and 1.10 a version.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from authsvc.apply import (
    FIELDS,
    SETS,
    Declared,
    Fields,
    Kind,
    Problem,
    Refused,
    Type,
    Value,
)
from authsvc.cli.calls import span
from authsvc.cli.output import Failure

SECTIONS: Final = {
    "resources": Kind.RESOURCE,
    "permissions": Kind.PERMISSION,
    "clients": Kind.CLIENT,
    "roles": Kind.ROLE,
    "assignments": Kind.ASSIGNMENT,
}
_NEEDED: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.RESOURCE: ("resource_id",),
    Kind.PERMISSION: ("resource_id", "name"),
    Kind.CLIENT: ("client_name",),
    Kind.ROLE: ("role_id",),
    Kind.ASSIGNMENT: ("role_id",),
}
_TYPES: Final[Mapping[Kind, Mapping[str, Type]]] = {
    kind: {**dict.fromkeys(names, Type.TEXT), **FIELDS[kind]} for kind, names in _NEEDED.items()
} | {Kind.ASSIGNMENT: dict.fromkeys(("role_id", "client", "user", "resource_id"), Type.TEXT)}
_INNER: Final = "permissions"
"""A resource may hold its own."""
WIRE_NAMES: Final = {"owner": "owner_client_id"}
"""Fields that the contract calls otherwise: there they hold ids of clients."""
ENUMS: Final = frozenset({Type.TOKEN_FORMAT, Type.GRANT_TYPES, Type.AUTH_METHODS})
PAIRS: Final = {Type.SCOPES: ("name", "description"), Type.PERMISSIONS: ("resource_id", "name")}
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_DEPTH_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class Node:
    """A value where it stands."""

    value: "str | list[Node] | dict[str, Node]"
    place: str
    plain: bool = True
    """A scalar without quotes."""


class _Wrong(Exception):
    """What is wrong, and where."""

    def __init__(self, place: str, text: str) -> None:
        super().__init__(text)
        self.problem = Problem(place, text)


def read(path: Path) -> list[Declared]:
    """Of a file, or of all in a directory. Raises Failure, or Refused: a problem of each object."""
    files = [path]
    if path.is_dir():
        names = (file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        files = sorted(file for file in names if not file.name.startswith("."))
        if not files:
            raise Failure(f"{path}: has no *.yaml", code="NOT_FOUND")
    found: list[Declared] = []
    problems: list[Problem] = []
    for file in files:
        try:
            objects = _sections(_tree(file.read_text(encoding="utf-8"), file.name))
        except UnicodeDecodeError:
            problems.append(Problem(file.name, "is not in UTF-8"))
            continue
        except _Wrong as wrong:
            problems.append(wrong.problem)
            continue
        for kind, node in objects:
            try:
                found += _objects(kind, node, {})
            except _Wrong as wrong:
                problems.append(wrong.problem)
    if problems:
        raise Refused(problems)
    return found


# --- the tree of a file ---


def _tree(text: str, file: str) -> Node | None:
    """The one document of a file; None where it is empty."""
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # C where it was built
    events = yaml.parse(text, Loader=loader)
    try:
        trees = [
            _node(events, next(events), file)
            for event in events
            if isinstance(event, yaml.DocumentStartEvent)
        ]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else file
        problem = getattr(error, "problem", None) or getattr(error, "reason", None)
        raise _Wrong(place, f"is no YAML: {problem}") from error
    if len(trees) > 1:
        raise _Wrong(trees[1].place, "a second document: one a file")
    return trees[0] if trees else None


def _node(events: Iterator[Any], event: Any, file: str, depth: int = 0) -> Node:
    """The value that begins with an event. Raises _Wrong for what YAML can and we cannot."""
    import yaml

    place = f"{file}:{event.start_mark.line + 1}"
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _Wrong(place, "anchors and aliases are not read: write it out")
    if event.tag is not None:
        raise _Wrong(place, f"tags are not read: {event.tag}")
    if depth > _DEPTH_MAX:
        raise _Wrong(place, "is nested too deeply")
    if isinstance(event, yaml.ScalarEvent):
        return Node(event.value, place, not event.style)
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_node(events, event, file, depth + 1))
        return Node(items, place)
    fields: dict[str, Node] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _node(events, event, file, depth + 1)
        if not isinstance(key.value, str):
            raise _Wrong(key.place, "a key must be a text")
        if key.value in fields:
            raise _Wrong(key.place, f"{key.value} is there twice")
        fields[key.value] = _node(events, next(events), file, depth + 1)
    return Node(fields, place)


# --- what it declares ---


def _sections(root: Node | None) -> list[tuple[Kind, Node]]:
    sections = _fields("a file", root, SECTIONS) if root else {}
    return [
        (SECTIONS[name], each) for name, node in sections.items() for each in _items(name, node)
    ]


def _objects(kind: Kind, node: Node, given: Fields) -> list[Declared]:
    """One, and the permissions that stand in it."""
    types = {name: type_ for name, type_ in _TYPES[kind].items() if name not in given}
    inner = {_INNER} if kind is Kind.RESOURCE else set()
    nodes = _fields(f"a {kind}", node, types.keys() | inner)
    values = {name: _value(name, types[name], nodes[name]) for name in nodes.keys() - inner}
    for name in _NEEDED[kind]:
        if not values.get(name) and name not in given:
            raise _Wrong(node.place, f"a {kind} needs {name}")
    found = [Declared(kind, {**given, **values}, node.place)]
    for name in nodes.keys() & inner:
        for each in _items(name, nodes[name]):
            found += _objects(Kind.PERMISSION, each, {"resource_id": values["resource_id"]})
    return found


def _fields(what: str, node: Node, known: Iterable[str]) -> dict[str, Node]:
    if not isinstance(node.value, dict):
        raise _Wrong(node.place, f"{what} must have fields")
    for name in node.value.keys() - set(known):
        text = f"{what} has no field {name}; there are: {', '.join(sorted(known))}"
        raise _Wrong(node.value[name].place, text)
    return node.value


def _items(name: str, node: Node) -> list[Node]:
    if not isinstance(node.value, list):
        raise _Wrong(node.place, f"{name}: must be a list")
    return node.value


def _value(name: str, type_: Type, node: Node) -> Value:
    if type_ in SETS:
        found: dict[Any, Any] = {}
        for each in _items(name, node):
            item = (_pair if type_ in PAIRS else _text)(name, type_, each)
            key = item[0] if type_ is Type.SCOPES else item
            if key in found:
                raise _Wrong(each.place, f"{name}: has an item twice")
            found[key] = item
        return tuple(sorted(found.values()))
    text = _text(name, type_, node)
    try:
        return _scalar(name, type_, text, plain=node.plain)
    except Failure as failure:
        raise _Wrong(node.place, failure.message) from failure
    except ValueError as error:
        raise _Wrong(node.place, f"{name}: {error}") from error


def _text(name: str, type_: Type, node: Node) -> str:
    """Of a scalar; of an enum one of its names."""
    if not isinstance(node.value, str):
        raise _Wrong(node.place, f"{name}: must be a text")
    if node.plain and node.value in _NULLS:
        raise _Wrong(node.place, f"{name}: has no value")
    if type_ in ENUMS and node.value not in choices(type_):
        raise _Wrong(node.place, f"{name}: is none of {', '.join(choices(type_))}")
    return node.value


def _pair(name: str, type_: Type, node: Node) -> tuple[str, ...]:
    parts = PAIRS[type_]
    nodes = _fields(name, node, parts)
    texts = {part: _text(f"{name}: {part}", Type.TEXT, each) for part, each in nodes.items()}
    for part in parts:
        if not texts.get(part) and part != "description":
            raise _Wrong(node.place, f"{name}: an item needs {part}")
    return tuple(texts.get(part, "") for part in parts)


def _scalar(name: str, type_: Type, text: str, *, plain: bool) -> Value:
    """As the server keeps it. Raises ValueError or Failure."""
    if type_ is Type.FLAG:
        if not plain or text not in ("true", "false"):
            raise ValueError("must be true or false")
        return text == "true"
    if type_ is Type.SPAN:
        return f"{span(text, name)}s"
    if type_ is Type.MOMENT:
        from google.protobuf.timestamp_pb2 import Timestamp

        parsed = Timestamp()
        parsed.FromJsonString(text)
        return moment(parsed)
    if name == "tls_client_auth_san_dns":
        return text.lower()
    if name == "tls_client_auth_subject_dn":
        from authsvc.rpc.peer import canonical_dn

        return canonical_dn(text)
    return text


def moment(timestamp: Any) -> str:
    """Its whole second, as text."""
    text: str = type(timestamp)(seconds=timestamp.seconds).ToJsonString()
    return text


@cache
def enum_of(type_: Type) -> tuple[Any, str]:
    """An enum of the contract, and what its names begin with there."""
    from authsvc_client.v1 import clients_pb2, resources_pb2

    enums: dict[Type, tuple[Any, str]] = {
        Type.TOKEN_FORMAT: (resources_pb2.TokenFormat, "TOKEN_FORMAT_"),
        Type.GRANT_TYPES: (clients_pb2.GrantType, "GRANT_TYPE_"),
        Type.AUTH_METHODS: (clients_pb2.ClientAuthMethod, "CLIENT_AUTH_METHOD_"),
    }
    return enums[type_]


@cache
def choices(type_: Type) -> list[str]:
    """Names of an enum as they are declared."""
    enum, prefix = enum_of(type_)
    return [name.removeprefix(prefix).lower() for name, number in enum.items() if number]


# --- writing ---


def written(type_: Type, value: Value) -> Any:
    """A value as plain data."""
    if type_ in PAIRS:
        assert isinstance(value, tuple)
        pairs = (zip(PAIRS[type_], pair, strict=True) for pair in value)
        return [{part: text for part, text in pair if text} for pair in pairs]
    return list(value) if isinstance(value, tuple) else value


def dump(document: Mapping[str, Any]) -> str:
    """YAML that `read` reads."""
    import yaml

    dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    text: str = yaml.dump(document, Dumper=dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
