"""Rules that hold for any input: scopes, targets, and what crosses the edge of the wire."""

import string
from dataclasses import fields
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from authsvc.errors import RULES, AuthError, FieldViolation, Reason
from authsvc.model import (
    AuthMethod,
    Catalog,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    IdentityKind,
    Resource,
    TokenFormat,
)
from authsvc.oauth.registration import RegistrationPolicy
from authsvc.oauth.resources import is_resource_id, pick
from authsvc.oauth.scopes import is_scope, narrow
from authsvc.rpc import convert, registered, status
from authsvc_client.v1 import clients_pb2, resources_pb2

ENCODE = registered.ClientEncoder(
    RegistrationPolicy(frozenset(), frozenset(), frozenset()), lambda client: client
)

ISSUER = "https://issuer.test"
RESOURCES = {"urn:a": ("a1", "a2"), "urn:b": ("b1",), "urn:c": (), ISSUER: ("admin", "watch")}
CATALOG = Catalog(
    tuple(
        Resource(name, dict.fromkeys(scopes, ""), 0, 0, token_lifetime_s=60 + 60 * number)
        for number, (name, scopes) in enumerate(RESOURCES.items())
    )
)
SCOPES = [scope for scopes in RESOURCES.values() for scope in scopes]

some_scopes = st.frozensets(st.sampled_from([*SCOPES, "gone", "nobodys"]))
some_resources = st.frozensets(st.sampled_from([*RESOURCES, "urn:nobody"]))


def _refused(reasons: set[Reason], error: AuthError) -> None:
    assert error.reason in reasons


def _scope_refused(error: AuthError, asked: frozenset[str], registered: frozenset[str]) -> None:
    scope = error.metadata["scope"]
    assert scope in asked
    assert scope not in registered & frozenset(SCOPES)
    assert (error.reason is Reason.SCOPE_UNKNOWN) == (scope not in SCOPES)


@given(some_scopes, some_scopes)
def test_narrow_never_widens(asked: frozenset[str], registered: frozenset[str]) -> None:
    known = frozenset(SCOPES)
    try:
        found = narrow(asked, registered, CATALOG)
    except AuthError as error:
        _refused({Reason.SCOPE_UNKNOWN, Reason.SCOPE_NOT_ALLOWED}, error)
        _scope_refused(error, asked, registered)
        return
    assert found <= registered & known
    assert found == (asked or registered & known)
    assert narrow(found, registered, CATALOG) == found or not found


@given(some_scopes, some_scopes, some_scopes)
def test_narrow_in_steps_is_narrow_at_once(
    registered: frozenset[str], first: frozenset[str], second: frozenset[str]
) -> None:
    try:
        once = narrow(second, narrow(first, registered, CATALOG), CATALOG)
    except AuthError:
        return
    if second:
        assert once == narrow(second, registered, CATALOG)


@given(some_scopes, some_scopes, some_resources)
def test_target_holds_no_more_than_was_asked_for_and_allowed(
    asked: frozenset[str], registered: frozenset[str], resources: frozenset[str]
) -> None:
    """RFC 8707 section 2: every scope belongs to an audience, every audience was meant."""
    try:
        scopes = narrow(asked, registered, CATALOG)
        target = pick(resources, scopes, bool(asked), CATALOG, ISSUER)
    except AuthError as error:
        _refused({Reason.SCOPE_UNKNOWN, Reason.SCOPE_NOT_ALLOWED, Reason.INVALID_TARGET}, error)
        return
    assert target.scopes <= registered
    assert target.audiences
    assert list(target.audiences) == sorted(set(target.audiences))
    if asked:
        assert target.scopes == asked
    if resources:
        assert set(target.audiences) == resources
    else:
        assert len(target.audiences) == 1
    assert ISSUER not in target.audiences or len(target.audiences) == 1
    for scope in target.scopes:
        assert CATALOG.owner_of_scope[scope] in target.audiences
    for audience in target.audiences:
        assert registered & set(RESOURCES[audience])
        assert target.lifetime_s <= CATALOG.by_id[audience].token_lifetime_s


@given(st.text(max_size=140))
def test_scope_is_what_rfc_6749_says(text: str) -> None:
    """Appendix A.4."""
    allowed = set(string.printable[:94]) - {'"', "\\"}
    assert is_scope(text) == (0 < len(text) <= 128 and set(text) <= allowed)


@given(st.text(max_size=40))
def test_resource_id_is_ascii_without_fragment(text: str) -> None:
    if is_resource_id("urn:" + text):
        assert text.isascii()
        assert text.isprintable()
        assert not {"#", " ", '"', "<", ">", "\\", "^", "`", "{", "|", "}"} & set(text)


# --- registration metadata, there and back ---

words = st.text(max_size=20).filter(lambda text: "\0" not in text)
name = st.text(min_size=1, max_size=20)


def _some(values: Any) -> st.SearchStrategy[frozenset[Any]]:
    return st.frozensets(st.sampled_from(list(values)))


identities = (
    st.none()
    | st.builds(
        CertificateIdentity,
        st.sampled_from([IdentityKind.SAN_URI, IdentityKind.SAN_DNS]),
        name,
        name,
    )
    | st.builds(
        CertificateIdentity,
        st.just(IdentityKind.SUBJECT_DN),
        st.sampled_from(["CN=orders", "CN=orders,O=Example", "CN=a\\,b"]),
        name,
    )
)
metadatas = st.builds(
    ClientMetadata,
    client_name=name,
    grant_types=_some(GrantType),
    auth_methods=_some(AuthMethod),
    scopes=st.frozensets(name),
    identity=identities,
    bound_access_tokens=st.booleans(),
    validates=st.frozensets(name),
    texts=st.dictionaries(st.sampled_from(registered.TEXTS), name),
    contacts=st.lists(name).map(tuple),
    jwks=words,
    may_act=words,
    first_party=st.booleans(),
)
digests = st.none() | st.binary(min_size=32, max_size=32)
moments = st.none() | st.integers(0, 2**33).map(float)
clients = st.builds(
    Client,
    client_id=name,
    metadata=metadatas,
    state=st.sampled_from(list(ClientState)),
    create_time=st.integers(0, 2**33).map(float),
    update_time=st.integers(0, 2**33).map(float),
    registrant=words,
    version=st.integers(1, 10**9 - 1),
    reviewer=words,
    review_comment=words,
    review_time=moments,
    approval_expire_time=moments,
    secret_digest=digests,
    previous_secret_digest=digests,
    previous_secret_until=moments,
    registration_digest=digests,
)

UNSET_METADATA = {"redirect_uris", "jwks_uri", "software_statement"}
"""Fields of ClientMetadata that a later version honours."""


@pytest.mark.parametrize("subject", ["orders", "cn", "CN=a,,O=b", "=x", "CN=a;O=b\\"])
def test_what_is_no_subject_is_refused_rather_than_never_matched(subject: str) -> None:
    """RFC 8705 section 2.1.2: the subject in the spelling of RFC 4514."""
    metadata = clients_pb2.ClientMetadata(client_name="x", tls_client_auth_subject_dn=subject)
    with pytest.raises(AuthError) as caught:
        registered.registration(metadata)
    assert caught.value.reason is Reason.INVALID_CLIENT_METADATA
    metadata.tls_client_auth_subject_dn = "CN=orders"
    assert registered.registration(metadata).identity_value == "CN=orders"


@given(clients)
def test_client_crosses_the_wire_whole(client: Client) -> None:
    message = clients_pb2.Client.FromString(ENCODE(client).SerializeToString())
    back = registered.registration(message.metadata)
    metadata = client.metadata
    assert back.client_name == metadata.client_name
    assert back.grant_types == metadata.grant_types
    assert back.auth_methods == metadata.auth_methods
    assert back.scopes == metadata.scopes
    assert back.bound_access_tokens is metadata.bound_access_tokens
    assert back.validates == metadata.validates
    assert back.texts == metadata.texts
    assert back.contacts == metadata.contacts
    assert (back.jwks, back.may_act) == (metadata.jwks, metadata.may_act)
    assert back.first_party is metadata.first_party
    kind = metadata.identity.kind if metadata.identity else None
    assert (back.identity_kind, back.identity_value, back.identity_ca) == (
        kind,
        metadata.identity.value if metadata.identity else "",
        metadata.identity.ca if metadata.identity else "",
    )
    assert message.client_id == client.client_id
    assert int(message.state) == int(client.state)
    assert convert.version_of(message.etag) == client.version
    for field in ("reviewer", "review_comment", "registrant"):
        assert getattr(message, field) == getattr(client, field)
    for field in ("create_time", "update_time", "review_time", "approval_expire_time"):
        value = getattr(client, field)
        named: Any = field
        assert message.HasField(named) is (value is not None)
        if value is not None:
            assert getattr(message, field).ToNanoseconds() == int(value) * 10**9
    for name in ("secret_digest", "previous_secret_digest", "registration_digest"):
        digest = getattr(client, name)
        assert digest is None or digest not in message.SerializeToString()


def _full_client() -> Client:
    identity = CertificateIdentity(IdentityKind.SAN_URI, "spiffe://a/b", "c" * 64)
    metadata = ClientMetadata(
        "n",
        frozenset(GrantType),
        frozenset(AuthMethod),
        frozenset({"s"}),
        identity,
        True,
        frozenset({"v"}),
        dict.fromkeys(registered.TEXTS, "t"),
        ("c",),
        "{}",
        "m",
        True,
    )
    return Client("i", metadata, ClientState.APPROVED, 1, 2, "r", 3, "v", "c", 4, 5, b"d" * 32)


def test_every_field_of_a_client_is_filled_in_or_left_out_on_purpose() -> None:
    message = ENCODE(_full_client())
    for part, unset in ((message, set()), (message.metadata, UNSET_METADATA)):
        missing = {
            field.name
            for field in part.DESCRIPTOR.fields
            if field.containing_oneof is None or len(field.containing_oneof.fields) == 1
        } - {field.name for field, _ in part.ListFields()}
        assert missing == unset
    oneof = clients_pb2.ClientMetadata.DESCRIPTOR.oneofs_by_name["tls_client_auth"]
    assert {field.name for field in oneof.fields} == {
        f"tls_client_auth_{kind.value}" for kind in IdentityKind
    }
    assert {field.name for field in fields(ClientMetadata)} == {
        "client_name",
        "grant_types",
        "auth_methods",
        "scopes",
        "identity",
        "bound_access_tokens",
        "validates",
        "texts",
        "contacts",
        "jwks",
        "may_act",
        "first_party",
    }


def _later() -> list[FieldDescriptor]:
    by_name = clients_pb2.ClientMetadata.DESCRIPTOR.fields_by_name
    return [by_name[name] for name in sorted(UNSET_METADATA)]


@pytest.mark.parametrize("field", _later(), ids=lambda field: field.name)
def test_field_that_is_not_kept_is_refused(field: FieldDescriptor) -> None:
    value: Any = ["x"] if field.is_repeated else "x"
    message = clients_pb2.ClientMetadata(client_name="x", **{field.name: value})
    with pytest.raises(AuthError) as caught:
        registered.registration(message)
    assert caught.value.metadata == {"feature": field.name}


resources = st.builds(
    Resource,
    resource_id=name,
    scopes=st.dictionaries(name, words),
    create_time=st.just(0.0),
    update_time=st.just(0.0),
    display_name=words,
    owner_client_id=words,
    token_format=st.sampled_from(list(TokenFormat)),
    token_lifetime_s=st.integers(60, 3600),
    staleness_max_s=st.none() | st.integers(5, 120),
)


@given(resources)
def test_resource_crosses_the_wire_whole(resource: Resource) -> None:
    raw = convert.resource_pb(resource).SerializeToString()
    assert convert.resource(resources_pb2.Resource.FromString(raw)) == resource


# --- errors ---

violations = st.lists(st.builds(FieldViolation, name, name), max_size=16).map(tuple)
reasons = st.sampled_from([reason for reason in RULES if reason is not Reason.INTERNAL])


@given(
    reasons,
    st.text(max_size=3000),
    st.dictionaries(st.text("abc", min_size=1), st.text(max_size=512), max_size=1),
    violations,
    st.none() | st.floats(0, 1000),
)
def test_error_crosses_the_wire_whole_and_fits(
    reason: Reason,
    detail: str,
    metadata: dict[str, str],
    wrong: tuple[FieldViolation, ...],
    retry: float | None,
) -> None:
    error = AuthError(
        reason, detail, metadata=metadata, violations=wrong, retry_after_s=retry, cause="hunter2"
    )
    told, incident = status.public(error)
    assert told is error
    assert not incident
    raw = status.details(told)
    assert b"hunter2" not in raw
    found = status_pb2.Status.FromString(raw)
    assert found.code == RULES[reason].code.value == status.grpc_code(told.rule.code).value[0]
    assert found.message == status.text(told)
    assert found.message.startswith(RULES[reason].text)
    info = error_details_pb2.ErrorInfo()
    assert found.details[0].Unpack(info)
    assert (info.reason, info.domain, dict(info.metadata)) == (reason.name, "authsvc", metadata)
    kinds = [detail.TypeName() for detail in found.details[1:]]
    assert kinds == ["google.rpc.BadRequest"] * bool(wrong) + ["google.rpc.RetryInfo"] * (
        retry is not None
    )
    # gRPC drops trailers of more than 8 KiB: the message in percent-encoding, the rest in base64.
    message = sum(1 if 32 <= byte < 127 else 3 for byte in found.message.encode())
    assert message + len(raw) * 4 / 3 < 8192


@given(st.text())
def test_what_is_no_refusal_becomes_an_incident(text: str) -> None:
    for error in (RuntimeError(text), AuthError(Reason.INTERNAL, text, metadata={"x": text})):
        told, incident = status.public(error)
        assert told.reason is Reason.INTERNAL
        assert dict(told.metadata) == {"incident": incident}
        assert told.text == "internal error"


@given(st.integers(0, 253402300799), st.integers(0, 999_999))
def test_timestamp_keeps_the_moment(seconds: int, micros: int) -> None:
    found = convert.timestamp(seconds + micros / 1e6)
    assert found is not None
    assert abs(found.ToNanoseconds() / 1e9 - (seconds + micros / 1e6)) < 1e-4
    assert 0 <= found.nanos < 10**9


@given(st.text(max_size=12))
def test_etag_is_a_version_or_none(text: str) -> None:
    if text and not (text.isascii() and text.isdigit() and len(text) < 10):
        with pytest.raises(AuthError, match="ETAG_MISMATCH"):
            convert.version_of(text)
    else:
        assert convert.version_of(text) == (int(text) if text else None)
