"""Declarative administration: what is declared against what is there, and the steps between them.

Nothing is ever deleted, and an approval is the only decision about a client that is made here. All
that is known to be wrong is found before the first step.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from operator import itemgetter
from typing import Any, Final, NamedTuple, TypeAlias

from authsvc.model import ANY_AUDIENCE, SCOPE_ADMIN

Value: TypeAlias = str | bool | tuple[Any, ...]
Fields: TypeAlias = Mapping[str, Value]


class Kind(StrEnum):
    """What can be declared; in the order in which it is told."""

    RESOURCE = auto()
    PERMISSION = auto()
    CLIENT = auto()
    ROLE = auto()
    ASSIGNMENT = auto()


class Type(Enum):
    """What a field holds, and as which value; empty is "", or (), and for a flag False."""

    TEXT = auto()
    FLAG = auto()
    SPAN = auto()
    """Text: seconds, such as 300s."""
    MOMENT = auto()
    """Text: a whole second, as RFC 3339 in UTC."""
    TOKEN_FORMAT = auto()
    """Names of enums are lower-case texts."""
    GRANT_TYPES = auto()
    AUTH_METHODS = auto()
    NAMES = auto()
    """A sorted tuple, as all that holds many: the order says nothing."""
    SCOPES = auto()
    """Names and descriptions."""
    PERMISSIONS = auto()
    """Resource ids and names."""
    CLIENT = auto()
    """A client: as declared its name or identity, as found its id, in a step its ClientKey."""


SETS: Final = frozenset(
    {Type.GRANT_TYPES, Type.AUTH_METHODS, Type.NAMES, Type.SCOPES, Type.PERMISSIONS}
)
IDENTITIES: Final = (
    "tls_client_auth_san_uri",
    "tls_client_auth_san_dns",
    "tls_client_auth_subject_dn",
)
BOUND: Final = "tls_client_certificate_bound_access_tokens"
ENDS: Final = "approval_expire_time"
FIELDS: Final[Mapping[Kind, Mapping[str, Type]]] = {
    Kind.RESOURCE: {
        "display_name": Type.TEXT,
        "owner": Type.CLIENT,
        "scopes": Type.SCOPES,
        "token_format": Type.TOKEN_FORMAT,
        "token_lifetime": Type.SPAN,
        "staleness_max": Type.SPAN,
        "encryption_jwk": Type.TEXT,
        "freeze_permissions": Type.FLAG,
    },
    Kind.PERMISSION: {"description": Type.TEXT},
    Kind.CLIENT: {
        "client_name": Type.TEXT,
        **dict.fromkeys(IDENTITIES, Type.TEXT),
        "tls_client_auth_ca": Type.TEXT,
        BOUND: Type.FLAG,
        "token_endpoint_auth_methods": Type.AUTH_METHODS,
        "grant_types": Type.GRANT_TYPES,
        "scopes": Type.NAMES,
        "validates": Type.NAMES,
        "may_act": Type.CLIENT,
        "first_party": Type.FLAG,
        "redirect_uris": Type.NAMES,
        "contacts": Type.NAMES,
        **dict.fromkeys(("jwks", "jwks_uri"), Type.TEXT),
        **dict.fromkeys(("client_uri", "logo_uri", "policy_uri", "tos_uri"), Type.TEXT),
        **dict.fromkeys(("software_id", "software_version", "software_statement"), Type.TEXT),
        ENDS: Type.MOMENT,
    },
    Kind.ROLE: {
        "display_name": Type.TEXT,
        "description": Type.TEXT,
        "permissions": Type.PERMISSIONS,
    },
    Kind.ASSIGNMENT: {},
}
"""What can be changed of what is declared; the contract's names, but for `owner`, which holds the
name of a client and no id.
"""
KEPT: Final = frozenset({"tls_client_auth_ca", ENDS})
"""The server or a reviewer chose them: where they are not declared they stay as they are."""

PENDING, APPROVED, SUSPENDED, EXPIRED = "pending", "approved", "suspended", "expired"
REJECTED: Final = "rejected"
_SECRET_METHODS: Final = frozenset({"client_secret_basic", "client_secret_post"})


class ClientKey(NamedTuple):
    """What a client is known by: `field` is one of IDENTITIES, `client_name`, or `client_id`."""

    field: str
    value: str


class Assignment(NamedTuple):
    """That someone holds a role: a client, or else a user."""

    role_id: str
    client: ClientKey | None
    user_id: str
    resource_id: str


@dataclass(frozen=True, slots=True)
class Declared:
    """One object of the files: `fields` holds what is written there, and nothing else."""

    kind: Kind
    fields: Fields
    place: str
    """File and line."""


@dataclass(frozen=True, slots=True)
class Found:
    """An object of the server, its fields whole."""

    fields: Fields
    etag: str = ""
    client_id: str = ""
    state: str = ""
    registrant: str = ""
    was_reviewed: bool = False


@dataclass(frozen=True, slots=True)
class Current:
    """What is there."""

    resources: Mapping[str, Found] = field(default_factory=dict)
    permissions: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Resource and name -> description."""
    clients: Sequence[Found] = ()
    roles: Mapping[str, Found] = field(default_factory=dict)
    assignments: frozenset[Assignment] = frozenset()
    """Clients by `client_id`."""
    users: Mapping[str, str] = field(default_factory=dict)
    """Usernames that are declared -> ids of those who are there."""
    me: str = ""
    """Registrant of what is registered by who applies."""

    @property
    def own_resource(self) -> str:
        """Id of authsvc itself: no other resource can define `admin`."""
        defines = (id_ for id_, found in self.resources.items() if SCOPE_ADMIN in _scopes(found))
        return next(defines, "")


class Problem(NamedTuple):
    """Why nothing is done."""

    place: str
    text: str


class Refused(Exception):
    """What is declared cannot be made: all problems at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = tuple(problems)


class Verb(Enum):
    """What a step does."""

    CREATE = auto()
    UPDATE = auto()
    RENEW_SECRET = auto()
    APPROVE = auto()


@dataclass(frozen=True, slots=True)
class Step:
    """One call. An etag that an earlier step made goes before this one's."""

    verb: Verb
    kind: Kind
    key: Any
    """Resource id, (resource id, permission), ClientKey, role id or Assignment."""
    name: str
    """For people."""
    fields: Fields = field(default_factory=dict)
    etag: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """Of one field; clients by their names for people."""

    field: str
    old: Value
    new: Value


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one object, for people."""

    is_new: bool
    kind: Kind
    name: str
    fields: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Left:
    """A difference that is told, and not made."""

    kind: Kind
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in its order, and what to tell."""

    changes: tuple[Change, ...]
    steps: tuple[Step, ...]
    left: tuple[Left, ...]
    not_listed: tuple[tuple[Kind, str], ...]
    """Kinds and names of what is there and not declared."""
    client_ids: Mapping[ClientKey, str]
    """Of the clients that are there."""


def defaults(kind: Kind, given: Fields) -> Fields:
    """What the fields that are not given hold."""
    whole = {n: _empty(type_) for n, type_ in FIELDS[kind].items() if n not in KEPT}
    if kind is Kind.RESOURCE:
        whole |= {"token_format": "jwt", "token_lifetime": "300s"}
    elif kind is Kind.CLIENT:
        has_identity = any(given.get(name) for name in IDENTITIES)
        method = "tls_client_auth" if has_identity else "client_secret_post"
        whole |= {
            "grant_types": ("client_credentials",),
            "token_endpoint_auth_methods": (method,),
            BOUND: has_identity,
        }
    return whole


def _empty(type_: Type) -> Value:
    if type_ is Type.FLAG:
        return False
    return () if type_ in SETS else ""


def key_of(client: Fields) -> ClientKey:
    """What a client is matched by: its certificate identity if it has one, else its name."""
    name = next((name for name in IDENTITIES if client.get(name)), "client_name")
    return ClientKey(name, str(client[name]))


def names_of(client: Fields) -> set[str]:
    """The texts that may stand for a client."""
    return {str(client["client_name"]), key_of(client).value}


def needs_secret(client: Fields) -> bool:
    """Whether a method that it authenticates with needs one."""
    return not _SECRET_METHODS.isdisjoint(_items(client["token_endpoint_auth_methods"]))


_KEYS: Final[Mapping[Kind, Callable[[Fields], Any]]] = {
    Kind.RESOURCE: itemgetter("resource_id"),
    Kind.PERMISSION: itemgetter("resource_id", "name"),
    Kind.CLIENT: key_of,
    Kind.ROLE: itemgetter("role_id"),
    Kind.ASSIGNMENT: lambda fields: tuple(sorted(fields.items())),
}
"""What an object is matched by."""


def permission_name(key: tuple[str, str]) -> str:
    """As commands take it."""
    resource_id, name = key
    return f"{name}@{resource_id}"


def plan(declared: Sequence[Declared], current: Current) -> Plan:
    """Raises Refused."""
    return _Planner(declared, current).plan()


class _Planner:
    """Fills in one plan, kind by kind."""

    def __init__(self, declared: Sequence[Declared], current: Current) -> None:
        self._now = current
        self._own = current.own_resource
        self._problems: list[Problem] = []
        self._changes: list[Change] = []
        self._left: list[Left] = []
        self._later: list[Step] = []
        """Updates that name clients whom an earlier step registers."""
        self._declared: dict[Kind, dict[Any, Declared]] = {kind: {} for kind in Kind}
        for each in declared:
            first = self._declared[each.kind].setdefault(_KEYS[each.kind](each.fields), each)
            if first is not each:
                self._problem(each, f"this {each.kind} is declared at {first.place} already")
        self._clients: dict[ClientKey, Declared] = self._declared[Kind.CLIENT]
        # What is there once all is applied.
        self._resources = {*current.resources, *self._declared[Kind.RESOURCE]}
        self._permissions = {*current.permissions, *self._declared[Kind.PERMISSION]}
        self._roles = {*current.roles, *self._declared[Kind.ROLE]}
        self._usernames = {id_: name for name, id_ in current.users.items()}
        self._there: dict[ClientKey, Found] = {}
        """All clients of the server: those that are not declared by their ids."""
        self._key_of_id: dict[str, ClientKey] = {}
        self._held: set[Assignment] = set()
        self._wanted: dict[Assignment, Declared] = {}
        self._match_clients()
        self._owner_of_scope = self._scope_owners()

    def plan(self) -> Plan:
        """Raises Refused with all problems."""
        steps = (
            *self._plan_resources(),
            *self._plan_permissions(),
            *self._plan_clients(),
            *self._plan_roles(),
            *self._plan_assignments(),
        )
        if self._problems:
            raise Refused(self._problems)
        return Plan(
            changes=tuple(self._changes),
            steps=steps,
            left=tuple(self._left),
            not_listed=tuple(self._not_listed()),
            client_ids={key: found.client_id for key, found in self._there.items()},
        )

    def _problem(self, declared: Declared, text: str) -> None:
        self._problems.append(Problem(declared.place, text))

    # --- which client is which ---

    def _match_clients(self) -> None:
        groups: dict[ClientKey, list[Found]] = defaultdict(list)
        for found in self._now.clients:
            # Who was never let in has left its identity to others.
            if found.state != EXPIRED or found.was_reviewed:
                groups[key_of(found.fields)].append(found)
        for key, declared in self._clients.items():
            if sum(bool(declared.fields.get(name)) for name in IDENTITIES) > 1:
                self._problem(declared, f"{', '.join(IDENTITIES)} exclude each other")
            group = groups[key]
            best = [found for found in group if found.state != REJECTED] or group[:1]
            if len(best) > 1:
                ids = ", ".join(found.client_id for found in best)
                self._problem(declared, f"more than one client has this {key.field}: {ids}")
            elif best:
                self._key_of_id[best[0].client_id] = key
        self._called: dict[str, set[ClientKey]] = defaultdict(set)
        """Declared clients by what they are called."""
        for key, declared in self._clients.items():
            for text in names_of(declared.fields):
                self._called[text].add(key)
        self._others: dict[str, set[ClientKey]] = defaultdict(set)
        """Clients by id, and those not declared who are let in by what they are called: nobody
        takes a name by asking for it.
        """
        for found in self._now.clients:
            by_id = ClientKey("client_id", found.client_id)
            key = self._key_of_id.setdefault(found.client_id, by_id)
            self._there[key] = found
            self._others[found.client_id].add(key)
            if key == by_id and found.state in (APPROVED, SUSPENDED):
                for text in names_of(found.fields):
                    self._others[text].add(key)

    def _client(self, declared: Declared, name: str) -> ClientKey | None:
        """The client that a field means; None, and a problem, where it means none or many."""
        text = str(declared.fields[name])
        found = self._called.get(text) or self._others.get(text) or set()
        if len(found) == 1:
            return next(iter(found))
        if found:
            self._problem(declared, f"{name}: {text} is more than one client; use an identity")
        else:
            self._problem(declared, f"{name}: no such client: {text}")
        return None

    def _client_name(self, key: ClientKey) -> str:
        """For people."""
        if key not in self._clients and key not in self._there:
            return key.value
        fields = (self._clients.get(key) or self._there[key]).fields
        name, identity = str(fields["client_name"]), key_of(fields)
        return name if identity.field == "client_name" else f"{name} ({identity.value})"

    # --- one object ---

    def _want(self, declared: Declared) -> dict[str, Value]:
        """Its fields, whole, with clients by key."""
        types = FIELDS[declared.kind]
        given = {name: value for name, value in declared.fields.items() if name in types}
        for name, value in given.items():
            if types[name] is Type.CLIENT and value:
                given[name] = self._client(declared, name) or ""
        return {**defaults(declared.kind, given), **given}

    def _compare(
        self, kind: Kind, name: str, found: Found | None, want: Fields
    ) -> dict[str, Value]:
        """What is to be written, of a new object whole; told, unless nothing changes."""
        old = found.fields if found else defaults(kind, want)
        changed: dict[str, Value] = {}
        told = []
        for each, type_ in FIELDS[kind].items():
            was = old.get(each, "")
            if type_ is Type.CLIENT:
                was = self._key_of_id.get(str(was), "")
            if each in want and was != want[each]:
                changed[each] = want[each]
                told.append(Difference(each, self._told(was), self._told(want[each])))
        notes = tuple(_notes(found, want, told)) if kind is Kind.CLIENT else ()
        if told or notes or not found:
            self._changes.append(Change(not found, kind, name, tuple(told), notes))
        if found:
            return changed
        # Said whole, so that nothing rests on the server's defaults.
        return {each: value for each, value in want.items() if value not in ("", ())}

    def _told(self, value: Value) -> Value:
        return self._client_name(value) if isinstance(value, ClientKey) else value

    def _step(
        self, kind: Kind, key: Any, name: str, found: Found | None, fields: Fields
    ) -> list[Step]:
        """One that creates or updates it; who is not registered yet is named in a later one."""
        verb, etag = (Verb.UPDATE, found.etag) if found else (Verb.CREATE, "")
        now = {}
        for each, value in fields.items():
            if isinstance(value, ClientKey) and value not in self._there:
                self._later.append(Step(Verb.UPDATE, kind, key, name, {each: value}, etag))
            else:
                now[each] = value
        return [Step(verb, kind, key, name, now, etag)] if now or not found else []

    # --- resources and permissions ---

    def _scope_owners(self) -> dict[str, str]:
        """Scope -> its resource, once all is applied."""
        declared = self._declared[Kind.RESOURCE]
        there = self._now.resources.items()
        owners = {scope: id_ for id_, f in there if id_ not in declared for scope in _scopes(f)}
        for id_, each in declared.items():
            for scope, _ in _items(each.fields.get("scopes", ())):
                other = owners.setdefault(scope, id_)
                if other != id_:
                    self._problem(each, f"scopes: {scope} is defined by {other}")
        return owners

    def _plan_resources(self) -> list[Step]:
        releases: list[Step] = []
        """Scopes that move are given up before anybody takes one."""
        steps: list[Step] = []
        for id_, declared in self._declared[Kind.RESOURCE].items():
            if id_ == self._own:
                self._problem(declared, "this is authsvc itself: declare permissions on it alone")
                continue
            want, found = self._want(declared), self._now.resources.get(id_)
            if found:
                scopes = _items(found.fields["scopes"])
                kept = tuple(s for s in scopes if self._owner_of_scope.get(s[0], id_) == id_)
                if kept != scopes:
                    releases += self._step(Kind.RESOURCE, id_, id_, found, {"scopes": kept})
            fields = self._compare(Kind.RESOURCE, id_, found, want)
            steps += self._step(Kind.RESOURCE, id_, id_, found, fields)
        return releases + steps

    def _plan_permissions(self) -> list[Step]:
        steps: list[Step] = []
        for key, declared in self._declared[Kind.PERMISSION].items():
            name, want = permission_name(key), self._want(declared)
            old = self._now.permissions.get(key)
            if key[0] not in self._resources:
                self._problem(declared, f"no such resource: {key[0]}")
            elif old is None:
                fields = self._compare(Kind.PERMISSION, name, None, want)
                steps += self._step(Kind.PERMISSION, key, name, None, fields)
            elif old != want["description"]:
                text = f"description is {old!r}: a permission's never changes"
                self._left.append(Left(Kind.PERMISSION, name, text))
        return steps

    # --- clients ---

    def _plan_clients(self) -> list[Step]:
        made: list[Step] = []
        changed: list[Step] = []
        renewed: list[Step] = []
        approved: list[Step] = []
        for key, declared in self._clients.items():
            name, found = self._client_name(key), self._there.get(key)
            if found and found.state not in (PENDING, APPROVED):
                text = f"it is {found.state}, and left as it is"
                self._left.append(Left(Kind.CLIENT, name, text))
                continue
            want = self._want(declared)
            for scope in _items(want["scopes"]):
                if scope not in self._owner_of_scope:
                    self._problem(declared, f"scopes: no resource defines {scope}")
            for audience in _items(want["validates"]):
                if audience != ANY_AUDIENCE and audience not in self._resources:
                    self._problem(declared, f"validates: no such resource: {audience}")
            fields = self._compare(Kind.CLIENT, name, found, want)
            waits = found is None or found.state == PENDING
            ends = {ENDS: fields.pop(ENDS)} if waits and ENDS in fields else {}
            (changed if found else made).extend(self._step(Kind.CLIENT, key, name, found, fields))
            if not waits:
                continue
            etag = found.etag if found else ""
            if found:
                self._require_ours(declared, found, want)
                if needs_secret(want):
                    told = {"client_name": want["client_name"]}
                    renewed.append(Step(Verb.RENEW_SECRET, Kind.CLIENT, key, name, told, etag))
            approved.append(Step(Verb.APPROVE, Kind.CLIENT, key, name, ends, etag))
        return [*made, *self._later, *changed, *renewed, *approved]

    def _require_ours(self, declared: Declared, found: Found, want: Fields) -> None:
        """Another who registered it may hold its secret, or have chosen its name."""
        by_name = key_of(want).field == "client_name"
        if found.registrant != self._now.me and (by_name or needs_secret(want)):
            self._problem(
                declared,
                f"{found.client_id} was registered by {found.registrant}, who may hold its secret:"
                " approve or reject it yourself",
            )

    # --- roles and assignments ---

    def _plan_roles(self) -> list[Step]:
        steps: list[Step] = []
        for id_, declared in self._declared[Kind.ROLE].items():
            want, found = self._want(declared), self._now.roles.get(id_)
            for key in _items(want["permissions"]):
                if key not in self._permissions:
                    text = f"permissions: no such permission: {permission_name(key)}"
                    self._problem(declared, text)
            fields = self._compare(Kind.ROLE, id_, found, want)
            steps += self._step(Kind.ROLE, id_, id_, found, fields)
        return steps

    def _plan_assignments(self) -> list[Step]:
        for each in self._now.assignments:
            key = each.client and self._key_of_id.get(each.client.value, each.client)
            self._held.add(each._replace(client=key))
        steps = []
        for declared in self._declared[Kind.ASSIGNMENT].values():
            asked = self._assignment(declared)
            if asked is None:
                continue
            first = self._wanted.setdefault(asked, declared)
            if first is not declared:
                self._problem(declared, f"this assignment is declared at {first.place} already")
            if asked not in self._held:
                name = self._assignment_name(asked)
                self._changes.append(Change(True, Kind.ASSIGNMENT, name))
                steps.append(Step(Verb.CREATE, Kind.ASSIGNMENT, asked, name))
        return steps

    def _assignment(self, declared: Declared) -> Assignment | None:
        """None, and problems, where there can be none."""
        fields, before = declared.fields, len(self._problems)
        role_id, resource_id = str(fields["role_id"]), str(fields.get("resource_id", ""))
        user = str(fields.get("user", ""))
        if role_id not in self._roles:
            self._problem(declared, f"no such role: {role_id}")
        if resource_id and resource_id not in self._resources:
            self._problem(declared, f"no such resource: {resource_id}")
        if bool(user) is bool(fields.get("client")):
            self._problem(declared, "one of user and client holds it")
        if user and user not in self._now.users:
            self._problem(declared, f"no such user: {user}")
        key = self._client(declared, "client") if fields.get("client") else None
        if len(self._problems) > before:
            return None
        return Assignment(role_id, key, self._now.users.get(user, ""), resource_id)

    def _assignment_name(self, assignment: Assignment) -> str:
        role_id, client, user_id, resource_id = assignment
        holder = f"user {self._usernames.get(user_id, user_id)}"
        if client is not None:
            holder = f"client {self._client_name(client)}"
        return f"{role_id} to {holder}" + (f" on {resource_id}" if resource_id else "")

    # --- what is not listed ---

    def _not_listed(self) -> Iterator[tuple[Kind, str]]:
        now, declared = self._now, self._declared
        names: dict[Kind, Iterable[str]] = {
            Kind.RESOURCE: now.resources.keys() - declared[Kind.RESOURCE].keys() - {self._own},
            Kind.PERMISSION: map(
                permission_name, now.permissions.keys() - declared[Kind.PERMISSION].keys()
            ),
            Kind.CLIENT: (
                self._client_name(key) + ("" if found.state == APPROVED else f", {found.state}")
                for key, found in self._there.items()
                if key_of(found.fields) not in self._clients
            ),
            Kind.ROLE: now.roles.keys() - declared[Kind.ROLE].keys(),
            Kind.ASSIGNMENT: map(self._assignment_name, self._held - self._wanted.keys()),
        }
        for kind, each in names.items():
            for name in sorted(each):
                yield kind, name


def _notes(found: Found | None, want: Fields, differences: Iterable[Difference]) -> Iterator[str]:
    """What else becomes of a client."""
    if found is None:
        if needs_secret(want):
            yield "with a secret"
    elif found.state == PENDING:
        yield f"let in, registered by {found.registrant}"
        if needs_secret(want):
            yield "with another secret"
    else:
        if any(map(_takes_away, differences)):
            yield "its tokens are cut off"
        if needs_secret(want) and not needs_secret(found.fields):
            yield f"needs a secret: authsvc client rotate-secret {found.client_id}"


def _takes_away(difference: Difference) -> bool:
    """As oauth.registration.shrinks."""
    name, old, new = difference.field, difference.old, difference.new
    if name in ("scopes", "grant_types", "token_endpoint_auth_methods", "validates"):
        return bool({*_items(old)} - {*_items(new)})
    if name in (BOUND, "first_party"):
        return bool(new if name == BOUND else old)
    return name in ("jwks", "may_act", "tls_client_auth_ca")


def _items(value: Value) -> tuple[Any, ...]:
    assert isinstance(value, tuple)
    return value


def _scopes(resource: Found) -> list[str]:
    return [name for name, _ in _items(resource.fields["scopes"])]
