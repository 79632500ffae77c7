"""ResourceService over the wire."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from joserfc.jwe import decrypt_compact
from joserfc.jwk import ECKey

from authsvc.keys.secrets import new_id
from authsvc_client.v1 import auth_pb2, resources_pb2
from tests.harness import (
    ISSUER,
    Running,
    build,
    failure,
    hand_clock,
    named,
    outcome,
    reason,
    running,
    thumbprint,
)

OPAQUE, JWE = resources_pb2.TOKEN_FORMAT_OPAQUE, resources_pb2.TOKEN_FORMAT_JWE
_PAIR = ECKey.import_key(ec.generate_private_key(ec.SECP256R1()))
JWK = json.dumps(_PAIR.as_dict(private=False))
PRIVATE_JWK = json.dumps(_PAIR.as_dict(private=True))


async def _create(server: Running, **fields: Any) -> resources_pb2.Resource:
    fields.setdefault("resource_id", "https://a.test")
    request = resources_pb2.CreateResourceRequest(resource=resources_pb2.Resource(**fields))
    return (await server.resources().CreateResource(request)).resource


async def test_what_is_said_is_kept_and_defaults_are_filled_in(server: Running) -> None:
    owner = await server.member("owner", "validate")
    asked = build(
        resources_pb2.Resource,
        resource_id="https://full.test/api?v=1",
        display_name="Füll",
        owner_client_id=owner.client_id,
        scopes=[
            resources_pb2.Scope(name="full.read", description="Reads"),
            resources_pb2.Scope(name="full.write"),
        ],
        token_format=resources_pb2.TOKEN_FORMAT_JWT,
        token_lifetime={"seconds": 60},
        staleness_max={"seconds": 5},
    )
    made = (
        await server.resources().CreateResource(resources_pb2.CreateResourceRequest(resource=asked))
    ).resource
    get = resources_pb2.GetResourceRequest(resource_id=asked.resource_id)
    assert (await server.resources().GetResource(get)).resource == made
    assert made.etag == "1"
    assert made.create_time == made.update_time
    for field in ("etag", "create_time", "update_time"):
        made.ClearField(field)
    assert made == asked
    bare = await _create(server, resource_id="urn:bare")
    assert bare.token_format == resources_pb2.TOKEN_FORMAT_JWT
    assert bare.token_lifetime.seconds == 300
    assert not bare.HasField("staleness_max")
    assert not bare.scopes


async def test_output_only_fields_are_the_servers(server: Running) -> None:
    made = await _create(server, resource_id="urn:output", etag="99", create_time={"seconds": 1})
    assert made.etag == "1"
    assert made.create_time.seconds > 1


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"resource_id": ""}, ["resource.resource_id"]),
        ({"resource_id": "not-absolute"}, ["resource.resource_id"]),
        ({"resource_id": "//a.test"}, ["resource.resource_id"]),
        ({"resource_id": "https://a.test#x"}, ["resource.resource_id"]),
        ({"resource_id": "https:"}, ["resource.resource_id"]),
        ({"resource_id": "https://a test"}, ["resource.resource_id"]),
        ({"resource_id": "https://ä.test"}, ["resource.resource_id"]),
        ({"resource_id": 'https://a.test/"'}, ["resource.resource_id"]),
        ({"resource_id": "1https://a.test"}, ["resource.resource_id"]),
        ({"scopes": [{"name": ""}]}, ["resource.scopes[0].name"]),
        ({"scopes": [{"name": "ok"}, {"name": ""}]}, ["resource.scopes[1].name"]),
        ({"scopes": [{"name": "two words"}]}, ["resource.scopes"]),
        ({"scopes": [{"name": 'quo"te'}]}, ["resource.scopes"]),
        ({"scopes": [{"name": "back\\slash"}]}, ["resource.scopes"]),
        ({"scopes": [{"name": "ünï"}]}, ["resource.scopes"]),
        ({"scopes": [{"name": "a"}, {"name": "a"}]}, ["resource.scopes"]),
        ({"token_lifetime": {"seconds": 59}}, ["resource.token_lifetime"]),
        ({"token_lifetime": {"seconds": 3601}}, ["resource.token_lifetime"]),
        ({"token_lifetime": {"seconds": 60, "nanos": 1}}, ["resource.token_lifetime"]),
        ({"token_lifetime": {}}, ["resource.token_lifetime"]),
        ({"token_lifetime": {"seconds": -60}}, ["resource.token_lifetime"]),
        ({"staleness_max": {"seconds": 4}}, ["resource.staleness_max"]),
        ({"staleness_max": {"seconds": 121}}, ["resource.staleness_max"]),
        ({"staleness_max": {}}, ["resource.staleness_max"]),
        ({"token_format": 9}, ["resource.token_format"]),
        (
            {"resource_id": "x y", "staleness_max": {"seconds": 121}, "scopes": [{"name": "a b"}]},
            ["resource.resource_id", "resource.scopes", "resource.staleness_max"],
        ),
    ],
    ids=str,
)
async def test_field_that_is_wrong_is_named(
    server: Running, fields: dict[str, Any], wrong: list[str]
) -> None:
    refused = await failure(_create(server, **{"resource_id": "https://wrong.test"} | fields))
    assert (refused.reason, list(refused.fields)) == ("FIELD_INVALID", wrong)


async def test_resource_is_required(server: Running) -> None:
    call = server.resources().CreateResource(resources_pb2.CreateResourceRequest())
    refused = await failure(call)
    assert refused.fields == ("resource",)


@pytest.mark.parametrize(
    ("fields", "good"),
    [
        ({"token_format": OPAQUE}, True),
        ({"token_format": JWE, "encryption_jwk": JWK}, True),
        ({"token_format": JWE}, False),
        ({"token_format": OPAQUE, "encryption_jwk": JWK}, False),
        ({"encryption_jwk": JWK}, False),
        ({"token_format": JWE, "encryption_jwk": "{}"}, False),
        ({"token_format": JWE, "encryption_jwk": "no JSON"}, False),
        ({"token_format": JWE, "encryption_jwk": PRIVATE_JWK}, False),
        ({"freeze_permissions": True}, True),
    ],
    ids=named,
)
async def test_form_of_tokens_and_their_key(
    server: Running, fields: dict[str, Any], good: bool
) -> None:
    name = f"urn:form:{new_id()}"
    get = resources_pb2.GetResourceRequest(resource_id=name)
    if not good:
        refused = await failure(_create(server, resource_id=name, **fields))
        assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("resource.encryption_jwk",))
        assert "key" not in refused.metadata
        assert await reason(server.resources().GetResource(get)) == "RESOURCE_NOT_FOUND"
        return
    await _create(server, resource_id=name, **fields)
    found = (await server.resources().GetResource(get)).resource
    for field, value in fields.items():
        assert getattr(found, field) == value


async def test_nearest_values_are_taken(server: Running) -> None:
    near: tuple[dict[str, Any], ...] = (
        {"token_lifetime": {"seconds": 60}},
        {"token_lifetime": {"seconds": 3600}},
        {"staleness_max": {"seconds": 5}},
        {"staleness_max": {"seconds": 120}},
        {"scopes": [{"name": "!#[]^_~" + "x" * 121}]},
        {"resource_id": "urn:x"},
        {"resource_id": "https://near.test/" + "x" * 494},
    )
    for number, fields in enumerate(near):
        settled: dict[str, Any] = {"resource_id": f"https://near{number}.test"} | fields
        assert await outcome(_create(server, **settled)) == "OK", fields


async def test_id_and_scopes_are_unique(server: Running) -> None:
    await _create(server, resource_id="https://taken.test", scopes=[{"name": "taken.read"}])
    for fields in (
        {"resource_id": "https://taken.test"},
        {"resource_id": "https://other.test", "scopes": [{"name": "taken.read"}]},
        {"resource_id": "https://other.test", "scopes": [{"name": "admin"}]},
        {"resource_id": ISSUER},
    ):
        assert await reason(_create(server, **fields)) == "ALREADY_EXISTS"
    get = resources_pb2.GetResourceRequest(resource_id="https://other.test")
    assert await reason(server.resources().GetResource(get)) == "RESOURCE_NOT_FOUND"
    made = await _create(server, resource_id="https://other.test", scopes=[{"name": "Taken.read"}])
    assert made.scopes[0].name == "Taken.read"


async def test_owner_must_be_a_client(server: Running) -> None:
    call = _create(server, resource_id="https://owned.test", owner_client_id="nobody")
    assert await reason(call) == "CLIENT_NOT_FOUND"
    owner = await server.member("owns", "validate", approve=False)
    await _create(server, resource_id="https://owned.test", owner_client_id=owner.client_id)


async def test_pages_by_owner_and_ids_of_any_length(server: Running) -> None:
    owner = await server.member("lister", "validate")
    ids = [f"https://list.test/{number}/" + "x" * 490 for number in range(4)]
    for resource_id in ids:
        await _create(server, resource_id=resource_id, owner_client_id=owner.client_id)
    seen, token = [], ""
    while True:
        request = resources_pb2.ListResourcesRequest(
            page_size=1, page_token=token, owner_client_id=owner.client_id
        )
        page = await server.resources().ListResources(request)
        seen += [found.resource_id for found in page.resources]
        token = page.next_page_token
        if not token:
            break
    assert seen == ids


# --- changes ---


async def _update(
    server: Running, resource_id: str, *paths: str, **fields: Any
) -> resources_pb2.UpdateResourceResponse:
    request = build(
        resources_pb2.UpdateResourceRequest,
        resource={"resource_id": resource_id} | fields,
        update_mask={"paths": paths},
    )
    return await server.resources().UpdateResource(request)


async def _delete(server: Running, resource_id: str, etag: str = "") -> int:
    request = resources_pb2.DeleteResourceRequest(resource_id=resource_id, etag=etag)
    return (await server.resources().DeleteResource(request)).revision


async def _get(server: Running, resource_id: str) -> resources_pb2.Resource:
    request = resources_pb2.GetResourceRequest(resource_id=resource_id)
    return (await server.resources().GetResource(request)).resource


async def test_what_the_mask_names_is_changed_and_nothing_else(server: Running) -> None:
    owner = await server.member("first-owner", "validate")
    other = await server.member("second-owner", "validate")
    name = "urn:changing"
    before = await _create(
        server,
        resource_id=name,
        display_name="Before",
        owner_client_id=owner.client_id,
        scopes=[{"name": "changing.read", "description": "Reads"}, {"name": "changing.write"}],
        token_lifetime={"seconds": 60},
        staleness_max={"seconds": 5},
    )
    asked: dict[str, Any] = {
        "display_name": "After",
        "owner_client_id": other.client_id,
        "scopes": [{"name": "changing.read", "description": "Looks"}, {"name": "changing.add"}],
        "token_format": JWE,
        "token_lifetime": {"seconds": 90},
        "staleness_max": {"seconds": 6},
        "encryption_jwk": JWK,
        "freeze_permissions": True,
    }
    expected = before
    head = server.app.state.revision
    for paths in (
        ["display_name"],
        ["owner_client_id"],
        ["scopes"],
        ["token_lifetime", "staleness_max"],
        ["freeze_permissions"],
        ["token_format", "encryption_jwk"],
    ):
        answer = await _update(server, name, *paths, **asked)
        wanted = build(resources_pb2.Resource, **{path: asked[path] for path in paths})
        expected.MergeFrom(wanted)
        expected.etag = str(int(expected.etag) + 1)
        expected.update_time.CopyFrom(answer.resource.update_time)
        if "scopes" in paths:
            assert answer.resource.scopes[0].name == "changing.add"  # sorted
            expected.ClearField("scopes")
            expected.scopes.extend(reversed(wanted.scopes))
        assert answer.resource == expected == await _get(server, name)
        assert answer.revision > head
        assert server.app.state.revision >= answer.revision
        head = answer.revision
    await _update(
        server,
        name,
        *("owner_client_id", "scopes", "staleness_max", "token_format", "encryption_jwk"),
        "token_lifetime",
    )
    bare = await _get(server, name)
    assert not bare.owner_client_id
    assert not bare.scopes
    assert not bare.HasField("staleness_max")
    assert (bare.token_format, bare.encryption_jwk) == (resources_pb2.TOKEN_FORMAT_JWT, "")
    assert bare.token_lifetime.seconds == 300
    assert bare.display_name == "After"


async def test_changes_that_are_refused_change_nothing(server: Running) -> None:
    name = "urn:firm"
    made = await _create(server, resource_id=name, scopes=[{"name": "firm.read"}])
    await _create(server, resource_id="urn:neighbour", scopes=[{"name": "neighbour.read"}])
    for paths, fields, told in (
        ([], {"display_name": "x"}, "FIELD_INVALID"),
        (["nothing"], {}, "FIELD_INVALID"),
        (["resource_id"], {}, "FIELD_INVALID"),
        (["etag"], {}, "FIELD_INVALID"),
        (["create_time"], {}, "FIELD_INVALID"),
        (["display_name", "scopes.name"], {}, "FIELD_INVALID"),
        (["*"], {}, "FIELD_INVALID"),
        (["display_name"], {"etag": "2"}, "ETAG_MISMATCH"),
        (["display_name"], {"etag": "x"}, "ETAG_MISMATCH"),
        (["owner_client_id"], {"owner_client_id": "nobody"}, "CLIENT_NOT_FOUND"),
        (["scopes"], {"scopes": [{"name": "neighbour.read"}]}, "ALREADY_EXISTS"),
        (["scopes"], {"scopes": [{"name": "admin"}]}, "ALREADY_EXISTS"),
        (["scopes"], {"scopes": [{"name": "a b"}]}, "FIELD_INVALID"),
        (["token_format"], {"token_format": JWE}, "FIELD_INVALID"),
        (["encryption_jwk"], {"encryption_jwk": JWK}, "FIELD_INVALID"),
        (["staleness_max"], {"staleness_max": {"seconds": 121}}, "FIELD_INVALID"),
    ):
        head = await server.head()
        assert await reason(_update(server, name, *paths, **fields)) == told, (paths, fields)
        assert await server.head() == head
        assert await _get(server, name) == made
    assert await reason(_update(server, "urn:none", "display_name")) == "RESOURCE_NOT_FOUND"
    assert await reason(_delete(server, "urn:none")) == "RESOURCE_NOT_FOUND"
    assert await reason(_delete(server, name, "2")) == "ETAG_MISMATCH"
    assert await _get(server, name) == made
    changed = await _update(server, name, "display_name", display_name="x", etag="1")
    assert changed.resource.etag == "2"
    await _delete(server, name, "2")


async def test_authsvc_itself_stays_what_it_is(server: Running) -> None:
    own = await _get(server, ISSUER)
    for path in (
        *("scopes", "token_format", "encryption_jwk", "owner_client_id", "freeze_permissions"),
        "resource_id",
    ):
        refused = await failure(_update(server, ISSUER, path))
        assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("update_mask",)), path
    refused = await failure(_delete(server, ISSUER))
    assert (refused.reason, refused.fields) == ("FIELD_INVALID", ("resource_id",))
    assert await _get(server, ISSUER) == own
    lifetime = {"seconds": 120}
    changed = await _update(server, ISSUER, "token_lifetime", token_lifetime=lifetime)
    assert changed.resource.token_lifetime.seconds == 120
    await _update(server, ISSUER, "token_lifetime")


async def test_of_changes_at_once_each_counts(server: Running) -> None:
    name = "urn:busy"
    await _create(server, resource_id=name)
    texts = [f"name {number}" for number in range(20)]
    answers = await asyncio.gather(
        *(_update(server, name, "display_name", display_name=text) for text in texts)
    )
    assert sorted(int(answer.resource.etag) for answer in answers) == list(range(2, 22))
    assert len({answer.revision for answer in answers}) == 20
    found = await asyncio.gather(
        *(outcome(_update(server, name, "display_name", etag="21")) for _ in range(5))
    )
    assert sorted(found) == ["ETAG_MISMATCH"] * 4 + ["OK"]


async def test_tokens_die_with_their_resource_and_stay_dead(tmp_path: Path) -> None:
    """Also where the id, and its scopes, are another owner's by then."""
    async with running(tmp_path, clock=hand_clock()) as server:
        first = await server.member("first", "validate")
        second = await server.member("second", "validate")
        gateway = await server.member("gateway", "validate", validates=["*"])
        tokens = {}
        formats: dict[str, dict[str, Any]] = {
            "urn:jwt": {},
            "urn:opaque": {"token_format": OPAQUE},
            "urn:jwe": {"token_format": JWE, "encryption_jwk": JWK},
        }
        for name, more in formats.items():
            await server.resource(name, f"{name}.read", owner=first.client_id, **more)
        client = await server.member("client", *(f"{name}.read" for name in formats))
        for name in formats:
            tokens[name] = (await server.token(client, resources=[name])).access_token
        both = await server.token(client, resources=["urn:jwt"])
        tokens["kept"] = both.access_token
        for name in formats:
            assert await server.judged(first.who, tokens[name], of=client.who) == "OK"
            revision = await _delete(server, name)
            assert server.app.state.revision >= revision
            assert await server.judged(gateway.who, tokens[name], of=client.who) == "TOKEN_CUT_OFF"
            answer = await server.verdict(first.who, tokens[name], of=client.who)
            assert answer.SerializeToString() == b""  # who owned it is entitled to nothing now
            await server.resource(name, f"{name}.read", owner=second.client_id)
            assert await server.judged(second.who, tokens[name], of=client.who) == "TOKEN_CUT_OFF"
            fresh = (await server.token(client, resources=[name])).access_token
            assert await server.judged(second.who, fresh, of=client.who) == "OK"
        assert await server.judged(second.who, tokens["kept"], of=client.who) == "TOKEN_CUT_OFF"


async def test_encrypted_token_is_read_by_its_resource_alone_and_judged_here(
    server: Running,
) -> None:
    owner = await server.member("jwe-owner", "validate")
    await server.resource(
        "urn:sealed", "sealed.read", owner=owner.client_id, token_format=JWE, encryption_jwk=JWK
    )
    client = await server.member("jwe-client", "sealed.read")
    issued = await server.token(client)
    token = issued.access_token
    assert token.count(".") == 4
    inner = decrypt_compact(token, _PAIR).plaintext
    assert inner is not None
    assert inner.count(b".") == 2
    verdict = await server.verdict(owner.who, token, of=client.who, view=auth_pb2.TOKEN_VIEW_CLAIMS)
    assert verdict.active
    assert verdict.claims.jti == issued.jti
    assert verdict.claims.certificate_thumbprint == thumbprint(client.who)
    parts = token.split(".")
    for at in range(5):
        changed = [*parts[:at], "A" + parts[at][1:], *parts[at + 1 :]]
        if changed != parts:
            text = ".".join(changed)
            assert await server.judged(owner.who, text, of=client.who) == "TOKEN_MALFORMED"
    for text in (token + "=", token + "A", token[:-1], " " + token, token + "."):
        assert await server.judged(owner.who, text, of=client.who) == "TOKEN_MALFORMED"
    revoke = auth_pb2.RevokeTokenRequest(token=token)
    await server.auth(client.who).RevokeToken(revoke)
    assert await server.judged(owner.who, token, of=client.who) == "TOKEN_REVOKED"
