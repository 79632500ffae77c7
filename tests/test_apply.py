"""Planning: what is declared against what is there, and a small model of a server that obeys."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from authsvc.apply import (
    APPROVED,
    EXPIRED,
    IDENTITIES,
    KEPT,
    PENDING,
    REJECTED,
    SUSPENDED,
    Assignment,
    ClientKey,
    Current,
    Declared,
    Found,
    Kind,
    Plan,
    Refused,
    Step,
    Value,
    Verb,
    defaults,
    key_of,
    plan,
)

ISSUER: Final = "https://issuer.test"
BILLING, ORDERS = "https://billing.test", "https://orders.test"
ME, STRANGER = "spiffe://test.local/admin", "spiffe://test.local/stranger"
SAN: Final = "tls_client_auth_san_uri"
SOON, LATER = "2099-01-01T00:00:00Z", "2100-01-01T00:00:00Z"
STATES: Final = (APPROVED, PENDING, SUSPENDED, REJECTED, EXPIRED)
ALICE: Final = "u-alice"
_lines = count(1)


def declared(kind: Kind, **fields: Value) -> Declared:
    return Declared(kind, fields, f"a.yaml:{next(_lines)}")


def resource(id_: str = BILLING, *scopes: str, **fields: Value) -> Declared:
    pairs = tuple(sorted((scope, "") for scope in scopes))
    return declared(Kind.RESOURCE, resource_id=id_, scopes=pairs, **fields)


def client(name: str, uri: str = "", **fields: Value) -> Declared:
    named = {SAN: uri} if uri else {}
    return declared(Kind.CLIENT, client_name=name, **named, **fields)


@dataclass
class Server:
    """What the real one holds to, on dictionaries: whatever it refuses fails the test."""

    resources: dict[str, Found] = field(default_factory=dict)
    permissions: dict[tuple[str, str], str] = field(default_factory=dict)
    clients: dict[str, Found] = field(default_factory=dict)
    roles: dict[str, Found] = field(default_factory=dict)
    assignments: set[Assignment] = field(default_factory=set)
    counter: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        own = {"scopes": (("admin", ""), ("validate", ""))}
        self.resources[ISSUER] = Found({**defaults(Kind.RESOURCE, {}), **own}, "1")

    def current(self) -> Current:
        return Current(
            dict(self.resources),
            dict(self.permissions),
            tuple(self.clients.values()),
            dict(self.roles),
            frozenset(self.assignments),
            {"alice": ALICE},
            ME,
        )

    def apply(self, objects: Sequence[Declared], steps: int | None = None) -> Plan:
        """Takes so many steps of the plan; all of them unless a number is given."""
        found = plan(objects, self.current())
        run = _Run(self, dict(found.client_ids))
        for step in found.steps[:steps]:
            run.take(step)
        return found

    def register(self, fields: dict[str, Any], registrant: str = ME, state: str = PENDING) -> str:
        """Whoever registers it."""
        key = key_of(fields)
        if key.field in IDENTITIES:
            for other in self.clients.values():
                held = other.state != REJECTED and (other.state != EXPIRED or other.was_reviewed)
                assert not (held and key_of(other.fields) == key)
        whole = {**dict.fromkeys(KEPT, ""), **defaults(Kind.CLIENT, fields), **fields}
        self._require_metadata(whole, {})
        id_ = f"c{next(self.counter)}"
        reviewed = state not in (PENDING, EXPIRED)
        self.clients[id_] = Found(whole, "1", id_, state, registrant, reviewed)
        return id_

    def move(self, id_: str, state: str, **fields: Value) -> None:
        was = self.clients[id_]
        reviewed = was.was_reviewed or state != EXPIRED
        self.clients[id_] = replace(
            was,
            state=state,
            was_reviewed=reviewed,
            etag=self._next(was),
            fields={**was.fields, **fields},
        )

    def _next(self, found: Found) -> str:
        return str(int(found.etag) + 1)

    def _require_metadata(self, fields: Any, known: Any) -> None:
        defined = set(self.scopes())
        assert {*fields["scopes"]} - {*known.get("scopes", ())} <= defined
        audiences = {*fields["validates"]} - {*known.get("validates", ())}
        assert audiences <= self.resources.keys() | {"*"}
        if fields["may_act"] != known.get("may_act", ""):
            assert not fields["may_act"] or fields["may_act"] in self.clients

    def scopes(self) -> list[str]:
        """Of all resources."""
        pairs: list[Any] = [each.fields["scopes"] for each in self.resources.values()]
        return [scope for each in pairs for scope, _ in each]


@dataclass
class _Run:
    """The steps of one run, as the command takes them."""

    server: Server
    ids: dict[ClientKey, str]
    etags: dict[Any, str] = field(default_factory=dict)

    def take(self, step: Step) -> None:
        takes = {
            Kind.RESOURCE: self.resource,
            Kind.PERMISSION: self.permission,
            Kind.CLIENT: self.client,
            Kind.ROLE: self.role,
            Kind.ASSIGNMENT: self.assignment,
        }
        takes[step.kind](step)

    def known(self, step: Step, found: Found) -> Found:
        """What an update replaces: nobody changed it since."""
        assert self.etags.get((step.kind, step.key), step.etag) == found.etag
        self.etags[step.kind, step.key] = str(int(found.etag) + 1)
        return replace(found, etag=str(int(found.etag) + 1))

    def fields(self, step: Step) -> dict[str, Value]:
        return {
            name: self.ids[value] if isinstance(value, ClientKey) else value
            for name, value in step.fields.items()
        }

    def resource(self, step: Step) -> None:
        assert step.key != ISSUER
        there, fields = self.server.resources, self.fields(step)
        if step.verb is Verb.CREATE:
            assert step.key not in there
            self.etags[step.kind, step.key] = "1"
            there[step.key] = Found({**defaults(Kind.RESOURCE, {}), **fields}, "1")
        else:
            found = self.known(step, there[step.key])
            there[step.key] = replace(found, fields={**found.fields, **fields})
        owner = there[step.key].fields["owner"]
        assert not owner or owner in self.server.clients
        assert len(set(self.server.scopes())) == len(self.server.scopes())

    def permission(self, step: Step) -> None:
        assert step.key not in self.server.permissions
        assert step.key[0] in self.server.resources
        self.server.permissions[step.key] = str(step.fields.get("description", ""))

    def client(self, step: Step) -> None:
        there, fields = self.server.clients, self.fields(step)
        if step.verb is Verb.CREATE:
            self.ids[step.key] = self.server.register(fields)
            self.etags[step.kind, step.key] = "1"
            return
        id_ = self.ids[step.key]
        found = there[id_]
        if step.verb is Verb.RENEW_SECRET:
            assert found.state == PENDING
            there[id_] = replace(found, etag=str(int(found.etag) + 1))
            self.etags[step.kind, step.key] = there[id_].etag
            return
        new = self.known(step, found)
        if step.verb is Verb.APPROVE:
            assert found.state == PENDING
            self.server._require_metadata(found.fields, {"may_act": found.fields["may_act"]})
            fields = {"approval_expire_time": "", **fields}
            new = replace(new, state=APPROVED, was_reviewed=True)
        elif "approval_expire_time" in fields:
            assert found.state in (APPROVED, SUSPENDED)
        there[id_] = replace(new, fields={**found.fields, **fields})
        self.server._require_metadata(there[id_].fields, found.fields)

    def role(self, step: Step) -> None:
        there, fields = self.server.roles, self.fields(step)
        if step.verb is Verb.CREATE:
            assert step.key not in there
            there[step.key] = Found({**defaults(Kind.ROLE, {}), **fields}, "1")
        else:
            found = self.known(step, there[step.key])
            there[step.key] = replace(found, fields={**found.fields, **fields})
        permissions: Any = there[step.key].fields["permissions"]
        assert {*permissions} <= self.server.permissions.keys()

    def assignment(self, step: Step) -> None:
        asked: Assignment = step.key
        assert asked.role_id in self.server.roles
        assert not asked.resource_id or asked.resource_id in self.server.resources
        if asked.client is not None:
            id_ = self.ids[asked.client]
            assert id_ in self.server.clients
            asked = asked._replace(client=ClientKey("client_id", id_))
        assert asked not in self.server.assignments
        self.server.assignments.add(asked)


def problems(objects: Sequence[Declared], server: Server | None = None) -> list[str]:
    with pytest.raises(Refused) as refused:
        plan(objects, (server or Server()).current())
    return [problem.text for problem in refused.value.problems]


def lefts(found: Plan) -> list[str]:
    return [left.text for left in found.left]


# --- the whole way ---

WHOLE: Final = (
    resource(BILLING, "bills.read", owner="billing"),
    declared(Kind.PERMISSION, resource_id=BILLING, name="bills.pay", description="Pays"),
    client("billing", "spiffe://test.local/billing", may_act="orders"),
    client("orders", scopes=("bills.read",), may_act="billing", validates=(BILLING,)),
    declared(Kind.ROLE, role_id="payer", permissions=((BILLING, "bills.pay"),)),
    declared(Kind.ASSIGNMENT, role_id="payer", client="orders", resource_id=BILLING),
    declared(Kind.ASSIGNMENT, role_id="payer", user="alice"),
)


def test_what_is_declared_is_made_and_then_nothing_is_left_to_do() -> None:
    server = Server()
    found = server.apply(WHOLE)
    assert all(change.is_new for change in found.changes)
    assert [change.kind for change in found.changes] == sorted(
        (change.kind for change in found.changes), key=list(Kind).index
    )
    assert {each.state for each in server.clients.values()} == {APPROVED}
    again = server.apply(WHOLE)
    assert (again.changes, again.steps, again.left) == ((), (), ())
    assert not again.not_listed


@pytest.mark.parametrize("steps", range(14))
def test_a_run_that_is_stopped_is_finished_by_the_next(steps: int) -> None:
    whole, server = Server(), Server()
    whole.apply(WHOLE)
    server.apply(WHOLE, steps)
    server.apply(WHOLE)
    assert {each.fields["client_name"] for each in server.clients.values()} == {"billing", "orders"}
    assert len(server.clients) == 2
    assert not server.apply(WHOLE).steps
    assert server.roles == whole.roles
    assert server.permissions == whole.permissions
    assert len(server.assignments) == len(whole.assignments)


def test_nobody_is_let_in_before_who_may_act_for_it_is_told() -> None:
    steps = plan(WHOLE, Server().current()).steps
    first = next(at for at, step in enumerate(steps) if step.verb is Verb.APPROVE)
    told = [at for at, step in enumerate(steps) if step.fields.get("may_act")]
    assert len(told) == 2
    assert max(told) < first


def test_what_is_not_listed_is_told_and_left_alone() -> None:
    server = Server()
    server.apply(WHOLE)
    before = (dict(server.resources), dict(server.clients), set(server.assignments))
    found = server.apply(())
    assert not found.steps
    assert (server.resources, server.clients, server.assignments) == before
    assert found.not_listed == (
        (Kind.RESOURCE, BILLING),
        (Kind.PERMISSION, f"bills.pay@{BILLING}"),
        (Kind.CLIENT, "billing (spiffe://test.local/billing)"),
        (Kind.CLIENT, "orders"),
        (Kind.ROLE, "payer"),
        (Kind.ASSIGNMENT, f"payer to client orders on {BILLING}"),
        (Kind.ASSIGNMENT, "payer to user alice"),
    )


def test_a_field_that_is_left_out_has_its_default_but_for_what_others_chose() -> None:
    server = Server()
    uri = "spiffe://test.local/a"
    was = {"contacts": ("a@b.test",), "tls_client_auth_ca": "ca", "approval_expire_time": LATER}
    server.register({"client_name": "a", SAN: uri, **was}, state=APPROVED)
    server.apply([client("b", uri)])
    fields = server.clients["c1"].fields
    assert (fields["client_name"], fields["contacts"]) == ("b", ())
    assert (fields["tls_client_auth_ca"], fields["approval_expire_time"]) == ("ca", LATER)
    server.apply([client("b", uri, approval_expire_time=SOON)])
    assert server.clients["c1"].fields["approval_expire_time"] == SOON


# --- resources ---


def test_scopes_move_between_resources_even_in_a_ring() -> None:
    server = Server()
    server.apply([resource(BILLING, "a", "b"), resource(ORDERS, "c")])
    server.apply([resource(BILLING, "c", "b"), resource(ORDERS, "a")])
    assert server.resources[BILLING].fields["scopes"] == (("b", ""), ("c", ""))
    assert server.resources[ORDERS].fields["scopes"] == (("a", ""),)


def test_a_scope_is_never_taken_from_a_resource_that_is_not_listed() -> None:
    server = Server()
    server.apply([resource(BILLING, "a")])
    assert problems([resource(ORDERS, "a")], server) == [f"scopes: a is defined by {BILLING}"]
    twice = [resource(ORDERS, "b"), resource("urn:x", "b"), resource("urn:y", "validate")]
    assert problems(twice, server) == [
        f"scopes: b is defined by {ORDERS}",
        f"scopes: validate is defined by {ISSUER}",
    ]


def test_authsvc_itself_is_never_changed() -> None:
    server = Server()
    told = ["this is authsvc itself: declare permissions on it alone"]
    assert problems([resource(ISSUER, "admin", token_lifetime="600s")], server) == told
    told = [f"scopes: admin is defined by {ISSUER}"]
    assert problems([resource("https://other.issuer", "admin", "watch")], server) == told
    assert not server.apply(()).not_listed
    server.apply([declared(Kind.PERMISSION, resource_id=ISSUER, name="look")])
    assert (ISSUER, "look") in server.permissions


def test_a_description_of_a_permission_never_changes() -> None:
    server = Server()
    server.apply(WHOLE)
    asked = declared(Kind.PERMISSION, resource_id=BILLING, name="bills.pay", description="Takes")
    found = server.apply([asked])
    assert not found.steps
    assert "'Pays'" in lefts(found)[0]


# --- clients ---


def test_a_client_is_matched_by_its_identity_whatever_its_name() -> None:
    server = Server()
    uri = "spiffe://test.local/a"
    server.apply([client("old", uri), client("other")])
    found = server.apply([client("new", uri)])
    assert [change.is_new for change in found.changes] == [False]
    assert server.clients["c1"].fields["client_name"] == "new"


def test_a_name_matches_none_that_has_an_identity() -> None:
    server = Server()
    server.apply([client("a", "spiffe://test.local/a")])
    found = server.apply([client("a")])
    assert [change.is_new for change in found.changes] == [True]
    assert len(server.clients) == 2


def test_clients_that_cannot_be_told_apart_are_refused() -> None:
    server = Server()
    server.register({"client_name": "a"})
    server.register({"client_name": "a"}, state=APPROVED)
    assert problems([client("a")], server) == ["more than one client has this client_name: c1, c2"]
    (text,) = problems([client("b"), client("b")])
    assert text.startswith("this client is declared at")
    uri = "spiffe://test.local/a"
    (text,) = problems([client("a", uri), client("b", uri)])
    assert text.startswith("this client is declared at")
    both = client("b", uri, tls_client_auth_san_dns="b.test")
    assert problems([both]) == [f"{', '.join(IDENTITIES)} exclude each other"]


def test_who_was_turned_away_or_never_let_in_does_not_stand_for_who_is_there() -> None:
    server = Server()
    fields = {"client_name": "a", SAN: "spiffe://test.local/a"}
    server.register(fields, state=REJECTED)
    server.register(fields, state=EXPIRED)
    server.register(fields, state=APPROVED)
    asked = client("b", "spiffe://test.local/a")
    server.apply([asked])
    assert [each.fields["client_name"] for each in server.clients.values()] == ["a", "a", "b"]
    del server.clients["c3"]
    found = server.apply([asked])
    assert not found.steps
    assert lefts(found) == ["it is rejected, and left as it is"]
    del server.clients["c1"]
    server.apply([asked])
    assert [each.state for each in server.clients.values()] == [EXPIRED, APPROVED]


@pytest.mark.parametrize("state", STATES)
def test_only_an_approval_is_ever_made(state: str) -> None:
    server = Server()
    fields = {"client_name": "a", SAN: "spiffe://test.local/a", "approval_expire_time": SOON}
    id_ = server.register(fields)
    server.move(id_, APPROVED)
    server.move(id_, state)
    asked = client("b", "spiffe://test.local/a", approval_expire_time=LATER)
    found = server.apply([asked])
    is_made = state in (PENDING, APPROVED)
    assert server.clients[id_].state == (APPROVED if is_made else state)
    assert server.clients[id_].fields["client_name"] == ("b" if is_made else "a")
    assert server.clients[id_].fields["approval_expire_time"] == (LATER if is_made else SOON)
    assert lefts(found) == ([] if is_made else [f"it is {state}, and left as it is"])
    assert not server.apply([asked]).steps


SECRETIVE: Final = {"token_endpoint_auth_methods": ("client_secret_post", "tls_client_auth")}


@pytest.mark.parametrize(
    ("fields", "is_refused"),
    [
        ({SAN: "spiffe://test.local/a"}, False),
        ({SAN: "spiffe://test.local/a"} | SECRETIVE, True),
        ({}, True),
    ],
)
def test_who_registered_a_client_gets_no_approval_for_a_secret_of_its_own(
    fields: dict[str, Value], is_refused: bool
) -> None:
    server = Server()
    server.register({"client_name": "a", **fields}, registrant=STRANGER)
    asked = declared(Kind.CLIENT, client_name="a", **fields)
    if is_refused:
        assert STRANGER in problems([asked], server)[0]
    else:
        found = server.apply([asked])
        assert found.changes[0].notes == (f"let in, registered by {STRANGER}",)


def test_a_client_that_waits_with_a_secret_gets_another_before_it_is_let_in() -> None:
    server = Server()
    asked = client("a", contacts=("x@y.test",))
    server.apply([asked], 1)
    found = server.apply([asked])
    assert [step.verb for step in found.steps] == [Verb.RENEW_SECRET, Verb.APPROVE]
    assert found.steps[0].fields == {"client_name": "a"}


def test_what_takes_something_away_is_told_to_cut_tokens_off() -> None:
    server = Server()
    uri = "spiffe://test.local/a"
    server.apply([resource(BILLING, "a", "b"), client("a", uri, scopes=("a",))])
    more = plan([client("a", uri, scopes=("a", "b"))], server.current())
    less = plan([client("a", uri, scopes=("b",))], server.current())
    other = plan([client("a", uri, scopes=("a",), jwks="{}")], server.current())
    cut = [found.changes[0].notes for found in (more, less, other)]
    assert cut == [(), ("its tokens are cut off",), ("its tokens are cut off",)]
    asked = client("a", uri, scopes=("a",), first_party=True)
    assert server.apply([asked]).changes[0].notes == ()
    assert server.apply([client("a", uri, scopes=("a",))]).changes[0].notes == cut[1]


def test_scopes_and_audiences_must_be_there_once_all_is_applied() -> None:
    asked = client("a", scopes=("a", "b"), validates=(BILLING, "urn:x", "*"))
    found = problems([resource(BILLING, "a"), asked])
    assert found == ["scopes: no resource defines b", "validates: no such resource: urn:x"]


# --- whom a text means ---


def test_a_declared_client_goes_before_others_of_its_name() -> None:
    server = Server()
    server.register({"client_name": "a", SAN: "spiffe://test.local/evil"}, state=APPROVED)
    server.apply([client("a", "spiffe://test.local/a"), resource(BILLING, owner="a")])
    owner = server.clients[str(server.resources[BILLING].fields["owner"])]
    assert owner.fields[SAN] == "spiffe://test.local/a"


def test_who_is_not_let_in_is_meant_by_no_name() -> None:
    server = Server()
    fields = {"client_name": "a", SAN: "spiffe://test.local/a"}
    id_ = server.register(fields, registrant=STRANGER)
    for text in ("a", "spiffe://test.local/a"):
        assert problems([resource(BILLING, owner=text)], server) == [
            f"owner: no such client: {text}"
        ]
    server.move(id_, APPROVED)
    for text in ("a", "spiffe://test.local/a", id_):
        server.apply([resource(BILLING, owner=text)])
        assert server.resources[BILLING].fields["owner"] == id_


def test_a_text_that_means_two_clients_is_refused() -> None:
    objects = [client("a", "spiffe://test.local/1"), client("a", "spiffe://test.local/2")]
    assert len(plan(objects, Server().current()).changes) == 2
    told = ["owner: a is more than one client; use an identity"]
    assert problems([*objects, resource(BILLING, owner="a")]) == told
    mimic = client("spiffe://test.local/1", "spiffe://test.local/3")
    by_identity = resource(BILLING, owner="spiffe://test.local/1")
    assert "more than one client" in problems([*objects, mimic, by_identity])[0]


# --- roles and assignments ---


def test_what_roles_and_assignments_name_must_be_there() -> None:
    found = problems(
        [
            declared(Kind.PERMISSION, resource_id="urn:x", name="p"),
            declared(Kind.ROLE, role_id="r", permissions=((BILLING, "p"),)),
            declared(Kind.ASSIGNMENT, role_id="q", user="bob"),
            declared(Kind.ASSIGNMENT, role_id="r", resource_id=BILLING),
            declared(Kind.ASSIGNMENT, role_id="r", user="alice", client="x"),
        ]
    )
    assert found == [
        "no such resource: urn:x",
        f"permissions: no such permission: p@{BILLING}",
        "no such role: q",
        "no such user: bob",
        f"no such resource: {BILLING}",
        "one of user and client holds it",
        "one of user and client holds it",
        "client: no such client: x",
    ]


def test_the_same_thing_twice_is_refused_with_both_places() -> None:
    twice = [*WHOLE, *WHOLE]
    found = problems([replace(each, place=f"{at}") for at, each in enumerate(twice)])
    assert len(found) == len(WHOLE)
    assert all("is declared at" in text for text in found)


# --- anything ---

NAMES: Final = ("a", "b", "c")
IDS: Final = (BILLING, ORDERS, ISSUER)
SCOPES: Final = ("s", "t", "u")


def _some(values: Sequence[str]) -> st.SearchStrategy[tuple[str, ...]]:
    some = st.lists(st.sampled_from(values), unique=True, max_size=2)
    return some.map(lambda found: tuple(sorted(found)))


@st.composite
def objects(draw: st.DrawFn) -> list[Declared]:
    """A declaration of a small world; most name only what they hold, or may be there."""
    strays = draw(st.sampled_from(((), (), (), ("x",))))
    ids = draw(_some(IDS[:2]))
    scopes = draw(st.permutations(SCOPES))
    names = draw(_some(NAMES))
    uris = draw(st.permutations(("", *(f"spiffe://test.local/{name}" for name in NAMES))))
    one_client = st.sampled_from(("", *names, *strays))
    taken = [scopes[at * 2 : at * 2 + draw(st.integers(0, 2))] for at in range(len(ids))]
    found = [
        resource(id_, *each, owner=draw(one_client)) for id_, each in zip(ids, taken, strict=True)
    ]
    defined = ("validate", *(scope for each in taken for scope in each), *strays)
    of_resources = [(id_, name) for id_ in (*ids, ISSUER, *strays) for name in ("p", "q")]
    permissions = draw(st.lists(st.sampled_from(of_resources), unique=True, max_size=3))
    found += [declared(Kind.PERMISSION, resource_id=id_, name=name) for id_, name in permissions]
    found += [
        client(
            name,
            uri,
            scopes=draw(_some(defined)),
            validates=draw(_some(("*", ISSUER, *ids))),
            may_act=draw(one_client),
        )
        for name, uri in zip(names, uris, strict=False)
    ]
    holders = [{"user": "alice"}, *({"client": name} for name in names)]
    for role_id in draw(_some(("r", "q"))):
        held = draw(st.sets(st.sampled_from(permissions), max_size=2)) if permissions else ()
        found.append(declared(Kind.ROLE, role_id=role_id, permissions=tuple(sorted(held))))
        holder = draw(st.sampled_from(holders))
        found.append(declared(Kind.ASSIGNMENT, role_id=role_id, **holder))
    return draw(st.permutations(found))


def _attempt(server: Server, asked: Sequence[Declared], steps: int | None = None) -> Plan | None:
    before = server.current()
    try:
        return server.apply(asked, steps)
    except Refused:
        assert server.current() == before
        return None


@settings(max_examples=300)
@given(
    past=st.lists(objects(), max_size=3),
    reviews=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(STATES)), max_size=3),
    asked=objects(),
    stopped=st.integers(0, 8),
)
def test_whatever_is_there_is_made_what_is_declared_or_left_alone(
    past: list[list[Declared]],
    reviews: list[tuple[int, str]],
    asked: list[Declared],
    stopped: int,
) -> None:
    server = Server()
    for each in past:
        _attempt(server, each)
    for at, state in reviews:
        if at < len(server.clients):
            id_ = list(server.clients)[at]
            if server.clients[id_].state not in (REJECTED, EXPIRED):
                server.move(id_, state)
    untouched = server.current()
    if _attempt(server, asked, stopped) is None:
        return
    found = _attempt(server, asked)
    assert found is not None, "what could be begun can be finished"
    again = plan(asked, server.current())
    assert not again.steps
    assert not again.changes
    for kind, name in again.not_listed:
        if kind is Kind.RESOURCE:
            assert server.resources[name] == untouched.resources[name]
        elif kind is Kind.ROLE:
            assert server.roles[name] == untouched.roles[name]
    listed = {key_of(each.fields) for each in asked if each.kind is Kind.CLIENT}
    for was in untouched.clients:
        if key_of(was.fields) not in listed:
            assert server.clients[was.client_id] == was
    assert untouched.assignments <= server.assignments
    assert untouched.permissions.items() <= server.permissions.items()
