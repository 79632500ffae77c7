"""One request, made at two replicas at once: it counts once, whatever Redis forgets."""

import asyncio
import base64
import json
import time
from typing import Any
from uuid import uuid4

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from authsvc_client.v1 import audit_pb2, auth_pb2, clients_pb2, resources_pb2
from authsvc_client.v1.audit_pb2_grpc import AuditServiceStub
from tests.cluster.replicas import Cast, Cluster, Replica, attempt, in_turn, rounds
from tests.harness import ADMIN, ISSUER, identity, issue_request, outcome, spiffe

KEY = ec.generate_private_key(ec.SECP256R1())
JWK = {**ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "alg": "ES256", "kid": "k"}
STRANGER = identity("stranger")
"""Any certificate: what proves who it is lies in the request."""


async def at_both(pair: list[Replica], call: Any, times: int) -> list[Any]:
    """Made at both replicas by turns, all at once."""
    return list(await asyncio.gather(*(attempt(call(pair[n % 2])) for n in range(times))))


async def test_a_registration_repeated_at_both_replicas_makes_one_client(
    pair: list[Replica], players: Cast
) -> None:
    """Design section 7, `request_id`: one client, and of its secrets only the last one counts."""

    async def one() -> None:
        request = auth_pb2.RegisterClientRequest(
            metadata=clients_pb2.ClientMetadata(
                client_name="twice",
                scopes=players.scopes,
                tls_client_certificate_bound_access_tokens=False,
            ),
            request_id=uuid4().hex,
        )
        found = await at_both(pair, lambda at: at.auth(ADMIN).RegisterClient(request), 8)
        made = [each for each in found if not isinstance(each, str)]
        assert len(made) == len(found)
        (client_id,) = {each.client.client_id for each in made}
        await pair[0].approve(client_id)
        ways = [
            outcome(pair[0].auth(STRANGER).IssueToken(issue_request(client_id, secret=secret)))
            for secret in {each.client_secret for each in made}
        ]
        assert sorted(await asyncio.gather(*ways)).count("OK") == 1

    await in_turn([one] * rounds(8), 4)


async def test_a_name_registered_at_both_replicas_belongs_to_one(pair: list[Replica]) -> None:
    for _ in range(rounds(10)):
        name = uuid4().hex
        metadata = clients_pb2.ClientMetadata(
            client_name="name", tls_client_auth_san_uri=spiffe(name)
        )
        request = auth_pb2.RegisterClientRequest(metadata=metadata)
        who = identity(name)
        found = await at_both(pair, lambda at: at.auth(who).RegisterClient(request), 4)  # noqa: B023
        refused = [each for each in found if isinstance(each, str)]
        assert refused == ["ALREADY_EXISTS"] * 3


async def assertions(pair: list[Replica], players: Cast, cluster: Cluster, times: int) -> None:
    """Each is good once: raced over the replicas, and again after Redis forgot everything."""
    who = identity(uuid4().hex)
    made = await pair[0].register(
        who,
        secret=True,
        scopes=players.scopes,
        token_endpoint_auth_methods=[clients_pb2.CLIENT_AUTH_METHOD_PRIVATE_KEY_JWT],
        jwks=json.dumps({"keys": [JWK]}),
        tls_client_certificate_bound_access_tokens=False,
    )
    client_id = made.client.client_id
    await pair[0].approve(client_id)
    for _ in range(times):
        now = int(time.time())
        claims = {"iss": client_id, "sub": client_id, "aud": ISSUER, "jti": uuid4().hex}
        proof = jwt.encode({**claims, "exp": now + 300}, KEY, "ES256", headers={"kid": "k"})
        request = issue_request(client_id, assertion=proof)
        raced = await at_both(pair, lambda at: at.auth(who).IssueToken(request), 8)  # noqa: B023
        cluster.redis.flush()
        later = await at_both(pair, lambda at: at.auth(who).IssueToken(request), 2)  # noqa: B023
        assert [each for each in raced if isinstance(each, str)] == [
            "CLIENT_AUTHENTICATION_FAILED"
        ] * 7
        assert later == ["CLIENT_AUTHENTICATION_FAILED"] * 2


async def test_an_assertion_is_good_once_over_both_replicas_and_a_flush(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    """RFC 7523 section 3; the truth is a row, so that a flushed Redis lets nobody in again."""
    await assertions(pair, players, cluster, rounds(8))


async def test_it_would_notice_an_assertion_that_was_forgotten(
    cluster: Cluster, pair: list[Replica], players: Cast
) -> None:
    """The bug: what was used is not kept."""
    await cluster.sql(
        "CREATE FUNCTION plant() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN DELETE FROM assertion WHERE digest = NEW.digest; RETURN NULL; END $$",
        "CREATE TRIGGER plant AFTER INSERT ON assertion FOR EACH ROW EXECUTE FUNCTION plant()",
    )
    try:
        with pytest.raises(AssertionError):
            await assertions(pair, players, cluster, 2)
    finally:
        await cluster.sql("DROP FUNCTION plant CASCADE")


async def test_the_audit_of_both_is_one_list_with_the_request_ids_of_the_logs(
    pair: list[Replica], players: Cast
) -> None:
    ids = [f"request-{n}-{uuid4().hex}" for n in range(6)]
    for n, request_id in enumerate(ids):
        resource = resources_pb2.Resource(
            resource_id=f"https://{request_id}.test", owner_client_id=players.owner.client_id
        )
        call = (
            pair[n % 2]
            .resources()
            .CreateResource(
                resources_pb2.CreateResourceRequest(resource=resource),
                metadata=(("x-request-id", request_id),),
            )
        )
        await call
        trailers = {key: value for key, value in await call.trailing_metadata()}  # noqa: C416
        assert trailers["x-request-id"] == request_id
    request = audit_pb2.ListAuditEventsRequest(action="CreateResource", page_size=len(ids))
    for at in pair:
        answer = await AuditServiceStub(at.channel(ADMIN)).ListAuditEvents(request)
        assert [event.x_request_id for event in answer.audit_events] == ids[::-1]


async def test_a_failure_is_found_in_the_log_of_its_replica_by_its_request_id(
    pair: list[Replica], players: Cast
) -> None:
    """By the id of the caller, or by the one that its refusal told."""
    for at, other in (pair, pair[::-1]):
        request_id = f"failing-{uuid4().hex}"
        credential = base64.b64encode(f"{players.app.client_id}:asvc_cs_wrong".encode()).decode()
        call = at.auth(STRANGER).IssueToken(
            issue_request(players.app.client_id),
            metadata=(("x-request-id", request_id), ("authorization", f"Basic {credential}")),
        )
        assert await outcome(call) != "OK"
        assert request_id in at.process.log()
        assert request_id not in other.process.log()
        assert credential not in at.process.log()
