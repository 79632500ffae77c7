"""The composition root: the only place that knows the concrete classes."""

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog
from pydantic import SecretStr
from sqlalchemy.engine import make_url

from authsvc import pki
from authsvc.acting import Act, begin, by_itself
from authsvc.api_keys import ApiKeys
from authsvc.audit import Audit
from authsvc.authenticate import Authenticate
from authsvc.cache.local import LocalRateLimits
from authsvc.cache.port import RateLimits
from authsvc.cache.redis import RedisLink
from authsvc.cache.redis_limits import RedisRateLimits
from authsvc.cache.redis_rows import SharedRows
from authsvc.clients import Clients, InitialAccessTokens, OwnClient
from authsvc.clock import Clock, SystemClock
from authsvc.config import Settings, parse_keys
from authsvc.errors import AuthError, Reason
from authsvc.explain import ExplainToken
from authsvc.feed.append import Append
from authsvc.feed.compact import Compact, sweep
from authsvc.feed.follow import Follow
from authsvc.feed.publish import Publish
from authsvc.feed.watch import WatchChanges
from authsvc.housekeeping import Housekeeping
from authsvc.http.probes import HttpServer, listen_tcp, listen_unix, probes
from authsvc.identify import Identify
from authsvc.issue import IssueToken
from authsvc.keys.passwords import Passwords
from authsvc.keys.refresh import RefreshKeys
from authsvc.keys.ring import KeyRing
from authsvc.keys.secrets import Mac, Sealer, jitter, new_seal_key
from authsvc.mint import GrantLife, Mint, OpenGrant
from authsvc.model import NOBODY, AuthMethod, Client, GrantType
from authsvc.oauth.registration import RegistrationPolicy, as_of
from authsvc.passwords import CheckPassword
from authsvc.permissions import Permissions
from authsvc.refresh import RefreshToken
from authsvc.register import CheckMetadata, RegisterClient
from authsvc.resources import Resources
from authsvc.review import ReviewClient
from authsvc.revocations import Revocations
from authsvc.revoke import RevokeToken
from authsvc.roles import Roles
from authsvc.rpc import convert
from authsvc.rpc.audit import AuditServicer
from authsvc.rpc.auth import AuthServicer
from authsvc.rpc.clients import ClientServicer
from authsvc.rpc.explain import ExplainServicer
from authsvc.rpc.keys import KeyServicer
from authsvc.rpc.paging import Pages
from authsvc.rpc.peer import Peers
from authsvc.rpc.pipeline import Pipeline
from authsvc.rpc.policy import Policy
from authsvc.rpc.rates import Rates, rates_of
from authsvc.rpc.registered import ClientEncoder
from authsvc.rpc.repeats import Repeats
from authsvc.rpc.resources import ResourceServicer
from authsvc.rpc.revocations import RevocationServicer
from authsvc.rpc.roles import RoleServicer
from authsvc.rpc.server import Listener, RpcServer
from authsvc.rpc.sessions import SessionServicer
from authsvc.rpc.tls import ServerTls
from authsvc.rpc.users import UserServicer
from authsvc.sessions import Sessions
from authsvc.store import sql_store
from authsvc.store.cached import CachedCatalog, CachedClients
from authsvc.store.migrate import Schema, standing, upgrade
from authsvc.store.port import SWEPT, Impact, Store, change, unshared
from authsvc.store.sql import Database, shown
from authsvc.tasks import Elected, Tasks
from authsvc.telemetry import Metrics
from authsvc.users import UserPasswords, Users
from authsvc.validate import ValidateToken
from authsvc_client.core.judge import Judge
from authsvc_client.core.markers import Marker, MarkerKind
from authsvc_client.core.state import State

RENEW_BEFORE_S = 30 * 24 * 3600
"""An own certificate that ends sooner is replaced, at start and while it runs."""
RENEW_EVERY_S = 24 * 3600.0
ROTATE_EVERY_S = 20.0
LEASE = 3
"""A task is another worker's after so many of its periods without a sign of who did it."""
START_TRIES = 50
START_EVERY_S = 0.1
DAY_S = 24 * 3600.0
COLLECT_AFTER = (2500, 2, 200)
"""Objects until the young are looked at, and looks until the older ones are: all of them once in
1.5 million that stay, which holds up the loop for some 80 ms where the caches are full. Calls leave
no cycle but gRPC's own, which die young; a piece of a snapshot is fewer than the first number.
"""

log = structlog.get_logger()


class StartError(Exception):
    """The server cannot start; the text says what to do, and holds no secret."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a server needs beside its settings, found or made in the state directory."""

    sealer: Sealer
    refresh_keys: RefreshKeys
    database_url: str = field(repr=False)
    database_id: str
    embedded: bool
    """The database is the one in the state directory."""
    tls: ServerTls
    admins: frozenset[str]
    pki: Path | None
    """Directory of the own PKI, where it is used."""


def prepare(settings: Settings, clock: Clock) -> Prepared:
    """Makes what is missing. Raises StartError."""
    state_dir = settings.state_dir
    os.umask(0o077)  # what is made from here on, the database too, is nobody else's to read
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        files, admins, directory = _certificates(settings, clock)
        return Prepared(
            Sealer(_keys(settings.seal_keys, state_dir / "seal.key")),
            RefreshKeys(_keys(settings.refresh_keys, state_dir / "refresh.key")),
            database_url(settings),
            database_id(settings),
            settings.database.url is None,
            ServerTls(*files, settings.tls.bundles),
            admins,
            directory,
        )
    except OSError as error:
        raise StartError(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise StartError(str(error)) from error


def _keys(setting: SecretStr | None, file: Path) -> tuple[bytes, ...]:
    """Keys of the settings, or one of this state directory."""
    if setting is not None:
        return parse_keys(setting.get_secret_value())
    return parse_keys(kept(file, new_seal_key().hex()))


def _redis(settings: Settings, metrics: Metrics) -> RedisLink | None:
    try:
        return RedisLink(settings.redis, metrics) if settings.redis.url is not None else None
    except ValueError as error:
        raise StartError(str(error)) from error


def _registration_policy(settings: Settings) -> RegistrationPolicy:
    given = settings.registration
    return RegistrationPolicy(
        scopes=frozenset(given.scopes),
        grant_types=frozenset(GrantType[name.upper()] for name in given.grant_types),
        auth_methods=frozenset(AuthMethod[name.upper()] for name in given.auth_methods),
        approve=given.approve,
        pending_s=given.pending_days * DAY_S,
        pending_per_registrant=given.pending_per_registrant,
    )


def address(host: str, port: int) -> str:
    """Host and port as gRPC and URLs write them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def database_url(settings: Settings) -> str:
    """The database of the settings, or the one in the state directory."""
    url = settings.database.url
    if url is not None:
        return url.get_secret_value()
    return f"sqlite+aiosqlite:///{settings.state_dir / 'authsvc.db'}"


def database_id(settings: Settings) -> str:
    """Names the lineage of a SQLite file; made in the state directory where it is missing."""
    settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return kept(settings.state_dir / "database.id", new_seal_key()[:16].hex())


def kept(path: Path, fresh: str) -> str:
    """The content of a 0600 file that is made with `fresh` where it is missing, whole or not."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # of processes that start at once one wins
            pki.create_file(fresh.encode(), path, mode=0o600)
    return path.read_text(encoding="ascii").strip()


def _certificates(
    settings: Settings, clock: Clock
) -> tuple[tuple[Path, Path, Path], frozenset[str], Path | None]:
    """Files of the listener, administrators, and the own PKI where the settings name no files."""
    tls, admins = settings.tls, frozenset(settings.admins)
    if tls.certificate is not None and tls.key is not None and tls.client_ca is not None:
        return (tls.certificate, tls.key, tls.client_ca), admins, None
    directory = settings.state_dir / "pki"
    with contextlib.suppress(FileExistsError):
        pki.init(directory, settings.trust_domain, clock.wall())
    authority = pki.load(directory)
    if authority.trust_domain != settings.trust_domain:
        raise ValueError(f"trust_domain: the PKI in {directory} is {authority.trust_domain}'s")
    for name, server in (("server", True), ("admin", False)):
        if not pki.is_current(authority, directory, name, clock.wall() + RENEW_BEFORE_S):
            spiffe_path = "authsvc" if server else name
            certificate, key = pki.issue(
                authority, now=clock.wall(), spiffe_path=spiffe_path, server=server
            )
            pki.write_pair(certificate, key, directory, name)
    admin = f"spiffe://{authority.trust_domain}/admin"
    files = (directory / "server.pem", directory / "server-key.pem", directory / "ca.pem")
    return files, admins | {admin}, directory


@dataclass(frozen=True, slots=True)
class Seat:
    """Of one worker among several, which share their ports."""

    index: int
    probes: Path
    """Unix socket for its metrics and probes: the metrics port is the supervisor's."""


class App:
    """One server process, put together."""

    def __init__(
        self,
        settings: Settings,
        prepared: Prepared,
        store: Store,
        clock: Clock | None = None,
        seat: Seat | None = None,
    ) -> None:
        self._seat = seat
        self._settings = settings
        self._prepared = prepared
        self._store = store
        self._clock = clock = clock or SystemClock()
        self._tasks = Tasks()
        self._elected = Elected(store.leases)
        self.metrics = Metrics()
        self.state = state = State(settings.staleness_max_s)
        tls, sealer, issuer = prepared.tls, prepared.sealer, settings.issuer
        self._redis = _redis(settings, self.metrics)
        self._ring = ring = KeyRing(
            store.keys,
            sealer,
            state,
            algorithm=settings.keys.algorithm,
            rotate_s=settings.keys.rotate_days * 86400,
            max_age_s=settings.keys.max_age_s,
            publish_ahead_s=settings.keys.publish_ahead_h * 3600,
        )
        rows = None
        if self._redis is not None:
            mac = Mac(sealer, issuer)
            rows = SharedRows(self._redis, mac, issuer, state, clock, self.metrics)
        share = rows or unshared
        clients = CachedClients(store.clients, share)
        self._catalog = catalog = CachedCatalog(store.resources)
        permissions = Permissions(store.roles, state, self._reach, share)
        self.follow = follow = Follow(
            store.feed,
            state,
            clock,
            listeners=(
                *((rows.changed,) if rows is not None else ()),
                *(clients.changed, catalog.changed, permissions.changed),
            ),
            loaders=(self._reload,),
            synchronous=settings.database.synchronous,
        )
        self._publish: Publish | None = None
        if self._redis is not None:
            self._publish = Publish(
                self._redis, Mac(sealer, issuer), issuer, follow, state, clock, self.metrics
            )
            store.on_commit(self._publish.offer)
        judge = Judge(issuer, state)
        identify = Identify(
            issuer, judge, store.tokens, store.api_keys, clients.get, catalog, clock
        )
        authenticate = Authenticate(
            issuer,
            clients,
            store.clients.secret_used,
            store.assertions,
            identify.api_key,
            state,
            clock,
        )
        mint = Mint(issuer, ring, store.tokens, permissions, state, clock)
        life = GrantLife(settings.grants.lifetime_days * DAY_S, settings.grants.idle_days * DAY_S)
        refresh_keys = prepared.refresh_keys
        self._resources = resources = Resources(
            store.resources,
            follow.reach,
            issuer=issuer,
            staleness_max_s=settings.staleness_max_s,
        )
        policy = Policy(
            issuer, prepared.admins, self._admin_ca, clients, catalog, identify, state, clock
        )
        pages, append = Pages(sealer), Append(store.feed)

        def now() -> float:
            return state.now(clock.boot())

        registration = _registration_policy(settings)
        check = CheckMetadata(store.clients, catalog, tls.pins)

        def as_of_now(client: Client) -> Client:
            return as_of(client, now(), registration.pending_s)

        registered = Clients(store.clients, check, follow.reach, as_of_now, now)
        self._passwords = passwords = Passwords(
            **settings.passwords.model_dump(), workers=settings.workers
        )
        check_password = CheckPassword(store.users, store.failures, passwords)
        client_pb = ClientEncoder(registration, as_of_now)
        validate = ValidateToken(identify, permissions, follow, state)
        servicers = {
            "AuthService": AuthServicer(
                issue=IssueToken(
                    issuer,
                    authenticate,
                    catalog,
                    identify.alive,
                    mint,
                    OpenGrant(store.grants, store.sessions, refresh_keys, life),
                    check_password if settings.grants.password else None,
                    self.follow.fresh,
                ),
                refresh=RefreshToken(
                    issuer,
                    authenticate,
                    store.grants,
                    refresh_keys,
                    life,
                    catalog,
                    follow.reach,
                    mint,
                ),
                validate=validate,
                revoke=RevokeToken(
                    identify.alive, refresh_keys, store.grants, append, follow.reach
                ),
                register=RegisterClient(
                    store.clients,
                    store.initial_access_tokens,
                    check,
                    registration,
                    lambda: state.revision,
                ),
                watch=WatchChanges(store.feed, follow, state, clock, convert.watched),
                authenticate=authenticate,
                state=state,
                metrics=self.metrics,
                client_pb=client_pb,
                keys_max_age_s=settings.keys.max_age_s,
            ),
            "ClientService": ClientServicer(
                store.clients,
                ReviewClient(store.clients, catalog, follow.reach, registration.pending_s),
                registered,
                OwnClient(store.clients, check, registered, follow.reach, as_of_now),
                InitialAccessTokens(store.initial_access_tokens, lambda: state.revision, now),
                ApiKeys(store.api_keys, store.clients, state, follow.reach, clock),
                pages,
                client_pb,
                registration.pending_s,
            ),
            "ResourceService": ResourceServicer(resources, pages),
            "UserService": UserServicer(
                Users(store.users, passwords, follow.reach),
                UserPasswords(
                    store.users,
                    store.failures,
                    passwords,
                    check_password,
                    follow.reach,
                    lambda: state.revision,
                ),
                pages,
            ),
            "RoleService": RoleServicer(Roles(store.roles, follow.reach), pages),
            "KeyService": KeyServicer(ring, follow.reach, pages),
            "RevocationService": RevocationServicer(
                Revocations(
                    store.revocations, store.clients.get, store.users.get, append, follow.reach
                )
            ),
            "AuditService": AuditServicer(Audit(store.audit), pages),
            "ExplainService": ExplainServicer(
                ExplainToken(
                    validate,
                    identify,
                    judge,
                    refresh_keys,
                    store.grants,
                    store.tokens,
                    store.api_keys,
                    store.audit,
                    clients.get,
                    catalog,
                    clock,
                )
            ),
            "SessionService": SessionServicer(
                Sessions(store.sessions, store.grants, store.users.get, append, follow.reach),
                pages,
            ),
        }
        self.housekeeping = Housekeeping(
            {
                "expire-clients": partial(store.clients.expire, registration.pending_s),
                "compact": Compact(store.sweeps),
                **{f"sweep-{table}": partial(sweep, store.sweeps, table) for table in SWEPT},
            },
            settings.housekeeping.interval_s,
            partial(self._elected.does, "housekeeping", LEASE * settings.housekeeping.interval_s),
        )
        listen = settings.listen
        refused = store.audit.refused
        limits: RateLimits = LocalRateLimits(clock)
        if self._redis is not None:
            limits = RedisRateLimits(self._redis, issuer, limits)
        rates = Rates(limits, rates_of(settings.limits), self.metrics.limited, clock)
        peers = Peers(lambda: tls.trust)
        repeats = partial(Repeats, peers, policy, clock)
        main = Pipeline(peers, policy, refused, self.metrics, clock, rates, repeats)
        listeners = [Listener(address(listen.host, listen.port), tls.credentials(), main)]
        if listen.tls_only:
            anonymous = Pipeline(
                lambda _context, _now: NOBODY, policy, refused, self.metrics, clock, rates
            )
            credentials = tls.credentials(client_certificates=False)
            where = address(listen.tls_host, listen.tls_port)
            listeners.append(Listener(where, credentials, anonymous))
        self._rpc = RpcServer(
            listeners,
            servicers,
            state,
            clock,
            reflect=settings.reflection,
            shared=seat is not None,
        )
        self._http: HttpServer | None = None
        self._stopping = False
        self.port = self.tls_port = self.health_port = self.metrics_port = 0
        """Where it listens; 0 where it does not."""

    def _admin_ca(self) -> str | None:
        """The client CA of the administrators: the one set, or the only one; none is guessed."""
        if self._settings.admin_ca:
            return self._settings.admin_ca
        cas = self._prepared.tls.pins("")
        return next(iter(cas)) if len(cas) == 1 else None

    async def _reach(self, revision: int) -> None:
        """As the follower does, for what it is made with."""
        await self.follow.reach(revision)

    async def _reload(self, markers: tuple[Marker, ...]) -> None:
        """Keys and bounds of staleness follow their rows before the revision advances."""
        # What kills does so at once, even where a new key turns out to be unusable.
        self.state.apply(markers, self.state.revision)
        kinds = {marker.kind for marker in markers}
        if MarkerKind.KEYS_CHANGED in kinds or not self.state.keys.by_kid:
            await self._ring.load()
        if MarkerKind.RESOURCE_CHANGED in kinds or self.state.revision == 0:
            found = (await self._catalog()).by_id.values()
            self.state.staleness = {
                resource.resource_id: float(resource.staleness_max_s)
                for resource in found
                if resource.staleness_max_s is not None
            }

    def is_ready(self) -> bool:
        """Whether tokens can be judged now, and more calls are welcome."""
        return (
            not self._stopping and self.state.age(self._clock.boot()) <= self.state.staleness_max_s
        )

    async def start(self) -> None:
        """Serves when it returns. Raises AuthError, or StartError where an address is taken."""
        now = self._clock.wall()
        try:
            with by_itself("Start"):
                await self._ring.ensure()
                await self._resources.ensure_own(now)
            await self._first_polls()
            if self._redis is not None:
                await self._redis.start()
        except ValueError as error:
            await self._store.close()
            raise StartError(f"seal_keys: a signing key {error}") from error
        where = self._settings.listen
        try:
            self._http = HttpServer(
                probes(self.metrics.registry, self.is_ready),
                listen_unix(self._seat.probes)
                if self._seat
                else listen_tcp(where.metrics_host, where.metrics_port),
            )
            ports, self.health_port = await self._rpc.start(
                address(where.health_host, where.health_port)
            )
            self.port, self.tls_port = (*ports, 0)[:2]
        except (OSError, RuntimeError) as error:
            await self.stop()
            if isinstance(error, OSError):
                taken = address(where.metrics_host, where.metrics_port)
                raise cannot_listen(taken, error) from error
            # "Failed to bind to address …; advice about gRPC's own log"
            raise cannot_listen(str(error).partition(";")[0].rpartition(" ")[2]) from error
        self.metrics_port = self._http.port
        self._http.start()
        self._gauges()
        if self._settings.grants.password:
            log.warning("grants.password_is_on", advice="RFC 9700 section 2.4: only for a while")
        self._tasks.start("feed-follow", self.follow.run)
        if self._publish is not None:
            self._tasks.start("feed-publish", self._publish.send)
            self._tasks.start("feed-hear", self._publish.hear)
        self._tasks.start("health", self._rpc.watch_health)
        self._tasks.start("key-rotation", self._rotate_keys)
        self._tasks.start("housekeeping", self.housekeeping.run)
        if self._prepared.pki is not None:
            self._tasks.start("own-certificates", self._renew_own_certificates)
        self._tasks.start(
            "tls-reload", lambda: self._prepared.tls.watch(self._settings.tls.reload_s)
        )

    async def _first_polls(self) -> None:
        """Until the state is confirmed. Of workers that start at once one makes the beat."""
        for _ in range(START_TRIES):
            await self.follow.poll()
            if self.state.confirmed is not None:
                return
            await asyncio.sleep(START_EVERY_S)
        raise AuthError(Reason.STORE_UNAVAILABLE, cause="the database takes no writes")

    async def _rotate_keys(self) -> None:
        """One worker does it; of two whoever comes first, by the database's clock."""
        while True:
            await asyncio.sleep(ROTATE_EVERY_S + jitter(ROTATE_EVERY_S))
            if not await self._elected.does("key-rotation", LEASE * ROTATE_EVERY_S):
                continue
            try:
                await self._ring.rotate(self.state.now(self._clock.boot()))
            except AuthError as error:
                log.warning("keys.rotation_failed", reason=error.reason.name, cause=error.cause)

    async def _renew_own_certificates(self) -> None:
        """A process may outlive a certificate of its own PKI; the listener reloads them."""
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            await asyncio.to_thread(_certificates, self._settings, self._clock)

    def _gauges(self) -> None:
        state, clock = self.state, self._clock
        self.metrics.gauges(
            ("authsvc_feed_revision", "Applied revision", lambda: float(state.revision)),
            (
                "authsvc_feed_age_seconds",
                "Age of its confirmation",
                lambda: state.age(clock.boot()),
            ),
        )

    async def stop(self) -> None:
        """NOT_SERVING, then calls under way end, then everything is given back."""
        self._stopping = True
        await self._rpc.stop(self._settings.drain_s)
        await self._tasks.stop()
        await self._elected.resign()
        if self._redis is not None:
            await self._redis.close()
        if self._http is not None:
            await self._http.stop()
        await self._passwords.close()
        await self._store.close()


def cannot_listen(where: str, error: OSError | None = None) -> StartError:
    """What to say of an address that is taken, or is none."""
    why = f" ({os.strerror(error.errno or 0)})" if error else ""
    return StartError(f"cannot listen on {where}{why}: is a server running there?")


async def open_app(settings: Settings, clock: Clock | None = None, seat: Seat | None = None) -> App:
    """A server that can be started. Raises StartError, or AuthError where the store is away."""
    clock = clock or SystemClock()
    prepared = prepare(settings, clock)
    database = await _current(prepared, clock)
    try:
        audit_s = settings.housekeeping.audit_days * DAY_S
        store = sql_store(database, audit_s=audit_s)
        return App(settings, prepared, store, clock, seat)
    except BaseException:
        await database.close()
        raise


async def prepare_workers(settings: Settings) -> None:
    """Makes and looks at, once, what all workers open. Raises as `open_app`."""
    clock = SystemClock()
    await (await _current(prepare(settings, clock), clock)).close()


async def _current(prepared: Prepared, clock: Clock) -> Database:
    """The database with its schema up to date, which the embedded one is brought to."""
    database = open_database(prepared.database_url, clock, prepared.database_id)
    try:
        if not database.hold():
            raise StartError(
                f"{database.url.database} is open in a server with another state directory: give"
                " both the same one, or each its own database"
            )
        found = await standing(database)
        if found is Schema.EMPTY and prepared.embedded:
            await upgrade(database)
            found = Schema.CURRENT
        if found is not Schema.CURRENT:
            raise StartError(
                f"the schema of the database is {found.value}:"
                " `authsvc migrate` brings it up to date where it can"
            )
        return database
    except BaseException:
        await database.close()
        raise


def open_database(url: str, clock: Clock, database_id: str) -> Database:
    """The database of a URL. Raises StartError, without the URL's password."""
    try:
        return Database(url, clock, sqlite_id=database_id)
    except Exception as error:
        where = ""
        with contextlib.suppress(Exception):
            where = shown(make_url(url))
        raise StartError(f"database.url {where}: not usable ({type(error).__name__})") from error


async def migrate(settings: Settings, *, check: bool) -> tuple[str, Schema]:
    """The database, without its password, and what it held; brought up to date unless `check`.

    UNKNOWN is left alone. Raises StartError, or AuthError where the database is away.
    """
    url = database_url(settings)
    lineage = "" if check else database_id(settings)
    database = open_database(url, SystemClock(), lineage)
    try:
        where = shown(database.url)
        if check and database.is_missing():
            return where, Schema.EMPTY  # to look into it would make it
        return where, await (standing(database) if check else upgrade(database))
    finally:
        await database.close()


@dataclass(frozen=True, slots=True)
class Fence:
    """What a fence kills or killed, beside all access tokens."""

    database: str
    """Without its password."""
    impact: Impact
    head: int
    """Revision of the last change before it."""
    revision: int
    """Of its cutoff; 0 where nothing was written."""


async def fence(settings: Settings, *, comment: str, dry: bool) -> Fence:
    """Cuts off everything in a new epoch, above all that a restored database may have forgotten.

    Raises StartError, or AuthError where the database is away.
    """
    lineage = "" if dry else database_id(settings)
    database = open_database(database_url(settings), SystemClock(), lineage)
    try:
        where = shown(database.url)
        found = Schema.EMPTY if database.is_missing() else await standing(database)
        if found is not Schema.CURRENT:
            raise StartError(
                f"{where}: the schema is {found.value}: `authsvc migrate` brings it up to date"
                " where it can"
            )
        store, everything = sql_store(database), change(MarkerKind.CUTOFF_EVERYTHING)
        impact = await store.revocations.impact(everything)
        head = (await store.feed.read(0)).head
        begin(lambda: Act("Fence", comment=comment))
        revision = 0 if dry else await store.feed.fence()
        return Fence(where, impact, head, revision)
    finally:
        await database.close()


class Stops(Protocol):
    """A server that was started."""

    async def stop(self) -> None:
        """Ends it well."""


def settle() -> None:
    """Spares every later garbage collection what lives as long as the process, and has those of
    everything seldom (`COLLECT_AFTER`); before what is loaded at a start, and after it.
    """
    gc.set_threshold(*COLLECT_AFTER)
    gc.collect()
    gc.freeze()


async def serve(app: Stops, ready: Callable[[], None] | None = None) -> None:
    """Runs until SIGTERM or SIGINT; calls `ready` once these end it well."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    settle()
    if ready is not None:
        ready()
    await ended.wait()
    log.info("server.draining")
    loop.remove_signal_handler(signal.SIGINT)  # who presses Ctrl-C again does not want to wait
    await app.stop()
    log.info("server.stopped")
