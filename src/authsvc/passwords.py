"""CheckPassword: whether it is the user's, at the same cost and in the same words for everybody.

Each try is counted before it is looked at: many at once get no further than one after the other.
"""

from authsvc.errors import AuthError, Reason
from authsvc.keys.passwords import Passwords
from authsvc.keys.secrets import digest
from authsvc.model import Peer, UserState
from authsvc.oauth.usernames import username_key
from authsvc.store.port import Counter, FailureStore, PasswordRecord, UserStore

ACCOUNT_FREE = 5
PEER_FREE = 100


class Charge:
    """A failure that was counted ahead of a try, and is taken back where the try is none."""

    def __init__(self, store: FailureStore, *counters: Counter) -> None:
        self._store = store
        self._counters = counters

    async def make(self) -> None:
        """Raises AuthError RATE_LIMITED where it is too early to try again."""
        wait = await self._store.charge(self._counters)
        if wait > 0:
            raise AuthError(Reason.RATE_LIMITED, "wait after so many failures", retry_after_s=wait)

    async def take_back(self, *, forget: tuple[Counter, ...] = ()) -> None:
        """The try was none, or it was good; then what failed for its account is forgotten."""
        kept = [counter for counter in self._counters if counter not in forget]
        await self._store.take_back(kept, forget=forget)

    async def stands(self, subject: str, cause: str) -> AuthError:
        """Records a failure; the refusal, whose cause only the log learns."""
        await self._store.refused(subject, Reason.INVALID_GRANT)
        return AuthError(Reason.INVALID_GRANT, cause=cause)


def account(username: str) -> Counter:
    """Of an account, be there one or not."""
    return Counter(digest(f"account {username_key(username)}"), ACCOUNT_FREE)


def peer_at(peer: Peer, address: str) -> Counter:
    """Of a peer: its certificate, or its address."""
    who = f"certificate {peer.thumbprint}" if peer.thumbprint else f"address {address}"
    return Counter(digest(f"peer {who}"), PEER_FREE)


class CheckPassword:
    """Checks a password."""

    def __init__(self, users: UserStore, failures: FailureStore, passwords: Passwords) -> None:
        self._users = users
        self._failures = failures
        self._passwords = passwords

    async def __call__(
        self, username: str, password: str, peer: Peer, address: str
    ) -> PasswordRecord:
        """The user, who is let in.

        Raises AuthError INVALID_GRANT, or RATE_LIMITED: then nothing was looked at.
        """
        counter = account(username)
        charge = Charge(self._failures, counter, peer_at(peer, address))
        await charge.make()
        known = await self._users.password_of(username)
        return await self._check(known, password, charge, counter)

    async def of_user(
        self, user_id: str, password: str, peer: Peer, address: str
    ) -> PasswordRecord:
        """As above, of a user by its id."""
        known = await self._users.password(user_id)
        counter = account(known.user.username if known is not None else user_id)
        charge = Charge(self._failures, counter, peer_at(peer, address))
        await charge.make()
        return await self._check(known, password, charge, counter)

    async def _check(
        self, known: PasswordRecord | None, password: str, charge: Charge, counter: Counter
    ) -> PasswordRecord:
        try:
            matches = await self._passwords.verify(known.hash if known else "", password)
        except AuthError:  # nothing was tried
            await charge.take_back()
            raise
        if known is None or not matches or known.user.state is not UserState.ACTIVE:
            subject = known.user.user_id if known is not None else ""
            raise await charge.stands(subject, _cause(known, matches=matches))
        await charge.take_back(forget=(counter,))
        if self._passwords.needs_rehash(known.hash):
            await self._rehash(known, password)
        return known

    async def _rehash(self, known: PasswordRecord, password: str) -> None:
        """With today's parameters; another time where there is no room now."""
        try:
            made = await self._passwords.hash(password)
        except AuthError:
            return
        await self._users.rehash(known.user.user_id, known.hash, made)


def _cause(known: PasswordRecord | None, *, matches: bool) -> str:
    if known is None:
        return "no such user"
    if not known.hash:
        return "the user has no password"
    return "the user is disabled" if matches else "wrong password"
