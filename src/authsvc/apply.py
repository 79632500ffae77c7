"""Declarative administration: what is declared against what is there, and the steps between them.

Nothing is ever deleted, and an approval is the only decision about a client that is made here. All
that is wrong is found before the first step.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum, auto
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from authsvc.model import ANY_AUDIENCE, SCOPE_ADMIN

K = TypeVar("K")
Value: TypeAlias = str | int | bool | tuple[Any, ...] | None
Fields: TypeAlias = Mapping[str, Value]


class Kind(StrEnum):
    """What can be declared; in the order in which it is told."""

    RESOURCE = auto()
    PERMISSION = auto()
    CLIENT = auto()
    ROLE = auto()
    ASSIGNMENT = auto()


class Type(Enum):
    """What a field holds, and as which value."""

    TEXT = auto()
    FLAG = auto()
    SPAN = auto()
    """Whole seconds."""
    MOMENT = auto()
    """Nanoseconds since the epoch."""
    TOKEN_FORMAT = auto()
    """Names of enums are lower-case texts."""
    GRANT_TYPES = auto()
    AUTH_METHODS = auto()
    NAMES = auto()
    """A sorted tuple: the order says nothing."""
    TEXTS = auto()
    """A tuple in its own order."""
    SCOPES = auto()
    """A sorted tuple of names and descriptions."""
    PERMISSIONS = auto()
    """A sorted tuple of resource ids and names."""
    CLIENT = auto()
    """A client: as declared its name or identity, as found its id, in a plan its ClientKey."""


SETS: Final = frozenset(
    {Type.GRANT_TYPES, Type.AUTH_METHODS, Type.NAMES, Type.SCOPES, Type.PERMISSIONS}
)
IDENTITIES: Final = (
    "tls_client_auth_san_uri",
    "tls_client_auth_san_dns",
    "tls_client_auth_subject_dn",
)
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
        "tls_client_certificate_bound_access_tokens": Type.FLAG,
        "token_endpoint_auth_methods": Type.AUTH_METHODS,
        "grant_types": Type.GRANT_TYPES,
        "scopes": Type.NAMES,
        "validates": Type.NAMES,
        "may_act": Type.CLIENT,
        "first_party": Type.FLAG,
        "redirect_uris": Type.NAMES,
        "jwks": Type.TEXT,
        "jwks_uri": Type.TEXT,
        "contacts": Type.TEXTS,
        "client_uri": Type.TEXT,
        "logo_uri": Type.TEXT,
        "policy_uri": Type.TEXT,
        "tos_uri": Type.TEXT,
        "software_id": Type.TEXT,
        "software_version": Type.TEXT,
        "software_statement": Type.TEXT,
        "approval_expire_time": Type.MOMENT,
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
KEPT: Final = frozenset({"tls_client_auth_ca", "approval_expire_time"})
"""The server or a reviewer chose them: where they are not declared they stay as they are."""

PENDING, APPROVED, SUSPENDED, EXPIRED = "pending", "approved", "suspended", "expired"
REJECTED = "rejected"
STATES: Final = (APPROVED, PENDING, SUSPENDED, REJECTED, EXPIRED)
_SECRET_METHODS: Final = frozenset({"client_secret_basic", "client_secret_post"})
_RIGHTS: Final = frozenset({"scopes", "grant_types", "token_endpoint_auth_methods", "validates"})
_PROOFS: Final = frozenset({"jwks", "may_act", "tls_client_auth_ca"})
_EMPTY: Final[Mapping[Type, Value]] = {
    **dict.fromkeys(Type, ""),
    **dict.fromkeys((*SETS, Type.TEXTS), ()),
    Type.FLAG: False,
    Type.SPAN: None,
    Type.MOMENT: None,
}


class ClientKey(NamedTuple):
    """What a client is known by: `field` is one of IDENTITIES, `client_name`, or `client_id`."""

    field: str
    value: str


class Assignment(NamedTuple):
    """That someone holds a role; of a client or of a user, the other is None."""

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
    now_ns: int = 0

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


class Difference(NamedTuple):
    """Of one field."""

    field: str
    type: Type
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


class Left(NamedTuple):
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
    """Kinds and names of what is there and not declared; assignments have a field of their own."""
    not_listed_assignments: tuple[Assignment, ...]
    client_ids: Mapping[ClientKey, str]
    """Of the clients that are there."""
    client_names: Mapping[ClientKey, str]
    """For people."""


def defaults(kind: Kind, given: Fields) -> Fields:
    """What the fields that are not given hold."""
    whole: dict[str, Value] = {
        name: _EMPTY[type_] for name, type_ in FIELDS[kind].items() if name not in KEPT
    }
    if kind is Kind.RESOURCE:
        whole |= {"token_format": "jwt", "token_lifetime": 300}
    elif kind is Kind.CLIENT:
        has_identity = any(given.get(name) for name in IDENTITIES)
        method = "tls_client_auth" if has_identity else "client_secret_post"
        whole |= {
            "grant_types": ("client_credentials",),
            "token_endpoint_auth_methods": (method,),
            "tls_client_certificate_bound_access_tokens": has_identity,
        }
    return whole


def key_of(fields: Fields) -> ClientKey:
    """What a client is matched by: its certificate identity if it has one, else its name."""
    for name in (*IDENTITIES, "client_name"):
        if value := fields.get(name):
            return ClientKey(name, str(value))
    return ClientKey("client_name", "")


def needs_secret(client: Fields) -> bool:
    """Whether a method that it authenticates with needs one."""
    return not _SECRET_METHODS.isdisjoint(_tuple(client.get("token_endpoint_auth_methods")))


def bearers(clients: Iterable[Found]) -> list[Found]:
    """Of clients with one key, the one whose key it is; more where they cannot be told apart.

    Who was turned away, or never let in, left it to others.
    """
    ranked: dict[int, list[Found]] = defaultdict(list)
    for client in clients:
        never_let_in = client.state == EXPIRED and not client.was_reviewed
        ranked[2 if client.state == REJECTED else int(never_let_in)].append(client)
    best = min(ranked, default=0)
    return ranked[best][: 1 if best == 2 else None]


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
        self._resources = self._unique(declared, Kind.RESOURCE, lambda f: str(f["resource_id"]))
        self._permissions = self._unique(
            declared, Kind.PERMISSION, lambda f: (str(f["resource_id"]), str(f["name"]))
        )
        self._roles = self._unique(declared, Kind.ROLE, lambda f: str(f["role_id"]))
        self._clients = self._unique(declared, Kind.CLIENT, key_of)
        self._assignments = [each for each in declared if each.kind is Kind.ASSIGNMENT]
        self._own_elsewhere = {
            id_
            for id_, each in self._resources.items()
            if id_ != self._own and SCOPE_ADMIN in dict(_pairs(each.fields.get("scopes")))
        }
        """authsvc itself, as another deployment exported it."""
        for id_ in self._own_elsewhere:
            del self._resources[id_]
            self._left.append(Left(Kind.RESOURCE, id_, f"authsvc itself is {self._own} here"))
        self._there: dict[ClientKey, Found] = {}
        self._key_of_id: dict[str, ClientKey] = {}
        self._index_clients()

    def plan(self) -> Plan:
        """Raises Refused with all problems."""
        self._owner_of_scope = self._scope_owners()
        resources, owners = self._plan_resources()
        permissions = self._plan_permissions()
        clients = self._plan_clients()
        roles = self._plan_roles()
        assignments = self._plan_assignments()
        if self._problems:
            raise Refused(self._problems)
        order = list(Kind)
        return Plan(
            changes=tuple(sorted(self._changes, key=lambda change: order.index(change.kind))),
            steps=(*resources, *permissions, *clients, *owners, *roles, *assignments),
            left=tuple(self._left),
            not_listed=tuple(self._not_listed()),
            not_listed_assignments=tuple(sorted(self._held - self._wanted.keys(), key=_order)),
            client_ids={key: found.client_id for key, found in self._found_by_key.items()},
            client_names={
                key: self._client_name(key) for key in self._found_by_key.keys() | self._clients
            },
        )

    # --- what is declared, and whom it names ---

    def _problem(self, declared: Declared, text: str) -> None:
        self._problems.append(Problem(declared.place, text))

    def _unique(
        self, declared: Sequence[Declared], kind: Kind, key: Callable[[Fields], K]
    ) -> dict[K, Declared]:
        found: dict[K, Declared] = {}
        for each in declared:
            if each.kind is kind:
                first = found.setdefault(key(each.fields), each)
                if first is not each:
                    self._problem(each, f"this {kind} is declared at {first.place} already")
        return found

    def _index_clients(self) -> None:
        """Which clients of the server are the declared ones, and who is known by which text."""
        groups: dict[ClientKey, list[Found]] = defaultdict(list)
        for found in self._now.clients:
            groups[key_of(found.fields)].append(found)
        for key, declared in self._clients.items():
            if sum(bool(declared.fields.get(name)) for name in IDENTITIES) > 1:
                self._problem(declared, f"{', '.join(IDENTITIES)} exclude each other")
            best = bearers(groups.get(key, ()))
            if len(best) > 1:
                ids = ", ".join(found.client_id for found in best)
                self._problem(declared, f"more than one client has this {key.field}: {ids}")
            elif best:
                self._there[key] = best[0]
                self._key_of_id[best[0].client_id] = key
        self._found_by_key = dict(self._there)
        self._texts: dict[str, set[ClientKey]] = defaultdict(set)
        """Declared clients by their names and identities."""
        for key, declared in self._clients.items():
            self._texts[key.value].add(key)
            self._texts[str(declared.fields["client_name"])].add(key)
        self._others: dict[str, set[ClientKey]] = defaultdict(set)
        """The others who are let in: nobody takes a name by asking for it."""
        for found in self._now.clients:
            by_id = ClientKey("client_id", found.client_id)
            key = self._key_of_id.setdefault(found.client_id, by_id)
            self._others[found.client_id].add(key)
            if key == by_id:
                self._found_by_key[key] = found
                if found.state in (APPROVED, SUSPENDED):
                    self._others[str(found.fields["client_name"])].add(key)
                    self._others[key_of(found.fields).value].add(key)

    def _client(self, declared: Declared, name: str, text: str) -> ClientKey | None:
        """The client that a text means."""
        found = self._texts.get(text) or self._others.get(text) or set()
        if len(found) > 1:
            self._problem(declared, f"{name}: {text} is more than one client; use an identity")
        elif not found:
            self._problem(declared, f"{name}: no such client: {text}")
        return next(iter(found)) if len(found) == 1 else None

    def _client_name(self, key: ClientKey) -> str:
        if key in self._clients:
            fields = self._clients[key].fields
        elif key in self._found_by_key:
            fields = self._found_by_key[key].fields
        else:
            return key.value
        identity = key_of(fields)
        name = str(fields.get("client_name"))
        return name if identity.field == "client_name" else f"{name} ({identity.value})"

    def _is_to_be(self, key: ClientKey) -> bool:
        """Whether a client is there, or will be."""
        return key in self._found_by_key or _state(self._clients[key]) in (APPROVED, PENDING)

    # --- resources ---

    def _scope_owners(self) -> dict[str, str]:
        """Scope -> its resource, once all is applied."""
        owners: dict[str, str] = {}
        for id_, found in self._now.resources.items():
            if id_ == self._own or id_ not in self._resources:
                owners |= dict.fromkeys(_scopes(found), id_)
        for id_, declared in self._resources.items():
            if id_ == self._own:
                continue
            for scope, _ in _pairs(declared.fields.get("scopes")):
                other = owners.setdefault(scope, id_)
                if other != id_:
                    self._problem(declared, f"scopes: {scope} is defined by {other}")
        return owners

    def _has_resource(self, id_: str) -> bool:
        return id_ in self._now.resources or id_ in self._resources

    def _plan_resources(self) -> tuple[list[Step], list[Step]]:
        """All but the owners who are registered first, and those."""
        releases: list[Step] = []
        steps: list[Step] = []
        owners: list[Step] = []
        for id_, declared in self._resources.items():
            found = self._now.resources.get(id_)
            want = self._want(declared)
            if owner := want["owner"]:
                key = self._client(declared, "owner", str(owner))
                want["owner"] = key
                if key is not None and not self._is_to_be(key):
                    text = f"owner: {self._client_name(key)} is not there"
                    self._left.append(Left(Kind.RESOURCE, id_, text))
                    want["owner"] = self._owner(found)
            if id_ == self._own:
                assert found is not None
                for each in self._differences(Kind.RESOURCE, self._resource(found), want):
                    text = f"{each.field} differs; apply does not change authsvc itself"
                    self._left.append(Left(Kind.RESOURCE, id_, text))
                continue
            change = self._change(
                Kind.RESOURCE, id_, self._resource(found) if found else None, want
            )
            if change is None:
                continue
            self._changes.append(change)
            fields = {each.field: each.new for each in change.fields}
            later = {
                name: value
                for name, value in fields.items()
                if isinstance(value, ClientKey) and value not in self._found_by_key
            }
            now = {name: value for name, value in fields.items() if name not in later}
            etag = found.etag if found else ""
            if found and (moved := self._moved(id_, found, want)):
                releases.append(Step(Verb.UPDATE, Kind.RESOURCE, id_, id_, moved, etag))
            if now or not found:
                verb = Verb.UPDATE if found else Verb.CREATE
                steps.append(Step(verb, Kind.RESOURCE, id_, id_, now, etag))
            if later:
                owners.append(Step(Verb.UPDATE, Kind.RESOURCE, id_, id_, later, etag))
        return releases + steps, owners

    def _moved(self, id_: str, found: Found, want: Fields) -> Fields:
        """What remains of its scopes while others take theirs from it; empty where none do."""
        wanted = dict(_pairs(want["scopes"]))
        gone = {
            scope
            for scope in _scopes(found)
            if scope not in wanted and self._owner_of_scope.get(scope, id_) != id_
        }
        if not gone:
            return {}
        kept = (pair for pair in _pairs(found.fields["scopes"]) if pair[0] not in gone)
        return {"scopes": tuple(kept)}

    def _resource(self, found: Found) -> Fields:
        """Its fields, its owner by key."""
        return {**found.fields, "owner": self._owner(found)}

    def _owner(self, found: Found | None) -> Value:
        return self._key_of_id.get(str(found.fields["owner"]), "") if found else ""

    # --- permissions ---

    def _plan_permissions(self) -> list[Step]:
        steps = []
        for key, declared in self._permissions.items():
            resource_id, _ = key
            name, text = permission_name(key), str(declared.fields.get("description", ""))
            if resource_id in self._own_elsewhere:
                self._left.append(
                    Left(Kind.PERMISSION, name, f"authsvc itself is {self._own} here")
                )
            elif not self._has_resource(resource_id):
                self._problem(declared, f"no such resource: {resource_id}")
            elif key not in self._now.permissions:
                fields: Fields = {"description": text}
                shown = (Difference("description", Type.TEXT, "", text),) if text else ()
                self._changes.append(Change(True, Kind.PERMISSION, name, shown))
                steps.append(Step(Verb.CREATE, Kind.PERMISSION, key, name, fields))
            elif (old := self._now.permissions[key]) != text:
                why = f"description is {old!r}: a permission's never changes"
                self._left.append(Left(Kind.PERMISSION, name, why))
        return steps

    def _has_permission(self, key: tuple[str, str]) -> bool:
        if key in self._now.permissions:
            return True
        return key in self._permissions and key[0] not in self._own_elsewhere

    # --- clients ---

    def _plan_clients(self) -> list[Step]:
        new: dict[ClientKey, dict[str, Value]] = {}
        secrets: list[Step] = []
        updates: list[Step] = []
        approvals: list[Step] = []
        for key, declared in self._clients.items():
            want, found = self._want_client(key, declared), self._there.get(key)
            state, name = _state(declared), self._client_name(key)
            if found is None and state not in (APPROVED, PENDING):
                text = f"it is not there, and apply registers none to be {state}"
                self._left.append(Left(Kind.CLIENT, name, text))
                continue
            if found is not None and found.state == REJECTED:
                if state != REJECTED:
                    self._left.append(Left(Kind.CLIENT, name, "rejected for good; register anew"))
                continue
            approves = self._approves(declared, name, found, state)
            if found and not approves and found.state not in (APPROVED, SUSPENDED):
                want.pop("approval_expire_time", None)
            change = self._client_change(name, found, want, approves=approves)
            if found is None:
                new[key] = want
            elif change is not None:
                fields = {each.field: each.new for each in change.fields if each.field != "state"}
                if approves:
                    fields.pop("approval_expire_time", None)
                if fields:
                    updates.append(Step(Verb.UPDATE, Kind.CLIENT, key, name, fields, found.etag))
                if approves and needs_secret(want) and found.state == PENDING:
                    fields, etag = {"client_name": want["client_name"]}, found.etag
                    secrets.append(Step(Verb.RENEW_SECRET, Kind.CLIENT, key, name, fields, etag))
            if change is not None:
                self._changes.append(change)
            if approves:
                ends: Fields = {"approval_expire_time": want.get("approval_expire_time")}
                etag = found.etag if found else ""
                approvals.append(Step(Verb.APPROVE, Kind.CLIENT, key, name, ends, etag))
        registrations, later = self._registrations(new)
        return [*registrations, *later, *updates, *secrets, *approvals]

    def _want_client(self, key: ClientKey, declared: Declared) -> dict[str, Value]:
        want, found = self._want(declared), self._there.get(key)
        old = found.fields if found is not None else {}
        known = {name: set(_tuple(old.get(name))) for name in ("scopes", "validates")}
        state = _state(declared)
        approves = state == APPROVED and (found is None or found.state in (PENDING, EXPIRED))
        for scope in _tuple(want["scopes"]):
            if scope not in self._owner_of_scope and (approves or scope not in known["scopes"]):
                self._problem(declared, f"scopes: no resource defines {scope}")
        for audience in _tuple(want["validates"]):
            if audience in known["validates"] or audience == ANY_AUDIENCE:
                continue
            if not self._has_resource(audience):
                self._problem(declared, f"validates: no such resource: {audience}")
        if may_act := want["may_act"]:
            actor = self._client(declared, "may_act", str(may_act))
            want["may_act"] = actor
            if actor is not None and not self._is_to_be(actor):
                self._problem(declared, f"may_act: {may_act} is not there, and not registered")
        ends = want.get("approval_expire_time")
        if isinstance(ends, int) and ends <= self._now.now_ns and state == APPROVED:
            self._problem(declared, "approval_expire_time: is in the past")
        return want

    def _approves(self, declared: Declared, name: str, found: Found | None, state: str) -> bool:
        """Whether a step lets the client in; tells of other states that differ."""
        if found is None:
            return state == APPROVED
        if state == found.state:
            return False
        if state != APPROVED or found.state not in (PENDING, EXPIRED):
            self._left.append(Left(Kind.CLIENT, name, f"state: it is {found.state}, not {state}"))
            return False
        ends = found.fields.get("approval_expire_time")
        if (
            found.state == EXPIRED
            and ends is not None
            and not declared.fields.get("approval_expire_time")
        ):
            text = "state: its approval is over; declare a new approval_expire_time"
            self._left.append(Left(Kind.CLIENT, name, text))
            return False
        # Another who registered it may hold its secret, or have chosen its name.
        want = self._want(declared)
        by_name = key_of(want).field == "client_name"
        if found.registrant != self._now.me and (by_name or needs_secret(want)):
            self._problem(
                declared,
                f"{found.client_id} was registered by {found.registrant}, who may hold its secret:"
                " approve or reject it yourself",
            )
        return True

    def _client_change(
        self, name: str, found: Found | None, want: Fields, *, approves: bool
    ) -> Change | None:
        old = None
        if found is not None:
            actor = self._key_of_id.get(str(found.fields["may_act"]), "")
            old = {**found.fields, "may_act": actor}
        change = self._change(Kind.CLIENT, name, old, want)
        notes: list[str] = []
        if found is None:
            if needs_secret(want):
                notes.append("with a secret")
            if not approves:
                notes.append("waits for its review")
        else:
            if approves:
                change = change or Change(False, Kind.CLIENT, name)
                state = Difference("state", Type.TEXT, found.state, APPROVED)
                change = replace(change, fields=(*change.fields, state))
                notes.append(f"registered by {found.registrant}")
            if change and found.state == APPROVED and _cuts_off(change.fields):
                notes.append("its tokens are cut off")
            if needs_secret(want) and not needs_secret(found.fields) and found.state != PENDING:
                notes.append(f"needs a secret: authsvc client rotate-secret {found.client_id}")
        return change and replace(change, notes=tuple(notes))

    def _registrations(
        self, new: Mapping[ClientKey, Mapping[str, Value]]
    ) -> tuple[list[Step], list[Step]]:
        """Each after the client that may act for it; where they name each other in a ring, one of
        them is told later, before it is let in.
        """
        steps: list[Step] = []
        later: list[Step] = []
        done: set[ClientKey] = set()
        for start in new:
            chain: dict[ClientKey, None] = {}
            key: Any = start
            while key in new and key not in done and key not in chain:
                chain[key] = None
                key = new[key].get("may_act")
            last = next(reversed(chain)) if key in chain else None
            for each in reversed(chain):
                fields = {name: value for name, value in new[each].items() if value is not None}
                name = self._client_name(each)
                if each == last:
                    late = {"may_act": fields.pop("may_act")}
                    later.append(Step(Verb.UPDATE, Kind.CLIENT, each, name, late))
                fields.pop("approval_expire_time", None)
                steps.append(Step(Verb.CREATE, Kind.CLIENT, each, name, fields))
            done.update(chain)
        return steps, later

    # --- roles ---

    def _plan_roles(self) -> list[Step]:
        steps = []
        for id_, declared in self._roles.items():
            want, found = self._want(declared), self._now.roles.get(id_)
            for key in _tuple(want["permissions"]):
                if not self._has_permission(key):
                    text = f"permissions: no such permission: {permission_name(key)}"
                    self._problem(declared, text)
            change = self._change(Kind.ROLE, id_, found.fields if found else None, want)
            if change is not None:
                self._changes.append(change)
                fields = {each.field: each.new for each in change.fields}
                verb, etag = (Verb.UPDATE, found.etag) if found else (Verb.CREATE, "")
                steps.append(Step(verb, Kind.ROLE, id_, id_, fields, etag))
        return steps

    # --- assignments ---

    def _plan_assignments(self) -> list[Step]:
        self._held = {
            each._replace(
                client=each.client and self._key_of_id.get(each.client.value, each.client)
            )
            for each in self._now.assignments
        }
        self._wanted: dict[Assignment, Declared] = {}
        steps = []
        for declared in self._assignments:
            asked = self._assignment(declared)
            if asked is None:
                continue
            first = self._wanted.setdefault(asked, declared)
            if first is not declared:
                self._problem(declared, f"this assignment is declared at {first.place} already")
            holder = f"user {declared.fields.get('user')}"
            if asked.client is not None:
                holder = f"client {self._client_name(asked.client)}"
            name = assignment_name(asked, holder)
            if asked.client is not None and not self._is_to_be(asked.client):
                self._left.append(Left(Kind.ASSIGNMENT, name, "the client is not there"))
            elif asked not in self._held:
                self._changes.append(Change(True, Kind.ASSIGNMENT, name))
                steps.append(Step(Verb.CREATE, Kind.ASSIGNMENT, asked, name))
        return steps

    def _assignment(self, declared: Declared) -> Assignment | None:
        """With its problems told."""
        fields, before = declared.fields, len(self._problems)
        role_id, resource_id = str(fields["role_id"]), str(fields.get("resource_id", ""))
        user, client = str(fields.get("user", "")), str(fields.get("client", ""))
        if role_id not in self._roles and role_id not in self._now.roles:
            self._problem(declared, f"no such role: {role_id}")
        if resource_id and not self._has_resource(resource_id):
            self._problem(declared, f"no such resource: {resource_id}")
        if bool(user) is bool(client):
            self._problem(declared, "one of user and client holds it")
        user_id = self._now.users.get(user, "")
        if user and not user_id:
            self._problem(declared, f"no such user: {user}")
        key = self._client(declared, "client", client) if client else None
        if len(self._problems) > before:
            return None
        return Assignment(role_id, key, user_id, resource_id)

    # --- all kinds ---

    def _want(self, declared: Declared) -> dict[str, Value]:
        """The fields of one object, whole."""
        own = {n: v for n, v in declared.fields.items() if n in FIELDS[declared.kind]}
        return {**defaults(declared.kind, own), **own}

    def _differences(self, kind: Kind, old: Fields, new: Fields) -> Iterator[Difference]:
        for name, type_ in FIELDS[kind].items():
            if name in new and old.get(name) != new[name]:
                yield Difference(name, type_, old.get(name), new[name])

    def _change(self, kind: Kind, name: str, old: Fields | None, new: Fields) -> Change | None:
        """None where nothing differs."""
        empty = {**defaults(kind, new), **dict.fromkeys(KEPT)}
        found = tuple(self._differences(kind, old if old is not None else empty, new))
        return Change(old is None, kind, name, found) if found or old is None else None

    def _not_listed(self) -> Iterator[tuple[Kind, str]]:
        for id_ in sorted(self._now.resources.keys() - self._resources.keys() - {self._own}):
            yield Kind.RESOURCE, id_
        for key in sorted(self._now.permissions.keys() - self._permissions.keys()):
            yield Kind.PERMISSION, permission_name(key)
        others = (
            f"{self._client_name(key)}{'' if found.state == APPROVED else f', {found.state}'}"
            for key, found in self._found_by_key.items()
            if key.field == "client_id" and key_of(found.fields) not in self._clients
        )
        for name in sorted(others):
            yield Kind.CLIENT, name
        for id_ in sorted(self._now.roles.keys() - self._roles.keys()):
            yield Kind.ROLE, id_


def permission_name(key: tuple[str, str]) -> str:
    """As commands take it."""
    resource_id, name = key
    return f"{name}@{resource_id}"


def assignment_name(assignment: Assignment, holder: str) -> str:
    """For people."""
    where = f" on {assignment.resource_id}" if assignment.resource_id else ""
    return f"{assignment.role_id} to {holder}{where}"


def _order(assignment: Assignment) -> tuple[str, ...]:
    return tuple(map(str, assignment))


def _cuts_off(differences: Iterable[Difference]) -> bool:
    """Whether a change of a client takes something away (oauth.registration.shrinks)."""
    for name, _, old, new in differences:
        if name == "tls_client_certificate_bound_access_tokens":
            found = bool(new)
        else:
            found = name in _PROOFS or bool(name in _RIGHTS and {*_tuple(old)} - {*_tuple(new)})
        if found:
            return True
    return False


def _state(declared: Declared) -> str:
    return str(declared.fields.get("state", APPROVED))


def _tuple(value: Value) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def _pairs(value: Value) -> tuple[tuple[str, str], ...]:
    return _tuple(value)


def _scopes(resource: Found) -> list[str]:
    return [name for name, _ in _pairs(resource.fields["scopes"])]
