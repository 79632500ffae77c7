"""Channels: mTLS, what is retried, and new certificates under stubs that live on."""

import asyncio
import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import (
    AuthsvcClient,
    Certificates,
    Reason,
    ReloadingChannel,
    Unavailable,
    channel,
    sync_channel,
)
from authsvc_client.channel import RETRIED, SERVICE_CONFIG
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub

from .support import (
    Authsvc,
    Gate,
    Pki,
    call,
    describe,
    fail,
    handlers_of,
    serving,
    stub_of,
)


async def who(_: Any, context: Any) -> StringValue:
    return StringValue(value=context.auth_context()["x509_common_name"][0].decode())


def test_certificates_from_files_show_no_key(tmp_path: Path, pki: Pki) -> None:
    made = pki.issue("a")
    for name in ("ca", "certificate", "key"):
        (tmp_path / name).write_bytes(getattr(made, name))
    read = Certificates.from_files(tmp_path / "ca", str(tmp_path / "certificate"), tmp_path / "key")
    assert read == made
    assert "PRIVATE" not in repr(read)


def test_certificates_replaced_one_after_the_other_are_refused(pki: Pki) -> None:
    old, new = pki.issue("a"), pki.issue("a")
    with pytest.raises(ValueError, match="not the certificate's"):
        Certificates(old.ca, new.certificate, old.key)


@pytest.mark.parametrize("field", ["ca", "certificate"])
def test_certificates_half_written_are_refused(pki: Pki, field: str) -> None:
    made = pki.issue("a")
    parts = {"ca": made.ca, "certificate": made.certificate, "key": made.key}
    parts[field] += made.ca[:200]
    with pytest.raises(ValueError, match=r"whole|PEM"):
        Certificates(**parts)


async def test_channel_without_a_certificate_of_the_ca_is_not_let_in(
    authsvc: Authsvc,
) -> None:
    stranger = Pki().issue("orders")
    mixed = Certificates(authsvc.certificates.ca, stranger.certificate, stranger.key)
    async with AuthsvcClient(channel(authsvc.target, mixed), timeout_s=2) as client:
        with pytest.raises(Unavailable):
            await client.validate("t")
    assert authsvc.fake.validated == []


async def test_channel_to_a_server_of_another_name_is_refused_unless_it_is_given(
    server_certificates: Certificates, client_certificates: Certificates
) -> None:
    service = describe({"Get": None})
    async with serving(server_certificates, handlers_of(service, {"Get": who})) as target:
        async with channel(target, client_certificates, server_name="localhost") as named:
            assert await call(named, service, "Get", timeout=5) == "orders"
        async with channel(target, client_certificates, server_name="elsewhere") as named:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(named, service, "Get", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def unavailable_twice(
    authsvc: Authsvc, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
) -> None:
    calls = itertools.count()

    async def before(_: Any, context: Any) -> None:
        if next(calls) < 2:
            await fail(context, code, Reason.STORE_UNAVAILABLE)

    authsvc.fake.before = before


async def test_unavailable_is_retried_where_repeating_is_harmless(authsvc: Authsvc) -> None:
    unavailable_twice(authsvc)
    await authsvc.client.validate("t")
    assert len(authsvc.fake.validated) == 3


async def test_what_a_stopping_server_cancels_is_retried_too(authsvc: Authsvc) -> None:
    unavailable_twice(authsvc, grpc.StatusCode.CANCELLED)
    await authsvc.client.validate("t")
    assert len(authsvc.fake.validated) == 3


async def test_unavailable_is_not_retried_when_issuing(authsvc: Authsvc) -> None:
    unavailable_twice(authsvc)
    with pytest.raises(Unavailable) as caught:
        await authsvc.client.issue_client_credentials("orders")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert len(authsvc.fake.issued) == 1


def test_retried_methods_exist_and_change_nothing() -> None:
    service = auth_pb2.DESCRIPTOR.services_by_name["AuthService"]
    assert set(RETRIED) <= {method.name for method in service.methods}
    assert not {"IssueToken", "RefreshToken", "RegisterClient", "RevokeToken"} & set(RETRIED)
    config = json.loads(json.dumps(SERVICE_CONFIG))["methodConfig"][0]
    assert {name["service"] for name in config["name"]} == {service.full_name}
    assert config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]


async def test_sync_channel_reaches_authsvc(
    authsvc: Authsvc, client_certificates: Certificates
) -> None:
    def blocking() -> list[str]:
        with sync_channel(authsvc.target, client_certificates) as opened:
            response = AuthServiceStub(opened).GetKeys(auth_pb2.GetKeysRequest(), timeout=5)
            return [key.kid for key in response.keys]

    assert await asyncio.to_thread(blocking) == ["k1"]


async def test_reload_gives_the_stubs_at_hand_the_new_certificate(
    pki: Pki, server_certificates: Certificates
) -> None:
    gate = Gate()

    async def slow(request: Any, context: Any) -> StringValue:
        await gate()
        return await who(request, context)

    service = describe({"Get": None, "GetSlowly": None})
    handlers = handlers_of(service, {"Get": who, "GetSlowly": slow})
    async with (
        serving(server_certificates, handlers) as target,
        ReloadingChannel(target, pki.issue("old")) as opened,
    ):
        get = stub_of(opened, service, "Get")
        assert (await get(StringValue(), timeout=5)).value == "old"
        running = asyncio.ensure_future(
            stub_of(opened, service, "GetSlowly")(StringValue(), timeout=5)
        )
        await gate.entered.wait()
        old = opened.current
        reloaded = asyncio.create_task(opened.reload(pki.issue("new")))
        await asyncio.sleep(0)
        assert (await get(StringValue(), timeout=5)).value == "new"
        gate.opened.set()
        assert (await running).value == "old"
        await reloaded
        assert old.get_state() is grpc.ChannelConnectivity.SHUTDOWN
        await opened.channel_ready()
        assert opened.get_state() is grpc.ChannelConnectivity.READY


async def test_reload_works_for_every_kind_of_call(
    pki: Pki, server_certificates: Certificates
) -> None:
    async def lists(request: Any, context: Any) -> Any:
        yield await who(request, context)

    service = describe(dict.fromkeys(("Get", "List", "Put", "Chat")))
    handlers = handlers_of(service, {"Get": who, "List": lists, "Put": who, "Chat": lists})
    async with (
        serving(server_certificates, handlers) as target,
        ReloadingChannel(target, pki.issue("old")) as opened,
    ):
        await opened.reload(pki.issue("new", datetime.timedelta(hours=1)), grace_s=0)
        for name in ("Get", "List", "Put", "Chat"):
            assert await call(opened, service, name, timeout=5) == "new"
