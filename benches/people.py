"""Benches of people: their permissions, live, and their passwords beside everybody's tokens."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Self

from authsvc.app import migrate
from authsvc.config import load
from authsvc.feed.follow import POLL_S
from authsvc_client.v1 import auth_pb2, roles_pb2, users_pb2
from authsvc_client.v1.auth_pb2_grpc import AuthServiceStub
from authsvc_client.v1.roles_pb2_grpc import RoleServiceStub
from authsvc_client.v1.users_pb2_grpc import UserServiceStub
from tests.servers import Postgres

from .load import WIDTH, Method
from .processes import Server, authsvc
from .scene import PASSWORD, PERMISSION, ROLE, USER, Scene, connect, scene
from .stage import Line, Stage, rates, warm

# --- permissions, at hand ---


async def validate_full_warm(stage: Stage) -> Line:
    """ValidateToken of a user's token, one permission demanded and all of them answered; and of the
    same token without its permissions."""
    [token] = await stage.scene.user_tokens(USER)
    plain = stage.scene.user_validation(token, view=auth_pb2.TOKEN_VIEW_VERDICT)
    full = stage.scene.user_validation(
        token, view=auth_pb2.TOKEN_VIEW_FULL, required_permissions=[PERMISSION.name]
    )
    before = stage.authsvc.statements()
    async with connect(stage.scene.pki, "billing", stage.authsvc.port) as channel:
        [answer] = await Method(channel, "ValidateToken").burst([full])
    if list(auth_pb2.ValidateTokenResponse.FromString(answer).permissions) != [PERMISSION.name]:
        raise RuntimeError("an answer without the permission")
    cold = stage.authsvc.statements()
    if cold == before:
        raise RuntimeError("statements are not counted: the first answer must read the role")
    line = rates(await warm(stage, full))
    if stage.authsvc.statements() != cold:
        raise RuntimeError("a statement ran for a warm answer")
    verdict = await warm(stage, plain)
    return {
        **line,
        "verdict_ratio": round(verdict.rate_ratio, 4),
        "verdict_cpu_us": round(verdict.cpu_us, 1),
        "verdict_floor_cpu_us": round(verdict.floor_cpu_us, 1),
    }


# --- permissions, on their way ---

ASK_S = 0.01
"""Pause between two questions whether a change is there; by so much it may be seen too late."""
SEEN_S_MAX = 30.0
SINGLES = 4
"""Users who get a role and lose it, one after another."""
SHARED = "shared"
"""The role that many hold."""


async def permissions_reach(stage: Stage) -> Line:
    """From the answer to a change of roles until another worker answers by it: two workers on a
    PostgreSQL, without Redis. Changes come at any moment between two polls."""
    with ExitStack() as stack:
        postgres = stack.enter_context(Postgres())
        state_dir = Path(stack.enter_context(TemporaryDirectory(prefix="authsvc-bench-")))
        url = await postgres.database()
        await migrate(load(state_dir=state_dir, database={"url": url}), check=False)
        first, second = (
            stack.enter_context(authsvc(state_dir, stage.cores.servers, url, cheap_passwords=True))
            for _ in range(2)
        )
        async with _office(state_dir, first, second, stage.size.holders) as office:
            cpu = first.cpu()
            of_one = await office.toggle_roles(stage.size.rounds)
            of_many = await office.toggle_shared(stage.size.rounds * 2 // 3)
            cpu = first.cpu() - cpu
    took = sorted(of_one + of_many)
    p99 = took[len(took) * 99 // 100]
    return {
        "value": round(p99 * 1000, 1),
        "unit": "ms, p99",
        "floor": round(POLL_S * 1000),
        "ratio": p99 / POLL_S,
        "cpu_us": round(cpu / len(took) * 1e6, 1),  # with what the worker does by itself meanwhile
        "p50": round(median(took) * 1000, 1),
        "changes": len(took),
        "holders": len(office.holders),
        "holders_p50": round(median(of_many) * 1000, 1),
        "holders_max": round(max(of_many) * 1000, 1),
    }


@dataclass(frozen=True, slots=True)
class Person:
    """A user, and the question whether it has the permission."""

    user_id: str
    question: auth_pb2.ValidateTokenRequest


class Office:
    """Users and their roles: the first worker changes these, the second one judges."""

    def __init__(
        self, roles: Any, judge: Any, singles: Sequence[Person], holders: Sequence[Person]
    ) -> None:
        """`singles` get a role each; `holders` hold one together."""
        self._roles, self._judge = roles, judge
        self._singles, self.holders = singles, holders
        self._chance = random.Random(0)

    async def toggle_roles(self, times: int) -> list[float]:
        """AssignRole and UnassignRole by turns; the seconds until each was seen.

        One at a time: what is read for the first question after a change tells of later ones too.
        """
        took = []
        for number in range(times):
            person, may = self._singles[number // 2 % len(self._singles)], number % 2 == 0
            held = roles_pb2.RoleAssignment(role_id=ROLE, user_id=person.user_id)
            await self._pause()
            if may:
                await self._roles.AssignRole(roles_pb2.AssignRoleRequest(role_assignment=held))
            else:
                await self._roles.UnassignRole(roles_pb2.UnassignRoleRequest(role_assignment=held))
            took.append(await self._seen(person, may))
        return took

    async def toggle_shared(self, times: int) -> list[float]:
        """UpdateRole of what many hold; by the time that one of them sees it, all must."""
        took = []
        for number in range(times):
            may = number % 2 == 1  # at first they may
            role = roles_pb2.Role(role_id=SHARED, permissions=[PERMISSION] if may else [])
            request = roles_pb2.UpdateRoleRequest(role=role)
            request.update_mask.paths.append("permissions")
            await self._pause()
            await self._roles.UpdateRole(request)
            took.append(await self._seen(self._chance.choice(self.holders), may))
            await self.require(self.holders, may)
        return took

    async def _pause(self) -> None:
        """To any moment between two polls."""
        await asyncio.sleep(self._chance.uniform(0, POLL_S))

    async def require(self, people: Sequence[Person], may: bool) -> None:
        """That all of them are answered so."""
        left = iter(people)

        async def ask() -> None:
            for person in left:
                if await self._may(person) is not may:
                    raise RuntimeError("a change of roles did not reach all whom it concerns")

        await asyncio.gather(*(ask() for _ in range(WIDTH)))

    async def _seen(self, person: Person, may: bool) -> float:
        """Seconds from now until it is answered so."""
        started = time.perf_counter()
        async with asyncio.timeout(SEEN_S_MAX):
            while await self._may(person) is not may:  # noqa: ASYNC110 - no event to wait for
                await asyncio.sleep(ASK_S)
        return time.perf_counter() - started

    async def _may(self, person: Person) -> bool:
        return bool((await self._judge.ValidateToken(person.question)).active)


@asynccontextmanager
async def _office(
    state_dir: Path, first: Server, second: Server, holders: int
) -> AsyncIterator[Office]:
    """Makes the users; those who share a role hold it when this yields, the others hold nothing."""
    async with (
        scene(state_dir, first.port) as made,
        connect(made.pki, "billing", second.port) as judge,
    ):
        roles = RoleServiceStub(made.admin)
        shared = roles_pb2.Role(role_id=SHARED, permissions=[PERMISSION])
        await roles.CreateRole(roles_pb2.CreateRoleRequest(role=shared))
        people = await _import(made, SINGLES + holders)
        for person in people[SINGLES:]:
            held = roles_pb2.RoleAssignment(role_id=SHARED, user_id=person.user_id)
            await roles.AssignRole(roles_pb2.AssignRoleRequest(role_assignment=held))
        office = Office(roles, AuthServiceStub(judge), people[:SINGLES], people[SINGLES:])
        await asyncio.sleep(2 * POLL_S)  # so that the second worker knows of it
        await office.require(people[:SINGLES], False)  # and nothing is read for the first time
        await office.require(people[SINGLES:], True)
        yield office


async def _import(made: Scene, count: int) -> list[Person]:
    """Users who have logged in."""
    names = [f"user-{number:04}" for number in range(count)]
    rows = [users_pb2.ImportUsersRow(username=name, password=PASSWORD) for name in names]
    import_users = UserServiceStub(made.admin).ImportUsers
    ids: list[str] = []
    for at in range(0, count, 100):
        answer = await import_users(users_pb2.ImportUsersRequest(rows=rows[at : at + 100]))
        ids += [result.user.user_id for result in answer.results]
    tokens = await made.user_tokens(*names)
    asked = {"required_permissions": [PERMISSION.name]}
    questions = [made.user_validation(token, **asked) for token in tokens]
    parse = auth_pb2.ValidateTokenRequest.FromString
    return [
        Person(user_id, parse(question)) for user_id, question in zip(ids, questions, strict=True)
    ]


# --- passwords beside tokens ---

LOGINS = 4
"""Under way at any time while passwords are hashed: enough to keep the threads for them busy."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How ValidateToken went for a while."""

    p50_s: float
    p99_s: float
    """Of calls one after another."""
    rate: float
    """Calls a second, many at once."""
    cpu_s: float
    """Of the server, a call of those."""


async def password_beside_validate(stage: Stage) -> Line:
    """ValidateToken with logins all the time, each of which costs a hash (64 MiB, 3 passes), beside
    ValidateToken without, in turns. The server has one core, which the two share."""
    made = stage.scene
    [token] = await made.user_tokens(USER)
    request = made.user_validation(token, view=auth_pb2.TOKEN_VIEW_VERDICT)
    calls = stage.size.calls * 5
    quiet: list[Pace] = []
    beside: list[Pace] = []
    hashes, seconds = 0, 0.0
    async with connect(made.pki, "billing", stage.authsvc.port) as channel:
        validate = Method(channel, "ValidateToken")
        await _pace(stage.authsvc, validate, request, calls)  # warms up
        for _ in range(max(1, stage.size.rounds // 4)):
            quiet.append(await _pace(stage.authsvc, validate, request, calls))
            async with Logins(made) as logins:
                started, done = time.perf_counter(), logins.done
                beside.append(await _pace(stage.authsvc, validate, request, calls))
                hashes += logins.done - done
                seconds += time.perf_counter() - started
    pairs = list(zip(quiet, beside, strict=True))
    return {
        "value": round(median(pace.p50_s for pace in beside) * 1e6),
        "unit": "us, p50",
        "floor": round(median(pace.p50_s for pace in quiet) * 1e6),
        "ratio": median(b.p50_s / q.p50_s for q, b in pairs),
        "p99": round(median(pace.p99_s for pace in beside) * 1e6),
        "p99_floor": round(median(pace.p99_s for pace in quiet) * 1e6),
        "p99_ratio": round(median(b.p99_s / q.p99_s for q, b in pairs), 4),
        "rate": round(median(pace.rate for pace in beside)),
        "rate_ratio": round(median(b.rate / q.rate for q, b in pairs), 4),
        "hashes_s": round(hashes / seconds, 1),
        "cpu_us": round(median(pace.cpu_s for pace in quiet) * 1e6, 1),
    }


async def _pace(server: Server, validate: Method, request: bytes, calls: int) -> Pace:
    took = sorted(await validate.one_by_one(request, calls))
    cpu, started = server.cpu(), time.perf_counter()
    await validate.burst([request] * calls)
    wall = time.perf_counter() - started
    cpu = server.cpu() - cpu
    return Pace(took[calls // 2], took[calls * 99 // 100], calls / wall, cpu / calls)


class Logins:
    """Logs in again and again until the end; raises then what a login raised."""

    def __init__(self, made: Scene) -> None:
        self._made = made
        self.done = 0
        self._over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def _run(self) -> None:
        while not self._over:
            await self._made.user_tokens(USER)
            self.done += 1

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._run()) for _ in range(LOGINS)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over = True
        await asyncio.gather(*self._tasks)
