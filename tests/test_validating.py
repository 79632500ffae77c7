"""The examples of docs/validating.md run as they stand, against a real server."""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from authsvc_client.v1 import auth_pb2
from tests.harness import CA, ISSUER, Running, running, thumbprint, until

TEXT = (Path(__file__).parents[1] / "docs" / "validating.md").read_text()
AUDIENCE, SCOPE = "https://billing.example", "billing.charge"


class Examples:
    """Those of the document, by its headings, in one namespace."""

    def __init__(self, server: Running) -> None:
        text = TEXT.replace("localhost:7443", f"localhost:{server.app.port}")
        text = text.replace("https://authsvc.local", ISSUER)
        self.of = {
            part.partition("\n")[0]: dict(re.findall(r"^```(\w+)\n(.*?)^```", part, re.M | re.S))
            for part in text.split("\n## ")
        }
        self.names: dict[str, Any] = {}

    async def run(self, heading: str) -> None:
        program = self.of[heading]["python"]
        code = compile(program, heading, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waiting = eval(code, self.names)
        if inspect.isawaitable(waiting):
            await waiting


@asynccontextmanager
async def _agent(command: str, ready: Path) -> AsyncIterator[None]:
    program, *arguments = shlex.split(command.replace("\\\n", ""))
    assert program == "authsvc"
    process = subprocess.Popen(  # noqa: ASYNC220 - it only starts
        [sys.executable, "-m", "authsvc", *arguments, "--ready-file", str(ready)],
        stdout=subprocess.DEVNULL,
    )
    try:
        await until(lambda: ready.exists() or process.poll() is not None)
        assert process.poll() is None
        yield
    finally:
        process.terminate()
        process.wait()


def _calls(server: Running, name: str) -> float:
    return server.app.metrics.calls.labels(f"authsvc.v1.AuthService.{name}", "OK").value


async def test_four_ways_to_validate_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server").mkdir()
    monkeypatch.chdir(tmp_path)
    async with running(tmp_path / "server") as server:
        billing = await server.member("billing", "validate", "watch")
        await server.resource(AUDIENCE, SCOPE, owner=billing.client_id)
        orders = await server.member("orders", SCOPE)
        pair = {"billing.pem": billing.who.pem, "billing-key.pem": billing.who.key_pem}
        for name, content in {"ca.pem": CA.pem, **pair}.items():
            (tmp_path / name).write_bytes(content)
        tokens = [(await server.token(orders)).access_token for _ in range(5)]
        examples = Examples(server)
        names = examples.names
        names |= {"thumbprint": thumbprint(orders.who), "token": tokens[0], "tokens": tokens}

        await examples.run("# Four ways to validate a token")
        async with names["authsvc"]:
            await examples.run("Local")
            assert f"called by {orders.client_id}\n" in capsys.readouterr().out

            async with _agent(examples.of["Agent"]["sh"], tmp_path / "ready"):
                await examples.run("Agent")
                assert names["verdict"].active
                await names["beside"].close()
            assert _calls(server, "ValidateToken") == 0

            await examples.run("Batch")
            assert [verdict.active for verdict in names["verdicts"]] == [True] * len(tokens)
            assert _calls(server, "BatchValidateTokens") == 1

            request = auth_pb2.RevokeTokenRequest(token=tokens[0], client_id=orders.client_id)
            answered = await server.auth(orders.who).RevokeToken(request)
            names["revision"] = answered.revision
            await examples.run("Remote")
            assert not names["answer"].active
            assert names["answer"].revision >= answered.revision

            names["token"] = tokens[1]
            await examples.run("When authsvc is away")
            assert names["verdict"].active
            await names["validator"].close()
