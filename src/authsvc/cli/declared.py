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
    STATES,
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
    "roles": Kind.ROLE,
    "clients": Kind.CLIENT,
    "assignments": Kind.ASSIGNMENT,
}
NAMES: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.RESOURCE: ("resource_id",),
    Kind.PERMISSION: ("resource_id", "name"),
    Kind.ROLE: ("role_id",),
    Kind.CLIENT: ("client_name",),
    Kind.ASSIGNMENT: ("role_id",),
}
"""What each object must have."""
_MORE: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.RESOURCE: ("permissions",),
    Kind.CLIENT: ("state",),
    Kind.ASSIGNMENT: ("client", "user", "resource_id"),
}
TYPES: Final[Mapping[Kind, Mapping[str, Type]]] = {
    kind: {
        **dict.fromkeys((*names, *_MORE.get(kind, ())), Type.TEXT),
        **FIELDS[kind],
    }
    for kind, names in NAMES.items()
}
ENUMS: Final = frozenset({Type.TOKEN_FORMAT, Type.GRANT_TYPES, Type.AUTH_METHODS})
_LISTS: Final = frozenset({Type.NAMES, Type.TEXTS, Type.GRANT_TYPES, Type.AUTH_METHODS})
_PAIRS: Final = {Type.SCOPES: ("name", "description"), Type.PERMISSIONS: ("resource_id", "name")}
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
    """Of a file, or of all in a directory. Raises Refused with all problems, or Failure."""
    files = [path]
    if path.is_dir():
        names = (file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        files = sorted(file for file in names if not file.name.startswith("."))
        if not files:
            raise Failure(f"{path}: has no *.yaml", code="NOT_FOUND")
    reader = _Reader()
    for file in files:
        try:
            reader.document(_tree(file.read_text(encoding="utf-8"), file.name))
        except UnicodeDecodeError:
            reader.problems.append(Problem(file.name, "is not in UTF-8"))
        except _Wrong as wrong:
            reader.problems.append(wrong.problem)
    if reader.problems:
        raise Refused(reader.problems)
    return reader.found


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


class _Reader:
    """Makes values of nodes; goes on after a problem, to tell them all."""

    def __init__(self) -> None:
        self.found: list[Declared] = []
        self.problems: list[Problem] = []

    def document(self, root: Node | None) -> None:
        """Of one file."""
        if root is None:
            return
        for section, node in self._fields("a file", root, SECTIONS):
            for item in self._items(section, node):
                self._object(SECTIONS[section], item, {})

    def _object(self, kind: Kind, item: Node, given: Fields) -> None:
        fields, before = dict(given), len(self.problems)
        permissions: list[Node] = []
        for name, node in self._fields(f"a {kind}", item, TYPES[kind].keys() - given.keys()):
            if kind is Kind.RESOURCE and name == "permissions":
                permissions = self._items(name, node)
                continue
            try:
                fields[name] = _value(name, TYPES[kind][name], node)
            except _Wrong as wrong:
                self.problems.append(wrong.problem)
        if len(self.problems) == before:
            for name in NAMES[kind]:
                if not fields.get(name):
                    self.problems.append(Problem(item.place, f"a {kind} needs {name}"))
        self.found.append(Declared(kind, fields, item.place))
        for each in permissions:
            resource_id = fields.get("resource_id", "-")
            self._object(Kind.PERMISSION, each, {"resource_id": resource_id})

    def _fields(self, what: str, node: Node, known: Iterable[str]) -> list[tuple[str, Node]]:
        """Those that there can be."""
        if not isinstance(node.value, dict):
            self.problems.append(Problem(node.place, f"{what} must have fields"))
            return []
        for name in node.value.keys() - set(known):
            self.problems.append(_unknown(what, name, node.value[name], known))
        return [(name, each) for name, each in node.value.items() if name in known]

    def _items(self, name: str, node: Node) -> list[Node]:
        try:
            return _items(name, node)
        except _Wrong as wrong:
            self.problems.append(wrong.problem)
            return []


def _fields(what: str, node: Node, known: Iterable[str]) -> dict[str, Node]:
    if not isinstance(node.value, dict):
        raise _Wrong(node.place, f"{what} must have fields")
    for name in sorted(node.value.keys() - set(known)):
        raise _Wrong(*_unknown(what, name, node.value[name], known))
    return node.value


def _unknown(what: str, name: str, node: Node, known: Iterable[str]) -> Problem:
    text = f"{what} has no field {name}; there are: {', '.join(sorted(known))}"
    return Problem(node.place, text)


def _items(name: str, node: Node) -> list[Node]:
    if not isinstance(node.value, list):
        raise _Wrong(node.place, f"{name}: must be a list")
    return node.value


def _value(name: str, type_: Type, node: Node) -> Value:
    if type_ in _PAIRS:
        return _pairs(name, type_, node)
    if type_ in _LISTS:
        texts = [_text(name, each, type_) for each in _items(name, node)]
        if len(set(texts)) != len(texts):
            raise _Wrong(node.place, f"{name}: has an item twice")
        return tuple(texts if type_ is Type.TEXTS else sorted(texts))
    text = _text(name, node, type_)
    try:
        return _scalar(name, type_, text, plain=node.plain)
    except (ValueError, Failure) as error:
        raise _Wrong(node.place, f"{name}: {error}".removeprefix(f"{name}: {name}: ")) from error


def _scalar(name: str, type_: Type, text: str, *, plain: bool) -> Value:
    """Raises ValueError or Failure."""
    if type_ is Type.FLAG:
        if not plain or text not in ("true", "false"):
            raise ValueError("must be true or false")
        return text == "true"
    if type_ is Type.SPAN:
        return span(text, name)
    if type_ is Type.MOMENT:
        from google.protobuf.timestamp_pb2 import Timestamp

        moment = Timestamp()
        moment.FromJsonString(text)
        return moment.ToNanoseconds()
    if name == "tls_client_auth_san_dns":
        return text.lower()
    if name == "tls_client_auth_subject_dn":
        from authsvc.rpc.peer import canonical_dn

        return canonical_dn(text)
    return text


def _text(name: str, node: Node, type_: Type = Type.TEXT) -> str:
    """Of a scalar; of an enum one of its names."""
    if not isinstance(node.value, str):
        raise _Wrong(node.place, f"{name}: must be a text")
    if node.plain and node.value in _NULLS:
        raise _Wrong(node.place, f"{name}: has no value")
    if name == "state" and node.value not in STATES:
        raise _Wrong(node.place, f"state: is none of {', '.join(STATES)}")
    if type_ in ENUMS and node.value not in choices(type_):
        raise _Wrong(node.place, f"{name}: is none of {', '.join(choices(type_))}")
    return node.value


def _pairs(name: str, type_: Type, node: Node) -> Value:
    parts = _PAIRS[type_]
    needed = parts[:1] if type_ is Type.SCOPES else parts
    pairs: dict[tuple[str, ...], tuple[str, ...]] = {}
    for item in _items(name, node):
        given = _fields(name, item, parts)
        texts = {part: _text(f"{name}: {part}", each) for part, each in given.items()}
        for part in needed:
            if not texts.get(part):
                raise _Wrong(item.place, f"{name}: an item needs {part}")
        pair = tuple(texts.get(part, "") for part in parts)
        if pairs.setdefault(pair[: len(needed)], pair) is not pair:
            raise _Wrong(item.place, f"{name}: has an item twice")
    return tuple(sorted(pairs.values()))


@cache
def choices(type_: Type) -> Mapping[str, int]:
    """Names of an enum as they are declared -> the contract's numbers."""
    from authsvc_client.v1 import clients_pb2, resources_pb2

    enums: dict[Type, tuple[Any, str]] = {
        Type.TOKEN_FORMAT: (resources_pb2.TokenFormat, "TOKEN_FORMAT_"),
        Type.GRANT_TYPES: (clients_pb2.GrantType, "GRANT_TYPE_"),
        Type.AUTH_METHODS: (clients_pb2.ClientAuthMethod, "CLIENT_AUTH_METHOD_"),
    }
    enum, prefix = enums[type_]
    return {name.removeprefix(prefix).lower(): number for name, number in enum.items() if number}


def written(type_: Type, value: Value) -> Any:
    """A value as plain data."""
    if type_ in _PAIRS:
        assert isinstance(value, tuple)
        pairs = (zip(_PAIRS[type_], pair, strict=True) for pair in value)
        return [{part: text for part, text in pair if text} for pair in pairs]
    if type_ is Type.SPAN:
        assert isinstance(value, int)
        unit, size = next(
            (unit, size) for unit, size in (("h", 3600), ("m", 60), ("s", 1)) if not value % size
        )
        return f"{value // size}{unit}"
    if type_ is Type.MOMENT:
        from google.protobuf.timestamp_pb2 import Timestamp

        assert isinstance(value, int)
        moment = Timestamp()
        moment.FromNanoseconds(value)
        return moment.ToJsonString()
    return list(value) if isinstance(value, tuple) else value


def dump(document: Mapping[str, Any]) -> str:
    """YAML that `read` reads."""
    import yaml

    base: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

    class Dumper(base):  # type: ignore[misc] # of which of them it is
        def ignore_aliases(self, _data: object) -> bool:
            """Nothing is ever left out."""
            return True

    text: str = yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
