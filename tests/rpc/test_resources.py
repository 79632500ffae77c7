"""ResourceService over the wire."""

from typing import Any

import pytest

from authsvc_client.v1 import resources_pb2
from tests.harness import ISSUER, Running, build, failure, outcome, reason


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
    ("fields", "feature"),
    [
        ({"token_format": resources_pb2.TOKEN_FORMAT_OPAQUE}, "token_format OPAQUE"),
        ({"token_format": resources_pb2.TOKEN_FORMAT_JWE}, "token_format JWE"),
        ({"encryption_jwk": "{}"}, "encryption_jwk"),
        ({"freeze_permissions": True}, "freeze_permissions"),
    ],
    ids=str,
)
async def test_what_is_not_built_says_so(
    server: Running, fields: dict[str, Any], feature: str
) -> None:
    refused = await failure(_create(server, resource_id="https://later.test", **fields))
    assert (refused.reason, refused.metadata) == ("NOT_IMPLEMENTED", {"feature": feature})
    get = resources_pb2.GetResourceRequest(resource_id="https://later.test")
    assert await reason(server.resources().GetResource(get)) == "RESOURCE_NOT_FOUND"


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
