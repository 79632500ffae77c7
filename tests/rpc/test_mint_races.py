"""Whatever happens at whichever await of a mint: it is refused, or what it answered dies by it.

Design section 5: `rev` is the applied revision before the first authority is read, and `iat`
counts from there; a mint that takes more than 10 s is abandoned.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from authsvc.authenticate import Credentials
from authsvc.errors import AuthError, Reason
from authsvc.grants.proof import Exchange, Password, Presented
from authsvc.grants.token_exchange import (
    ACCESS_TOKEN_TYPE,
    REFRESH_TOKEN_TYPE,
    token_exchange,
)
from authsvc.issue import TokenRequest
from authsvc.keys.secrets import API_KEY_PREFIX, CLIENT_SECRET_PREFIX, digest, new_id, new_secret
from authsvc.mint import MINT_S_MAX, Mint, OpenGrant, TokenAnswer
from authsvc.model import (
    NOBODY,
    ApiKey,
    AuthMethod,
    CertificateIdentity,
    Client,
    ClientMetadata,
    ClientState,
    GrantType,
    IdentityKind,
    Peer,
    User,
    UserState,
    Validity,
)
from authsvc.refresh import RefreshRequest
from authsvc.store.port import Transition, change
from authsvc_client.core.judge import Verified
from authsvc_client.core.markers import MarkerKind
from tests.harness import hand_clock, migrate
from tests.rig import API, OPAQUE, PASSWORDS, SCOPES, Rig, fresh_database
from tests.rpc.test_authentication import JWKS, assertion, basic

KIND = MarkerKind
FOREVER = Validity(0, 1e11)
SHOP, CLIENT = "shop", "client"
PASSWORD, NEW_PASSWORD = "correct horse battery", "staple of another kind"


class Sweep:
    """Counts steps; at the one chosen something happens."""

    def __init__(self) -> None:
        self.at = 0
        self.count = 0
        self.event: Callable[[], Awaitable[None]] | None = None

    async def __call__(self) -> None:
        if self.event is None:
            return
        self.count += 1
        if self.count == self.at:
            event, self.event = self.event, None
            await event()


@dataclass
class Cast:
    """Those of one round; fresh, for an event may end them."""

    rig: Rig
    client_id: str = field(default_factory=new_id)
    shop_id: str = field(default_factory=new_id)
    secret: str = field(default_factory=lambda: new_secret(CLIENT_SECRET_PREFIX))
    api_key: str = field(default_factory=lambda: new_secret(API_KEY_PREFIX))
    api_key_id: str = field(default_factory=new_id)
    subject_token: str = ""
    subject_jti: str = ""
    refresh_token: str = ""
    grant_id: str = ""
    kid: str = ""
    user_id: str = field(default_factory=new_id)
    session_id: str = ""
    """Another session of the user."""

    @property
    def peer(self) -> Peer:
        name = f"spiffe://test/{self.client_id}"
        paths = MappingProxyType({"ca": FOREVER})
        return Peer(f"x5t-{self.client_id}", name, frozenset(), "", FOREVER, paths)

    async def enter(
        self,
        *,
        subject: bool = False,
        grant: bool = False,
        person: bool = False,
        logged_in: bool = False,
    ) -> None:
        """Registers them, with a token of the shop's, and a grant made from it; or a user, who may
        be logged in already.
        """
        rig, now = self.rig, self.rig.clock.wall()
        for client_id in (self.client_id, self.shop_id):
            metadata = ClientMetadata(
                "test",
                frozenset(GrantType),
                frozenset(AuthMethod),
                frozenset(SCOPES.values()),
                CertificateIdentity(IdentityKind.SAN_URI, f"spiffe://test/{client_id}", "ca"),
                validates=frozenset({API, OPAQUE}),
                jwks=JWKS,
                first_party=True,
            )
            await rig.store.clients.add(
                Client(
                    client_id,
                    metadata,
                    ClientState.APPROVED,
                    now,
                    now,
                    "test",
                    secret_digest=digest(self.secret),
                )
            )
        self.kid = rig.ring.signer.kid
        if person:
            user = User(self.user_id, self.user_id, now, now)
            await rig.store.users.add(user, await PASSWORDS.hash(PASSWORD))
        if logged_in:
            known = await by_password(self)
            self.refresh_token = known.refresh_token
            verified = await rig.identify.alive(known.access_token)
            assert verified is not None
            self.session_id, self.grant_id = verified.claims.session_id, verified.claims.grant_id
        if subject:
            shop = Credentials(self.shop_id, secret=self.secret)
            request = TokenRequest(GrantType.CLIENT_CREDENTIALS, shop, resources=(API,))
            issued = await rig.issue(request, NOBODY)
            self.subject_token, self.subject_jti = issued.access_token, issued.jti
        if grant:
            mine = Credentials(self.client_id, secret=self.secret)
            self.refresh_token = (
                await rig.issue(self.exchange(mine, REFRESH_TOKEN_TYPE), NOBODY)
            ).refresh_token
            stored = await self.stored(self.refresh_token)
            assert stored is not None
            self.grant_id = stored.grant_id

    async def stored(self, refresh_token: str) -> Any:
        presented = self.rig.refresh_keys.read(refresh_token)
        assert presented is not None
        return await self.rig.store.grants.by_handle(presented.handle)

    async def with_api_key(self) -> None:
        key = ApiKey(
            self.api_key_id,
            self.client_id,
            "",
            frozenset(SCOPES.values()),
            self.rig.state.revision,
            self.rig.clock.wall(),
            digest=digest(self.api_key),
        )
        await self.rig.store.api_keys.add(key, 9)

    def exchange(
        self, mine: Credentials, wanted: str, resources: tuple[str, ...] = (API,)
    ) -> TokenRequest:
        exchange = Exchange(self.subject_token, ACCESS_TOKEN_TYPE, requested_token_type=wanted)
        return TokenRequest(GrantType.TOKEN_EXCHANGE, mine, resources=resources, exchange=exchange)

    async def by(self, credentials: Credentials, resource: str = API) -> TokenAnswer:
        request = TokenRequest(GrantType.CLIENT_CREDENTIALS, credentials, resources=(resource,))
        return await self.rig.issue(request, self.peer)


# --- mints ---


async def by_secret(cast: Cast) -> TokenAnswer:
    return await cast.by(Credentials(cast.client_id, secret=cast.secret))


async def by_basic_opaque(cast: Cast) -> TokenAnswer:
    offered = Credentials(cast.client_id, authorization=basic(cast.client_id, cast.secret))
    return await cast.by(offered, OPAQUE)


async def by_certificate(cast: Cast) -> TokenAnswer:
    return await cast.by(Credentials(cast.client_id))


async def by_assertion(cast: Cast) -> TokenAnswer:
    signed = assertion(cast.client_id, exp=int(cast.rig.clock.wall()) + 300)
    return await cast.by(Credentials(cast.client_id, assertion=signed))


async def by_api_key(cast: Cast) -> TokenAnswer:
    return await cast.by(Credentials(cast.client_id, authorization=f"Bearer {cast.api_key}"))


async def exchanged(cast: Cast) -> TokenAnswer:
    mine = Credentials(cast.client_id, secret=cast.secret)
    return await cast.rig.issue(cast.exchange(mine, ACCESS_TOKEN_TYPE), cast.peer)


async def exchanged_to_a_grant(cast: Cast) -> TokenAnswer:
    mine = Credentials(cast.client_id, secret=cast.secret)
    return await cast.rig.issue(cast.exchange(mine, REFRESH_TOKEN_TYPE), cast.peer)


async def by_password(cast: Cast) -> TokenAnswer:
    mine = Credentials(cast.client_id, secret=cast.secret)
    told = Password(cast.user_id, PASSWORD)
    request = TokenRequest(GrantType.PASSWORD, mine, resources=(API,), password=told)
    return await cast.rig.issue(request, cast.peer)


async def by_password_opaque(cast: Cast) -> TokenAnswer:
    mine = Credentials(cast.client_id, secret=cast.secret)
    told = Password(cast.user_id, PASSWORD)
    request = TokenRequest(GrantType.PASSWORD, mine, resources=(OPAQUE,), password=told)
    return await cast.rig.issue(request, cast.peer)


async def login_refreshed(cast: Cast) -> TokenAnswer:
    return await refreshed(cast)


async def refreshed(cast: Cast) -> TokenAnswer:
    mine = Credentials(cast.client_id, secret=cast.secret)
    return await cast.rig.refresh(RefreshRequest(cast.refresh_token, mine), cast.peer)


# --- events ---


async def suspend(cast: Cast) -> None:
    await _suspend(cast, cast.client_id)


async def suspend_shop(cast: Cast) -> None:
    await _suspend(cast, cast.shop_id)


async def _suspend(cast: Cast, client_id: str) -> None:
    allowed = frozenset({ClientState.APPROVED})
    step = Transition(client_id, allowed, ClientState.SUSPENDED, "test", "", cut_off=True)
    await cast.rig.store.clients.move(step)


async def suspend_and_resume(cast: Cast) -> None:
    await suspend(cast)
    allowed = frozenset({ClientState.SUSPENDED})
    step = Transition(cast.client_id, allowed, ClientState.APPROVED, "test", "", keep_expiry=True)
    await cast.rig.store.clients.move(step)


async def cut_off_everything(cast: Cast) -> None:
    await cast.rig.store.feed.append([change(KIND.CUTOFF_EVERYTHING)])


async def cut_off_subject(cast: Cast) -> None:
    subject = cast.shop_id if cast.subject_token else cast.client_id
    await cast.rig.store.feed.append([change(KIND.CUTOFF_SUBJECT, subject)])


async def revoke_root(cast: Cast) -> None:
    await cast.rig.store.feed.append([change(KIND.TOKEN_DEAD, cast.subject_jti)])


async def kill_grant(cast: Cast) -> None:
    await cast.rig.store.feed.append([change(KIND.GRANT_DEAD, cast.grant_id)])


async def taint(cast: Cast) -> None:
    await cast.rig.ring.taint(cast.kid, dry=False)


async def delete_resource(cast: Cast) -> None:
    rig = cast.rig
    for resource_id in SCOPES:
        await rig.store.resources.delete(resource_id, None)


async def delete_api_key(cast: Cast) -> None:
    await cast.rig.store.api_keys.delete(cast.api_key_id)


async def eleven_seconds(cast: Cast) -> None:
    cast.rig.clock.advance(MINT_S_MAX + 1)


async def disable_and_enable(cast: Cast) -> None:
    await cast.rig.store.users.move(cast.user_id, None, UserState.DISABLED)
    await cast.rig.store.users.move(cast.user_id, None, UserState.ACTIVE)


async def delete_user(cast: Cast) -> None:
    await cast.rig.store.users.delete(cast.user_id, None)


async def set_password(cast: Cast) -> None:
    await cast.rig.store.users.set_password(cast.user_id, await PASSWORDS.hash(NEW_PASSWORD))


async def set_password_in_the_other_session(cast: Cast) -> None:
    await cast.rig.store.users.set_password(
        cast.user_id, await PASSWORDS.hash(NEW_PASSWORD), keep_session=cast.session_id
    )


async def cut_off_user_at_client(cast: Cast) -> None:
    marker = change(KIND.CUTOFF_SUBJECT_CLIENT, cast.user_id, cast.client_id)
    await cast.rig.store.feed.append([marker])


async def end_its_session(cast: Cast) -> None:
    await cast.rig.store.feed.append([change(KIND.SESSION_DEAD, cast.session_id)])


Mints = Callable[[Cast], Awaitable[TokenAnswer]]
Happens = Callable[[Cast], Awaitable[None]]
ALWAYS: list[Happens] = [
    suspend_and_resume,
    cut_off_everything,
    cut_off_subject,
    delete_resource,
    eleven_seconds,
]
OF_SHOP: list[Happens] = [*ALWAYS, suspend_shop, revoke_root, taint]
EVENTS: dict[Mints, list[Happens]] = {
    by_secret: [*ALWAYS, taint, suspend],
    by_basic_opaque: ALWAYS,
    by_certificate: [*ALWAYS, taint],
    by_assertion: [*ALWAYS, taint],
    by_api_key: [*ALWAYS, taint, delete_api_key],
    exchanged: OF_SHOP,
    exchanged_to_a_grant: OF_SHOP,
    refreshed: [*OF_SHOP, kill_grant, suspend],
    by_password: [
        disable_and_enable,
        delete_user,
        set_password,
        set_password_in_the_other_session,
        eleven_seconds,
    ],
    by_password_opaque: [disable_and_enable],
    login_refreshed: [set_password, cut_off_user_at_client, end_its_session],
}
OF_PERSONS = (by_password, by_password_opaque, login_refreshed)
STEPS_MIN = 6


# --- the sweep ---


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("template") / "migrated.db"
    asyncio.run(migrate(f"sqlite+aiosqlite:///{file}"))
    return file


@asynccontextmanager
async def rigged(template: Path, directory: Path, **more: Any) -> AsyncIterator[tuple[Rig, Sweep]]:
    clock, sweep = hand_clock(), Sweep()
    database = fresh_database(template, directory, clock)
    try:
        rig = Rig(database, clock, step=sweep, **more)
        await rig.start()
        yield rig, sweep
    finally:
        await database.close()


async def survivors(
    rig: Rig, sweep: Sweep, mint: Mints, happens: Happens, *, applied: bool, warm: bool
) -> list[str]:
    """The steps at which an answer survived what happened there; each step is tried once."""
    found: list[str] = []
    step = 0
    while True:
        step += 1
        cast = Cast(rig)
        is_exchange = mint in (exchanged, exchanged_to_a_grant, refreshed)
        await cast.enter(
            subject=is_exchange,
            grant=mint is refreshed,
            person=mint in OF_PERSONS,
            logged_in=mint is login_refreshed or happens is set_password_in_the_other_session,
        )
        if mint is by_api_key:
            await cast.with_api_key()
        if not warm:
            await rig.forget_rows()

        async def event(cast: Cast = cast) -> None:
            await happens(cast)
            if applied:
                await rig.follow.poll()

        sweep.at, sweep.count, sweep.event = step, 0, event
        answer, refusal = await attempt(mint, cast)
        if sweep.event is not None:  # no such step any more
            sweep.event = None
            assert refusal is None
            assert step > STEPS_MIN
            return found
        await rig.follow.poll()
        if happens is eleven_seconds and answer is None:
            assert refusal is Reason.MINT_ABANDONED
            if mint in (refreshed, login_refreshed):
                await refreshed(cast)  # the token is as good as before
        if happens is delete_resource:
            await rig.start()  # both are there again, and what was of them is dead
        if answer is not None and await _lives(cast, answer, happens):
            found.append(f"{mint.__name__}: {happens.__name__} at step {step}")


async def attempt(mint: Mints, cast: Cast) -> tuple[TokenAnswer | None, Reason | None]:
    """What was answered, or why not."""
    try:
        return await mint(cast), None
    except AuthError as error:
        return None, error.reason


async def _lives(cast: Cast, answer: TokenAnswer, happens: Happens) -> bool:
    verified = await cast.rig.identify.alive(answer.access_token) if answer.access_token else None
    if verified is not None and not (happens is taint and not _is_of(verified, cast.kid)):
        return True
    if not answer.refresh_token:
        return False
    cast.refresh_token = answer.refresh_token
    try:
        await refreshed(cast)
    except AuthError:
        return False
    return True


def _is_of(verified: Verified, kid: str) -> bool:
    """Whether the key had a part in it; what is signed by its heir alone may live."""
    return kid in (verified.kid, *verified.claims.key_ids)


@pytest.mark.parametrize("mint", EVENTS, ids=lambda mint: mint.__name__)
async def test_nothing_survives_what_happens_while_it_is_made(
    template: Path, tmp_path: Path, mint: Mints
) -> None:
    found: list[str] = []
    async with rigged(template, tmp_path) as (rig, sweep):
        for happens in EVENTS[mint]:
            for applied in (True, False):
                found += await survivors(
                    rig, sweep, mint, happens, applied=applied, warm=not applied
                )
    assert found == []


class LateMint(Mint):
    """A mint with the mistake: the revision is that of the end."""

    async def __call__(self, moment: Any, *given: Any, **named: Any) -> TokenAnswer:
        late = moment._replace(revision=self._state.revision)
        return await super().__call__(late, *given, **named)


class LateOpenGrant(OpenGrant):
    """The same mistake."""

    async def __call__(self, moment: Any, *given: Any, **named: Any) -> tuple[str, float]:
        late = moment._replace(revision=2**40)
        return await super().__call__(late, *given, **named)


class TrustingOpenGrant(OpenGrant):
    """Takes it that the password is still the one that was checked."""

    async def open(self, login: Any, client: Any, password_version: int) -> str:
        for version in (password_version, password_version + 1):
            with contextlib.suppress(AuthError):
                return await super().open(login, client, version)
        raise AuthError(Reason.INVALID_GRANT)


class EndlessMint(Mint):
    """A mint that is never too late."""

    def end(self, moment: Any) -> None:
        """Takes any time."""


@pytest.mark.parametrize(
    ("mint", "happens", "planted"),
    [
        (by_secret, suspend_and_resume, {"mint": LateMint}),
        (by_certificate, cut_off_everything, {"mint": LateMint}),
        (exchanged, suspend_shop, {"mint": LateMint}),
        (exchanged_to_a_grant, suspend_shop, {"open_grant": LateOpenGrant}),
        (by_basic_opaque, eleven_seconds, {"mint": EndlessMint}),
        (by_password, disable_and_enable, {"mint": LateMint}),
        (by_password, set_password_in_the_other_session, {"open_grant": TrustingOpenGrant}),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
async def test_the_sweep_finds_a_revision_that_is_taken_late(
    template: Path, tmp_path: Path, mint: Mints, happens: Happens, planted: dict[str, Any]
) -> None:
    async with rigged(template, tmp_path, **planted) as (rig, sweep):
        assert await survivors(rig, sweep, mint, happens, applied=True, warm=False)


async def test_a_scope_that_went_to_another_resource_is_not_the_grants(
    template: Path, tmp_path: Path
) -> None:
    async with rigged(template, tmp_path) as (rig, _):
        cast = Cast(rig)
        await cast.enter(subject=True, grant=True)
        assert (await refreshed(cast)).audiences == (API,)
        resources = rig.store.resources
        await resources.update(API, None, lambda known: replace(known, scopes={}))
        moved = {**(await resources.catalog()).by_id[OPAQUE].scopes, SCOPES[API]: ""}
        await resources.update(OPAQUE, None, lambda known: replace(known, scopes=moved))
        await rig.follow.poll()
        assert await attempt(refreshed, cast) == (None, Reason.INVALID_TARGET)


async def test_what_an_actor_token_proved_dies_with_its_key_too(
    template: Path, tmp_path: Path
) -> None:
    async with rigged(template, tmp_path) as (rig, _):
        cast = Cast(rig)
        await cast.enter(subject=True)
        own = await by_secret(cast)

        async def alive(token: str) -> Verified | None:
            found = await rig.identify.alive(token)
            if token == own.access_token and found is not None:
                return Verified(None, found.claims, kid="the actor's")
            return found

        tokens = {
            "subject_token": cast.subject_token,
            "subject_token_type": ACCESS_TOKEN_TYPE,
            "actor_token": own.access_token,
            "actor_token_type": ACCESS_TOKEN_TYPE,
        }
        client = await rig.store.clients.get(cast.client_id)
        assert client is not None
        presented = Presented(client, "", frozenset({API}), alive, 0.0, Exchange(**tokens))
        assert set((await token_exchange(presented)).origin.key_ids) == {cast.kid, "the actor's"}
