"""The demo: authsvc and two services on this machine, and everything that goes wrong between them.

Everything that it makes is in a temporary directory, every port is the kernel's choice.
"""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpc

from authsvc_client import (
    AuthsvcClient,
    AuthsvcError,
    Certificates,
    Reason,
    Unauthenticated,
    channel,
)
from authsvc_client.v1 import auth_pb2, roles_pb2, users_pb2
from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub
from authsvc_client.v1.users_pb2_grpc import UserServiceStub
from services.v1 import orders_pb2, orders_pb2_grpc

HERE = Path(__file__).parent
CALLS = 1000
AUDIENCES = ("https://orders.example", "https://billing.example")
AUTHSVC = "https://authsvc.local"
PASSWORD, NEW_PASSWORD = "correct horse battery staple", "something else entirely"
START_S = 60.0
CALL_S = 30.0


class Failed(Exception):
    """A step did not end as it must."""


class Demo:
    """The stage: processes, certificates, clients."""

    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home = home
        self.pki = home / "pki"
        self._stack = stack
        self._environment = {**os.environ, "AUTHSVC_STATE_DIR": str(home)}
        for name in [name for name in self._environment if name.startswith("AUTHSVC_")]:
            if name != "AUTHSVC_STATE_DIR":
                del self._environment[name]
        self._environment["PYTHONPATH"] = str(HERE)
        # So that a new signing key may sign after seconds: here nobody keeps the old set for long.
        self._environment["AUTHSVC_STALENESS_MAX_S"] = "15"
        self._environment["AUTHSVC_KEYS__MAX_AGE_S"] = "5"
        self._environment["AUTHSVC_GRANTS__PASSWORD"] = "true"
        self.address = ""
        self.authsvc: subprocess.Popen[bytes] | None = None
        self.clients: dict[str, str] = {}
        self.alice = ""
        """Her user id."""

    def spawn(self, *arguments: str, log: str) -> "subprocess.Popen[bytes]":
        """A process that does not outlive the demo; its output goes to a file."""
        with (self.home / f"{log}.log").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._stack.callback(stop, process)
        return process

    def start_authsvc(self) -> None:
        """Starts it, on the ports of its first start."""
        ready = self.home / "ready.json"
        ready.unlink(missing_ok=True)
        port = self.address.rpartition(":")[2] or "0"
        ports = ("--port", port, "--metrics-port", "0", "--health-port", "0")
        self.authsvc = self.spawn(
            "authsvc", "serve", *ports, "--ready-file", str(ready), log="authsvc"
        )
        self.address = f"localhost:{json.loads(self.wait_for(ready, self.authsvc))['port']}"
        self._environment["AUTHSVC_ADDRESS"] = self.address

    def wait_for(self, file: Path, process: "subprocess.Popen[bytes]") -> str:
        """The content of a file that a process writes once it serves."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and process.poll() is None:
            if file.exists() and (text := file.read_text()):
                return text
            time.sleep(0.02)
        logs = "\n".join(log.read_text()[-2000:] for log in self.home.glob("*.log"))
        raise Failed(f"{file.stem} was not ready in time\n{logs}")

    def cli(self, *arguments: str) -> Any:
        """What a person would type; answers its JSON."""
        print(f"  $ authsvc {' '.join(arguments)}", flush=True)
        done = self._run(*arguments, "--json")
        if done.returncode:
            raise Failed(done.stderr)
        return json.loads(done.stdout)

    def activate(self, kid: str) -> bool:
        """Lets a signing key sign, unless a validator may not know it yet."""
        done = self._run("key", "activate", kid)
        if done.returncode and "SIGNING_KEY_NOT_READY" not in done.stderr:
            raise Failed(done.stderr)
        return done.returncode == 0

    def _run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "authsvc", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def declare(self) -> None:
        """What is declared in files: resources, clients, roles, and who holds them."""
        for name in ("billing", "orders", "till", "partner"):
            self.cli("pki", "issue", name, "--server")
        password = self.home / "password"
        password.write_text(PASSWORD)
        made = self.cli("user", "create", "alice", "--password-file", str(password))
        self.alice = made["user"]["user_id"]
        done = self.cli("apply", "-f", str(HERE / "declared"), "--yes")
        print(f"    {done['applied']} changes made", flush=True)
        found = self.cli("client", "list")["clients"]
        self.clients = {each["metadata"]["client_name"]: each["client_id"] for each in found}

    def admit(self, name: str, *scopes: str, grants: Sequence[str] = ()) -> None:
        """A service asks to be a client by its own certificate; an administrator approves it."""
        self.cli("pki", "issue", name, "--server")
        wanted = [word for scope in scopes for word in ("--scope", scope)]
        wanted += [word for grant in grants for word in ("--grant", grant)]
        spiffe_id = f"spiffe://authsvc.local/{name}"
        asked = self.cli(
            "client", "register", "--as", name, "--name", name, "--san-uri", spiffe_id, *wanted
        )
        self.clients[name] = asked["client"]["client_id"]
        self.cli("client", "approve", self.clients[name])

    def start_service(self, name: str, *arguments: str) -> str:
        """Starts a service of the example and answers its address."""
        file = self.home / f"{name}.port"
        process = self.spawn(
            f"services.{name}",
            *("--client-id", self.clients[name], "--pki", str(self.pki)),
            *("--authsvc", self.address, "--port-file", str(file), *arguments),
            log=name,
        )
        return f"localhost:{self.wait_for(file, process)}"

    def certificates(self, name: str) -> Certificates:
        """Those of a service, or of the administrator."""
        return Certificates.from_files(
            self.pki / "ca.pem", self.pki / f"{name}.pem", self.pki / f"{name}-key.pem"
        )


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process, politely at first."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Steps:
    """The lines that the demo is about."""

    def __init__(self) -> None:
        self.ok = self.all = 0

    @contextmanager
    def step(self, what: str) -> Iterator[list[str]]:
        """One line: what was tried, what came out, how long it took."""
        self.all += 1
        notes: list[str] = []
        started = time.perf_counter()
        try:
            yield notes
        except Exception as error:  # whatever it is, the line says FAIL and the rest is shown
            print(f"FAIL  {what}: {type(error).__name__}: {error}", flush=True)
            return
        took = (time.perf_counter() - started) * 1000
        self.ok += 1
        print(f"ok    {what:<58} {took:>9.1f} ms  {' '.join(notes)}", flush=True)


class Shop:
    """The one who calls orders, with whatever token and certificate the demo hands it."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def place(self, token: str, certificates: Certificates, count: int = 1) -> int:
        """Places orders; raises AuthsvcError."""
        request = orders_pb2.PlaceOrdersRequest(count=count)
        answer = await self._call(certificates, token, lambda stub: stub.PlaceOrders, request)
        return int(answer.charged)

    async def cancel(self, token: str, certificates: Certificates) -> None:
        """Cancels an order; raises AuthsvcError."""
        request = orders_pb2.CancelOrderRequest(order_id="1")
        await self._call(certificates, token, lambda stub: stub.CancelOrder, request)

    async def list_orders(self, token: str, certificates: Certificates) -> str:
        """Lists the orders; answers who was let in. Raises AuthsvcError."""
        request = orders_pb2.ListOrdersRequest()
        answer = await self._call(certificates, token, lambda stub: stub.ListOrders, request)
        return str(answer.asked_by)

    async def give_back(self, token: str, certificates: Certificates) -> tuple[str, str]:
        """Returns an order; answers who got the money, and who asked for that."""
        request = orders_pb2.ReturnOrderRequest(order_id="1")
        answer = await self._call(certificates, token, lambda stub: stub.ReturnOrder, request)
        return answer.refunded_to, answer.asked_by

    async def _call(
        self,
        certificates: Certificates,
        token: str,
        method: Callable[[Any], Callable[..., Awaitable[Any]]],
        request: Any,
    ) -> Any:
        async with channel(self._address, certificates) as opened:
            stub = orders_pb2_grpc.OrdersServiceStub(opened)
            metadata = (("authorization", f"Bearer {token}"),)
            try:
                return await method(stub)(request, metadata=metadata, timeout=CALL_S)
            except grpc.aio.AioRpcError as error:
                raise AuthsvcError.from_rpc_error(error) from error


async def refused(call: Awaitable[Any], *reasons: Reason) -> str:
    """That a call was refused for one of these reasons."""
    try:
        await call
    except AuthsvcError as error:
        if error.reason in reasons:
            return error.reason.name
        raise
    raise Failed("it was not refused")


async def story(demo: Demo, steps: Steps, shop: Shop) -> None:
    """What is shown, in order."""
    mine = demo.certificates("shop")
    async with (
        AuthsvcClient(channel(demo.address, mine)) as authsvc,
        AuthsvcClient(channel(demo.address, demo.certificates("admin"))) as admin,
    ):
        client_id, audience = demo.clients["shop"], ["https://orders.example"]
        with steps.step("a token by client_credentials over mTLS") as notes:
            token = await authsvc.issue_client_credentials(client_id, resources=audience)
            notes.append(f"{' '.join(token.scopes)} for {' '.join(token.audiences)}")
        with steps.step(f"{CALLS} calls to billing, each validated") as notes:
            started = time.perf_counter()
            if await shop.place(token.value, mine, CALLS) != CALLS:
                raise Failed("some were not charged")
            each = (time.perf_counter() - started) / CALLS * 1000
            notes.append(f"{each:.2f} ms each, validated by a call to authsvc")
        with steps.step("a call without the scope is refused") as notes:
            notes.append(await refused(shop.cancel(token.value, mine), Reason.INSUFFICIENT_SCOPE))
        with steps.step("the token stolen, over another certificate, is refused") as notes:
            thief = demo.certificates("billing")
            notes.append(await refused(shop.place(token.value, thief), Reason.PROOF_MISMATCH))
        with steps.step("the token itself still works"):
            await shop.place(token.value, mine)
        await act_for_the_shop(demo, steps, shop, authsvc)
        await refresh(demo, steps, shop, authsvc)
        await people(demo, steps, shop)
        with steps.step("the signing key rotated under traffic, no call failed") as notes:
            notes.append(await rotate(demo, shop, authsvc))
        with steps.step("the token revoked by an administrator: no call passes") as notes:
            notes.append(await revoke(admin, shop, token.value, token.jti, mine))
        living = await authsvc.issue_client_credentials(client_id, resources=audience)
        with steps.step("authsvc killed with SIGKILL: living tokens pass, no dead ones") as notes:
            await kill(demo)
            await shop.place(living.value, mine)
            notes.append(await refused(shop.place(token.value, mine), Reason.TOKEN_REVOKED))
        with steps.step("authsvc started again on the same state"):
            await asyncio.to_thread(demo.start_authsvc)
        with steps.step("the revoked token is still dead, one from before still alive") as notes:
            notes.append(await refused(shop.place(token.value, mine), Reason.TOKEN_REVOKED))
            await shop.place(living.value, mine)
        with steps.step("the shop suspended: its living token is dead") as notes:
            await asyncio.to_thread(demo.cli, "client", "suspend", client_id)
            call = partial(shop.place, living.value, mine)
            took = await until_refused(call, Reason.TOKEN_CUT_OFF)
            notes.append(f"refused {took:.1f} ms later")


async def act_for_the_shop(demo: Demo, steps: Steps, shop: Shop, authsvc: AuthsvcClient) -> None:
    """A chain of two services: the shop calls orders, orders calls billing for the shop."""
    mine, client_id = demo.certificates("shop"), demo.clients["shop"]
    names = {client: name for name, client in demo.clients.items()}
    with steps.step("orders exchanges the shop's token and acts for it at billing") as notes:
        scopes = ["orders.place", "billing.refund"]
        token = await authsvc.issue_client_credentials(client_id, scopes, AUDIENCES)
        subject, actor = await shop.give_back(token.value, mine)
        notes.append(f"billing saw {names[subject]}, for whom {names[actor]} acts")
        if (names[subject], names[actor]) != ("shop", "orders"):
            raise Failed("it saw somebody else")
    with steps.step("with what the shop's token cannot do, orders cannot either") as notes:
        token = await authsvc.issue_client_credentials(client_id, ["orders.place"])
        call = shop.give_back(token.value, mine)
        notes.append(await refused(call, Reason.SCOPE_NOT_ALLOWED))


async def refresh(demo: Demo, steps: Steps, shop: Shop, authsvc: AuthsvcClient) -> None:
    """A refresh token: a lost reply is forgiven, reuse is not."""
    mine, client_id = demo.certificates("shop"), demo.clients["shop"]
    own = await authsvc.issue_client_credentials(client_id, ["orders.place"])
    opened = await authsvc.exchange(client_id, own.value, refreshable=True)
    with steps.step("a refresh token whose reply was lost gives the same successor") as notes:
        second = await authsvc.refresh(client_id, opened.refresh_token)
        again = await authsvc.refresh(client_id, opened.refresh_token)
        if second.refresh_token != again.refresh_token:
            raise Failed("it forked")
        await shop.place(again.value, mine)
        notes.append("and an access token of its own")
    with steps.step("used again after its successor was used: the grant is dead") as notes:
        third = await authsvc.refresh(client_id, second.refresh_token)
        reused = authsvc.refresh(client_id, opened.refresh_token)
        notes.append(await refused(reused, Reason.REFRESH_TOKEN_REUSED))
        await refused(authsvc.refresh(client_id, third.refresh_token), Reason.INVALID_GRANT)
        await until_refused(partial(shop.place, third.value, mine), Reason.GRANT_REVOKED)


async def people(demo: Demo, steps: Steps, shop: Shop) -> None:
    """A person at the till, what she may do, and what a changed password ends."""
    mine, theirs = demo.certificates("till"), demo.certificates("partner")
    async with (
        AuthsvcClient(channel(demo.address, mine)) as till,
        AuthsvcClient(channel(demo.address, theirs)) as partner,
        channel(demo.address, demo.certificates("admin")) as admin,
        channel(demo.address, mine) as anybody,
    ):
        roles = RoleServiceStub(admin)
        cashier = roles_pb2.RoleAssignment(role_id="cashier", user_id=demo.alice)
        with steps.step("alice logs in at the till: her role lets her list orders") as notes:
            hers = await log_in(till, demo, PASSWORD)
            if await shop.list_orders(hers.access_token, mine) != demo.alice:
                raise Failed("orders saw somebody else")
            notes.append("scope orders.place, live permission orders.list")
        with steps.step("her role withdrawn under the living token") as notes:
            await roles.UnassignRole(roles_pb2.UnassignRoleRequest(role_assignment=cashier))
            denied = Reason.INSUFFICIENT_PERMISSIONS
            call = partial(shop.list_orders, hers.access_token, mine)
            took = await until_refused(call, denied)
            notes.append(f"{denied.name} {took:.1f} ms after UnassignRole had answered")
        with steps.step("and given back: the same token is good again"):
            await roles.AssignRole(roles_pb2.AssignRoleRequest(role_assignment=cashier))
            await shop.list_orders(hers.access_token, mine)
        lent = await partner.exchange(demo.clients["partner"], hers.access_token, refreshable=True)
        used = await partner.refresh(demo.clients["partner"], lent.refresh_token)
        with steps.step("alice changes her password, and stays where she is") as notes:
            own = await till.exchange(demo.clients["till"], hers.access_token, [], [AUTHSVC])
            await UserServiceStub(anybody).SetPassword(
                users_pb2.SetPasswordRequest(
                    current_password=PASSWORD, new_password=NEW_PASSWORD, keep_session=True
                ),
                metadata=(("authorization", f"Bearer {own.value}"),),
                timeout=CALL_S,
            )
            await shop.list_orders(hers.access_token, mine)
            await till.refresh(demo.clients["till"], hers.refresh_token)
            await refused(log_in(till, demo, PASSWORD), Reason.INVALID_GRANT)
            await log_in(till, demo, NEW_PASSWORD)
            notes.append("her session lives, the old password is dead")
        with steps.step("what a third party got from her is over") as notes:
            again = partner.refresh(demo.clients["partner"], used.refresh_token)
            await refused(again, Reason.INVALID_GRANT)
            listing = shop.list_orders(used.value, theirs)
            notes.append(await refused(listing, Reason.GRANT_REVOKED))


async def log_in(till: AuthsvcClient, demo: Demo, password: str) -> auth_pb2.IssuedToken:
    """The password grant, which is for first parties alone; raises AuthsvcError."""
    request = auth_pb2.IssueTokenRequest(
        password=auth_pb2.PasswordGrant(username="alice", password=password),
        client_id=demo.clients["till"],
        resources=["https://orders.example"],
    )
    try:
        return (await till.stub.IssueToken(request, timeout=CALL_S)).token
    except grpc.aio.AioRpcError as error:
        raise AuthsvcError.from_rpc_error(error) from error


async def until_refused(call: Callable[[], Awaitable[Any]], reason: Reason) -> float:
    """Calls until it bites; answers how many milliseconds that took."""
    answered = time.perf_counter()
    while time.perf_counter() - answered < CALL_S:
        try:
            await call()
        except AuthsvcError as error:
            if error.reason is not reason:
                raise
            return (time.perf_counter() - answered) * 1000
    raise Failed("it did not bite")


async def rotate(demo: Demo, shop: Shop, authsvc: AuthsvcClient) -> str:
    """Publishes a key and lets it sign as soon as everybody knows it, while the shop calls on."""
    mine, client_id = demo.certificates("shop"), demo.clients["shop"]
    rotated, calls = asyncio.Event(), 0

    async def traffic() -> None:
        nonlocal calls
        last = False
        while not last:
            last = rotated.is_set()  # one more round with the new key
            token = await authsvc.issue_client_credentials(client_id, ["orders.place"])
            calls += await shop.place(token.value, mine, 10)

    running = asyncio.create_task(traffic())
    prepared = await asyncio.to_thread(demo.cli, "key", "prepare")
    kid = prepared["signing_key"]["kid"]
    deadline = time.monotonic() + START_S
    while not await asyncio.to_thread(demo.activate, kid):
        if running.done() or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    rotated.set()
    await running
    token = await authsvc.issue_client_credentials(client_id, ["orders.place"])
    if key_of(token.value) != kid:
        raise Failed("the new key does not sign")
    return f"{calls} calls"


def key_of(token: str) -> str:
    """The `kid` in a token's header."""
    header = token.partition(".")[0]
    return str(json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))["kid"])


async def revoke(
    admin: AuthsvcClient, shop: Shop, token: str, jti: str, certificates: Certificates
) -> str:
    """Revokes, then calls until it bites; answers how long that took."""
    started = time.perf_counter()
    await admin.revoke_jti(jti)
    answered = time.perf_counter()
    while True:
        try:
            await shop.place(token, certificates)
        except Unauthenticated as error:
            if error.reason is not Reason.TOKEN_REVOKED:
                raise
            break
        if time.perf_counter() - started > CALL_S:
            raise Failed("it did not bite")
    bit = time.perf_counter()
    return (
        f"durable after {(answered - started) * 1000:.1f} ms,"
        f" refused {(bit - answered) * 1000:.1f} ms later"
    )


async def kill(demo: Demo) -> None:
    """Takes authsvc away without a warning."""
    assert demo.authsvc is not None
    demo.authsvc.kill()
    await asyncio.to_thread(demo.authsvc.wait)


def main() -> NoReturn:
    """Runs it all; exits with 0 only if everything held."""
    steps = Steps()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes are ended
    with tempfile.TemporaryDirectory(prefix="authsvc-demo-") as home, ExitStack() as stack:
        demo = Demo(Path(home), stack)
        try:
            print("Starting authsvc on SQLite, with a certificate authority of its own")
            demo.start_authsvc()
            print("Declaring services, what they offer, and what alice may do (examples/declared)")
            demo.declare()
            print("Admitting the shop: it asks by its own certificate, an administrator approves")
            grants = ("client_credentials", "token_exchange", "refresh_token")
            demo.admit("shop", "orders.place", "billing.refund", grants=grants)
            print("Starting billing and orders")
            billing = demo.start_service("billing")
            orders = demo.start_service("orders", "--billing", billing)
            print("The shop calls orders, orders calls billing; both judge tokens by themselves")
            asyncio.run(story(demo, steps, Shop(orders)))
        except Exception as error:
            steps.all += 1
            print(f"FAIL  {type(error).__name__}: {error}", flush=True)
    print(f"demo: {steps.ok} of {steps.all} ok", flush=True)
    sys.exit(0 if steps.ok == steps.all > 0 else 1)


if __name__ == "__main__":
    main()
