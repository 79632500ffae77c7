"""No secret is in a log, an error, an answer beside its field, a metric, a repr or a database."""

import asyncio
import base64
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, is_dataclass
from itertools import chain, count, cycle
from pathlib import Path
from typing import Any, Final
from unicodedata import normalize

import asyncpg
import grpc
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from google.protobuf.message import Message
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from authsvc.config import Grants
from authsvc.errors import AuthError
from authsvc.keys.secrets import Sealer, digest, new_seal_key, new_secret
from authsvc.model import AuthMethod
from authsvc.telemetry import configure_logs
from authsvc_client.v1 import auth_pb2, clients_pb2, users_pb2
from tests import credentials
from tests.credentials import PLACES, SERVICES, Desk, Way
from tests.credentials_of_people import PEOPLE, people_at
from tests.harness import ADMIN, ISSUER, SERVER, Running, hand_clock, migrate, outcome, running
from tests.people import NEW_PASSWORD, self_service
from tests.people import PASSWORD as USER_PASSWORD
from tests.probe import ProbeError, Scene, sql
from tests.servers import Postgres

SHORTEST: Final = 16
"""Characters; what is shorter is no secret, and stands everywhere."""
PASSWORD: Final = "correct-horse-battery-staple"

# --- what to look for ---


def spellings(raw: bytes) -> Iterator[bytes]:
    """Bytes, and how they come to be written."""
    yield raw
    yield raw.hex().encode()
    yield raw.hex().upper().encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(raw).rstrip(b"=")
    yield repr(raw)[2:-1].encode()
    yield json.dumps(repr(raw)[2:-1])[1:-1].encode()


def forms(secret: str) -> set[bytes]:
    """A secret as it was given, without its prefix and checksum, and its random part."""
    found = {secret.encode()}
    if secret.startswith("asvc_"):
        body = secret.split("_", 2)[2]
        found.add(body.encode())
        with suppress(ValueError):
            if secret.startswith("asvc_rt_"):  # its tag: the handle before it is stored
                found |= set(spellings(base64.urlsafe_b64decode(body)[28:]))
            elif len(body) == 49:
                found.add(body[:43].encode())
                found |= set(spellings(base64.urlsafe_b64decode(body[:43] + "=")))
    elif secret.count(".") in (2, 4):
        _, *parts = secret.split(".")
        found |= {part.encode() for part in parts}
    else:  # a password, as it is sent, hashed and logged
        for text in (secret, normalize("NFC", secret)):
            found |= {*spellings(text.encode()), json.dumps(text)[1:-1].encode()}
    return {form for form in found if len(form) >= SHORTEST}


def forms_of_key(key: ec.EllipticCurvePrivateKey) -> set[bytes]:
    """A private key in DER, PEM and JWK, and its number."""
    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    number = key.private_numbers().private_value.to_bytes(32, "big")
    return {*spellings(der), *spellings(number), *pem.splitlines()[1:2]}


def leaks(secrets: dict[str, set[bytes]], places: dict[str, bytes]) -> set[tuple[str, str]]:
    """Which secret is in which place."""
    named: dict[bytes, set[str]] = {}
    for name, written in secrets.items():
        for form in written:
            named.setdefault(form, set()).add(name)
    return {
        (name, place)
        for place, content in places.items()
        for form, names in named.items()
        if form in content
        for name in names
    }


# --- where to look ---


@dataclass
class Seen:
    """What the run created, and what came to light."""

    secrets: dict[str, set[bytes]] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, place: str, text: object) -> None:
        self.places.setdefault(place, []).append(str(text))

    def secret(self, text: str, name: str) -> None:
        if len(text) >= SHORTEST:
            self.secrets.setdefault(f"{name} {text[:24]}", set()).update(forms(text))


class Observer(grpc.aio.UnaryUnaryClientInterceptor):
    """Sees every call as its caller does."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        self._take(request)
        for key, value in client_call_details.metadata or ():
            if key == "authorization":
                self._seen.secret(value.partition(" ")[2], "authorization")
        call = await continuation(client_call_details, request)
        try:
            response = await call
        except grpc.aio.AioRpcError as error:
            self._seen.add("errors", repr(error))
            self._seen.add("errors", error.trailing_metadata())
        else:
            self._seen.add("answers", self._take(response))
        return call

    def _take(self, message: Message) -> Message:
        """Keeps the secret fields of a message; what is left of it."""
        left = type(message)()
        left.CopyFrom(message)
        self._walk(left)
        return left

    def _walk(self, message: Message) -> None:
        for described, value in message.ListFields():
            if described.GetOptions().debug_redact:
                self._seen.secret(value, described.name)
                message.ClearField(described.name)
            elif described.message_type is not None:
                for one in value if isinstance(value, Iterable) else (value,):
                    self._walk(one)


def record_reprs(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of ours that is made, and every error, is written down as it shows itself."""
    ours = {
        kind
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "authsvc"
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == name and is_dataclass(kind)
    }
    for kind in ours:
        monkeypatch.setattr(kind, "__init__", _recorded(kind.__init__, seen, repr))
    shown = _recorded(AuthError.__init__, seen, lambda error: f"{error!r} {vars(error)}")
    monkeypatch.setattr(AuthError, "__init__", shown)


def _recorded(made: Any, seen: Seen, show: Callable[[Any], str]) -> Any:
    def init(self: Any, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        seen.add("reprs", show(self))

    return init


@contextmanager
def logged(file: Path) -> Iterator[None]:
    """All that is printed goes to the file: logs at debug, of libraries too, and of C code."""
    configured, root, streams = (
        structlog.get_config(),
        logging.getLogger(),
        (sys.stdout, sys.stderr),
    )
    level, kept = root.level, [os.dup(number) for number in (1, 2)]
    with file.open("a", buffering=1) as log:
        handler = logging.StreamHandler(log)
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.stdout = sys.stderr = log
        configure_logs("debug", json=True)
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        # It says every row that it writes, of a thread of its own: pytest's handlers and the loop's
        # then wait for each other now and then, for ever.
        driver = logging.getLogger("aiosqlite")
        driver.setLevel(logging.INFO)
        try:
            yield
        finally:
            structlog.configure(**configured)
            root.removeHandler(handler)
            root.setLevel(level)
            driver.setLevel(logging.NOTSET)
            sys.stdout, sys.stderr = streams
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


@dataclass
class Run:
    """A server that is watched from all sides."""

    server: Running
    scene: Scene
    people: Scene
    seen: Seen
    url: str
    log: Path

    async def places(self) -> dict[str, bytes]:
        """Everything that came to light until now."""
        self.seen.add("metrics", await self.server.http("/metrics"))
        return self.told() | {"database": await self._database()}

    def told(self) -> dict[str, bytes]:
        """The same, where no database can be looked into."""
        texts = self.seen.places.items()
        told = {place: "\n".join(found).encode() for place, found in texts}
        return told | {"logs": self.log.read_bytes()}

    async def _database(self) -> bytes:
        """Every byte of the files, but for the server's key; of PostgreSQL all rows as text."""
        directory = self.server.app._settings.state_dir
        files = [file for file in sorted(directory.iterdir()) if file.name != "server-key.pem"]
        content = b"".join(file.read_bytes() for file in files)
        if not self.url:
            assert {"authsvc.db", "authsvc.db-wal"} <= {file.name for file in files}
            return content
        tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        for (table,) in await self.sql(tables):
            rows = await self.sql(f'SELECT t::text FROM "{table}" AS t')
            content += "".join(text for (text,) in rows).encode()
        return content

    async def sql(self, *statements: str, database: str = "") -> list[Any]:
        """By hand; in another database of the same PostgreSQL."""
        if not self.url:
            directory = self.server.app._settings.state_dir
            return await sql(directory, *statements)
        url = make_url(self.url).set(drivername="postgresql")
        url = url.set(database=database) if database else url
        connection = await asyncpg.connect(url.render_as_string(hide_password=False))
        try:
            return [row for each in statements for row in await connection.fetch(each)]
        finally:
            await connection.close()

    async def shut(self) -> None:
        """Nobody gets into the database any more."""
        name = make_url(self.url).database
        backends = (
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        forbid = f"ALTER DATABASE {name} ALLOW_CONNECTIONS false"
        await self.sql(forbid, backends, database="postgres")


@pytest.fixture(params=["sqlite", "postgres"])
async def run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Run]:
    url = ""
    if request.param == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        url = (await postgres.database()).replace("///", f"//postgres:{PASSWORD}@/")
        await migrate(url)
    (tmp_path / "state").mkdir()
    seen, settings = Seen(), dict[str, Any](grants=Grants(password=True))
    seen.secrets["password of the database"] = {PASSWORD.encode()}
    for name in ("seal_keys", "refresh_keys"):
        key = new_seal_key()
        settings[name] = SecretStr(key.hex())
        seen.secrets[name] = set(spellings(key))
    keys = {"client": credentials.KEY, "server": SERVER.key, "admin": ADMIN.key}
    for name, private in keys.items():
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        seen.secrets[f"private key of {name}"] = forms_of_key(private)
    connect, seal = grpc.aio.secure_channel, Sealer.seal

    def observed(*given: Any, **named: Any) -> Any:
        return connect(*given, **(named | {"interceptors": [Observer(seen)]}))

    def sealed(self: Sealer, plain: bytes, purpose: str) -> bytes:
        with suppress(ValueError):
            private = load_der_private_key(plain, None)
            assert isinstance(private, ec.EllipticCurvePrivateKey)
            seen.secrets[purpose] = forms_of_key(private)
        return seal(self, plain, purpose)

    monkeypatch.setattr(grpc.aio, "secure_channel", observed)
    monkeypatch.setattr(Sealer, "seal", sealed)
    record_reprs(seen, monkeypatch)
    where: dict[str, Any] = {"url": url} if url else {"clock": hand_clock()}
    with logged(log := tmp_path / "log"):
        async with running(tmp_path / "state", tls_only=True, **settings, **where) as server:
            seen.add("reprs", repr(server.app._settings))
            scenes = await SERVICES.equip(server), await PEOPLE.equip(server)
            yield Run(server, *scenes, seen, url, log)


# --- what is done ---


def variants(secret: str) -> list[str]:
    """A secret, and what somebody makes of it by mistake."""
    return [secret, secret[:-1], secret + "x", secret.swapcase(), f" {secret}\n", secret * 40]


METHODS: Final = cycle((None, AuthMethod.CLIENT_SECRET_BASIC, AuthMethod.CLIENT_SECRET_POST))


async def use_everything(run: Run) -> set[str]:
    """Every secret, right, wrong and malformed, wherever one can be put; what was answered."""
    scene, told = run.scene, set[str]()
    desk = Desk(run.server.channel(scene.app.who), scene.now)
    administrator, stub = run.server.auth(ADMIN), run.server.auth(scene.app.who)
    texts = list[str]()
    for probe, of in ((SERVICES, scene), (PEOPLE, run.people)):
        for use in probe.credentials.values():
            with suppress(ProbeError):  # without a database it cannot tell
                told.add(await use(of))
        names = (*probe.credentials, "root")
        texts += [of.held[name] for name in names if name in of.held]
    texts.append(credentials.assertion(scene.app.client_id, scene.now))
    for text in chain.from_iterable(map(variants, texts)):
        way = Way(scene.app.client_id, text, token=text, refresh_token=text, method=next(METHODS))
        way.bearer = text.isprintable()  # nothing else can be sent as metadata
        calls: list[Awaitable[Any]] = [
            call(desk, way) for found in PLACES.values() for call in found
        ]
        calls.append(stub.IssueToken(credentials.kept_request(way.client_id, assertion=text)))
        calls.append(stub.IssueToken(credentials.exchange_request(way.client_id, text)))
        calls.append(administrator.ValidateToken(auth_pb2.ValidateTokenRequest(token=text)))
        told.update(await asyncio.gather(*map(outcome, calls)))
    return told | await use_passwords(run)


WRONG: Final = "no horse of mine, sir"
FOREIGN: Final = normalize("NFD", "Größenwahn für Anfänger")
MISPLACED: Final = "a password where the name belongs"
_numbers: Final = count()


async def use_passwords(run: Run) -> set[str]:
    """Passwords and codes, right, wrong and malformed; one after the other: each is hashed."""
    told, at, who = set[str](), people_at(run.people), run.people.app.who
    administrator, anybody, logins = run.server.users(), run.server.users(who), run.server.auth(who)

    async def ask(call: Awaitable[Any]) -> Any:
        answers = []

        async def answer() -> None:
            answers.append(await call)

        told.add(await outcome(answer()))
        return answers[0] if answers else None

    for text in chain.from_iterable(map(variants, (USER_PASSWORD, WRONG, FOREIGN))):
        name = f"user-{next(_numbers)}"
        user = users_pb2.User(username=name)
        made = None
        for password in (text, NEW_PASSWORD):  # under one request id: one is refused
            request = users_pb2.CreateUserRequest(user=user, password=password, request_id=name * 2)
            made = await ask(administrator.CreateUser(request)) or made
        names = (f"row-{name}", name, "")
        rows = [users_pb2.ImportUsersRow(username=each, password=text) for each in names]
        await ask(administrator.ImportUsers(users_pb2.ImportUsersRequest(rows=rows)))
        for username, password in ((name, text), (name, f"{text}?"), (MISPLACED, text)):
            await ask(logins.IssueToken(at.login_request(username, password)))
        if made is None:
            continue
        setting = users_pb2.SetPasswordRequest(user_id=made.user.user_id, new_password=text)
        await ask(administrator.SetPassword(setting))
        login = await ask(logins.IssueToken(at.login_request(name, text, resources=[ISSUER])))
        by_token = self_service(login.token.access_token if login else "x")
        for current, password in ((WRONG, text), (text, "short"), (text, NEW_PASSWORD)):
            own = users_pb2.SetPasswordRequest(
                current_password=current, new_password=password, keep_session=True
            )
            await ask(anybody.SetPassword(own, metadata=by_token))
        asked = users_pb2.CreatePasswordResetCodeRequest(user_id=made.user.user_id)
        coded = await ask(administrator.CreatePasswordResetCode(asked))
        codes = variants(coded.code) if coded else ["x"]
        new = text if login else NEW_PASSWORD  # each code is used up
        for code in reversed(codes if text in (USER_PASSWORD, WRONG) else codes[:1]):
            reset = users_pb2.ResetPasswordRequest(code=code, new_password=new)
            await ask(anybody.ResetPassword(reset))
    return told


async def test_secrets_are_found_nowhere(run: Run) -> None:
    """While the database is whole, when tables are missing, and when it is gone."""
    told = await use_everything(run)
    assert "OK" in told
    assert told.isdisjoint({"INTERNAL", "UNKNOWN", "STORE_UNAVAILABLE"})
    assert told >= {"INVALID_GRANT", "PASSWORD_NOT_ACCEPTED", "REQUEST_ID_REUSED"}
    for event in ("`RotateClientSecret`", "`TaintSigningKey` of the current key"):
        for _, step in credentials.EVENTS[event]:
            await step(run.scene)
    places = await run.places()
    hashes = await stored_of_passwords(run)
    tables = ("api_key", "access_token", "assertion", "initial_access_token", '"grant"', '"user"')
    await run.sql(*(f"DROP TABLE {table}" for table in tables))
    assert "STORE_UNAVAILABLE" in await use_everything(run)
    if run.url:
        await run.shut()
        assert "STORE_UNAVAILABLE" in await use_everything(run)
    secrets = run.seen.secrets
    assert len(secrets) > 50
    assert not leaks(secrets, places)
    assert not leaks(secrets, run.told())
    ours = run.told()
    assert not leaks({"hash of a password": hashes}, ours)
    shown = places | ours | {"reprs": b""}  # a name is no secret where a request shows itself
    assert not leaks({MISPLACED: forms(MISPLACED)}, shown)


async def stored_of_passwords(run: Run) -> set[bytes]:
    """Hashes: nothing else is stored of a password, and of a code its SHA-256."""
    rows = [tuple(row) for row in await run.sql('SELECT password_hash, reset_digest FROM "user"')]
    assert {of_code for _, of_code in rows} == {None, digest(run.people.held["reset code"])}
    hashes = {hashed for hashed, _ in rows}
    assert all(hashed.startswith("$argon2id$v=19$m=64,t=1,p=1$") for hashed in hashes)
    return {hashed.rpartition("$")[2].encode() for hashed in hashes}


async def test_search_finds_what_is_planted(run: Run) -> None:
    """A secret in each place, by the way that others come there."""
    secret = new_secret("asvc_cs_")
    run.seen.secret(secret, "planted")
    scope = secret.removeprefix("asvc_cs_")
    asked = auth_pb2.IssueTokenRequest(
        client_credentials=auth_pb2.ClientCredentialsGrant(),
        client_id=run.scene.app.client_id,
        scopes=[scope],
    )
    assert await outcome(run.server.auth(run.scene.app.who).IssueToken(asked)) == "SCOPE_UNKNOWN"
    metadata = clients_pb2.ClientMetadata(client_name=secret)
    await run.server.auth(ADMIN).RegisterClient(auth_pb2.RegisterClientRequest(metadata=metadata))
    raw = base64.urlsafe_b64decode(scope[:43] + "=")
    structlog.get_logger().debug("planted", value=raw)
    run.server.app.metrics.verdicts.labels(secret).inc()
    places = await run.places()
    assert {place for name, place in leaks(run.seen.secrets, places) if "planted" in name} == {
        *("logs", "errors", "answers", "metrics", "reprs", "database")
    }


@pytest.mark.parametrize("plant", ["comment", "name", "log"])
async def test_search_finds_a_password_that_is_planted(run: Run, plant: str) -> None:
    """As a comment in the audit, as a name, and as it is hashed in a log."""
    users, password = run.server.users(), FOREIGN
    run.seen.secret(password, "planted")
    name = password if plant == "name" else ""
    user = users_pb2.User(username="grace", display_name=name)
    made = await users.CreateUser(users_pb2.CreateUserRequest(user=user, password=password))
    comment = password if plant == "comment" else ""
    request = users_pb2.DisableUserRequest(user_id=made.user.user_id, comment=comment)
    await users.DisableUser(request)
    if plant == "log":
        structlog.get_logger().debug("planted", value=normalize("NFC", password))
    places = await run.places()
    told = {
        "comment": {"database", "reprs"},
        "name": {"database", "reprs", "answers"},
        "log": {"logs"},
    }
    found = leaks(run.seen.secrets, places)
    assert {place for name, place in found if "planted" in name} == told[plant]


@pytest.mark.parametrize("form", range(7))
def test_each_spelling_is_found(form: int) -> None:
    raw = b"\x00\xff'" + bytes(range(100, 129))
    written = [*spellings(raw)][form]
    assert leaks({"it": set(spellings(raw))}, {"there": b"... " + written + b" ..."})
    assert not leaks({"it": set(spellings(raw))}, {"there": b"... " + written[1:-1] + b" ..."})
