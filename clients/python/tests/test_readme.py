"""The examples of README.md run as they stand, against each other."""

import asyncio
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from authsvc_client import RequireInterceptor, channel
from authsvc_client.clock import wall
from authsvc_client.v1 import auth_pb2
from authsvc_client.v1.annotations_pb2 import Require

from .core import tokens
from .support import Authsvc, Pki, describe, handlers_of, stub_of

README = Path(__file__).parents[1] / "README.md"


def examples() -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two programs define."""
    programs = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    called, calls = ({"__name__": "example"} for _ in programs)
    exec(programs[0], called)
    exec(programs[1], calls)
    return called, calls


def generated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for what protoc makes of the proto in the README."""
    service = describe({"GetInvoice": Require(scopes=["billing.read"])}, service="Billing")

    def add(servicer: Any, server: Any) -> None:
        handlers = handlers_of(service, {"GetInvoice": servicer.GetInvoice})
        server.add_generic_rpc_handlers((handlers,))

    def stub(opened: Any) -> Any:
        return SimpleNamespace(GetInvoice=stub_of(opened, service, "GetInvoice"))

    modules = {
        "shop": {},
        "shop.v1": {},
        "shop.v1.billing_pb2": {
            "DESCRIPTOR": service.file,
            "Invoice": StringValue,
            "GetInvoiceRequest": StringValue,
        },
        "shop.v1.billing_pb2_grpc": {
            "BillingServicer": object,
            "BillingStub": stub,
            "add_BillingServicer_to_server": add,
        },
    }
    for name, names in modules.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


async def test_examples_call_each_other(
    authsvc: Authsvc, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    generated(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.pem").write_bytes(pki.ca)
    for name in ("billing", "orders"):
        made = pki.issue(name)
        (tmp_path / f"{name}.pem").write_bytes(made.certificate)
        (tmp_path / f"{name}.key").write_bytes(made.key)
    called, calls = examples()
    authsvc.fake.keys = [auth_pb2.Jwk(**tokens.KEY.jwk)]
    now = int(wall())
    claims = tokens.claims(
        "act",
        iss="https://authsvc.local",
        aud="urn:shop:billing",
        sub="ann",
        client_id="orders",
        scope="billing.read",
        iat=now,
        exp=now + 300,
        rev=2**32,
    )
    authsvc.fake.token_of = lambda _: tokens.KEY.sign(claims)
    address = "unix:billing"
    serving = asyncio.create_task(called["main"](authsvc.target, address))
    try:
        async with channel(address, pki.issue("probe")) as probe, asyncio.timeout(10):
            await probe.channel_ready()
        assert await calls["main"](authsvc.target, address) == StringValue()
    finally:
        serving.cancel()
        await asyncio.wait((serving,))
    assert capsys.readouterr().out == "asked by orders for ann\n"
    assert list(authsvc.fake.issued[0].resources) == ["urn:shop:billing"]
    assert not authsvc.fake.validated  # it was judged where it came


def test_command_for_protoc_finds_the_option() -> None:
    import authsvc_client

    folder = Path(authsvc_client.__path__[0]) / "protos"
    assert (folder / "authsvc/v1/annotations.proto").is_file()
    assert RequireInterceptor.__doc__
