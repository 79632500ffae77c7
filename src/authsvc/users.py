"""Users: made, changed, stopped and deleted, and how they get their passwords."""

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import structlog

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.keys.passwords import Passwords
from authsvc.keys.secrets import RESET_CODE_PREFIX, digest, is_secret, new_id, new_secret
from authsvc.model import SCOPE_ADMIN, Caller, Peer, User, UserState
from authsvc.oauth.usernames import is_username
from authsvc.passwords import Charge, CheckPassword, peer_at
from authsvc.store.port import FailureStore, UserFilter, UserStore

EDITABLE = frozenset({"username", "display_name", "email"})

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class NewUser:
    """A user as it is asked for."""

    username: str
    display_name: str = ""
    email: str = ""
    password: str = field(default="", repr=False)
    """Empty: none."""


@dataclass(frozen=True, slots=True)
class Imported:
    """The user of a row."""

    user: User
    created: bool
    """Else it was there already."""


class Users:
    """Administers users."""

    def __init__(
        self, store: UserStore, passwords: Passwords, reach: Callable[[int], Awaitable[None]]
    ) -> None:
        self._store = store
        self._passwords = passwords
        self._reach = reach

    async def create(self, asked: NewUser, caller: Caller, request_id: str = "") -> User:
        """A user, or the one of the same request.

        Raises AuthError FIELD_INVALID, ALREADY_EXISTS, REQUEST_ID_REUSED, PASSWORD_NOT_ACCEPTED or
        RATE_LIMITED.
        """
        _require_username(asked.username, "user.username")
        request = _request(caller, request_id, asked) if request_id else None
        user = await self._add(asked, request)
        if request is not None and asked.password:
            await self._require_first(user, asked.password)
        log.info("user.created", user=user.user_id, by=caller.name)
        return user

    async def _add(self, asked: NewUser, request: tuple[bytes, bytes] | None = None) -> User:
        hashed = ""
        if asked.password:
            self._passwords.require_good(asked.password, asked.username)
            hashed = await self._passwords.hash(asked.password)
        user = User(new_id(), asked.username, 0.0, 0.0, asked.display_name, asked.email)
        return await self._store.add(user, hashed, request)

    async def _require_first(self, user: User, password: str) -> None:
        """That a repeated request has the password of the first: no digest of it is kept."""
        known = await self._store.password(user.user_id)
        if known is None or known.password_version > 1:
            return  # it has another by now
        if not await self._passwords.verify(known.hash, password):
            raise AuthError(Reason.REQUEST_ID_REUSED)

    async def get(self, user_id: str) -> User:
        """Raises AuthError USER_NOT_FOUND."""
        user = await self._store.get(user_id)
        if user is None:
            raise AuthError(Reason.USER_NOT_FOUND)
        return user

    async def page(self, wanted: UserFilter, after: str, limit: int) -> tuple[User, ...]:
        """In the order of their ids, from the one after `after`."""
        return await self._store.page(wanted, after, limit)

    async def update(
        self, user_id: str, asked: NewUser, fields: frozenset[str], version: int | None
    ) -> tuple[User, int]:
        """Changes these fields, of EDITABLE, to what is asked; answers the revision too.

        Raises AuthError FIELD_INVALID, USER_NOT_FOUND, ETAG_MISMATCH or ALREADY_EXISTS.
        """
        if not fields or not fields <= EDITABLE:
            raise _invalid("update_mask", f"names one or more of: {', '.join(sorted(EDITABLE))}")
        if "username" in fields:
            _require_username(asked.username, "user.username")
        changed = {name: getattr(asked, name) for name in fields}
        user, revision = await self._store.update(
            user_id, version, lambda known: replace(known, **changed)
        )
        await self._reach(revision)
        return user, revision

    async def disable(self, user_id: str, version: int | None) -> tuple[User, int]:
        """Stops an ACTIVE user and cuts off what it has; answers the revision too.

        Raises AuthError USER_NOT_FOUND, ETAG_MISMATCH, USER_STATE_CONFLICT.
        """
        return await self._move(user_id, version, UserState.DISABLED)

    async def enable(self, user_id: str, version: int | None) -> tuple[User, int]:
        """Lets a DISABLED user in again, as above; what was cut off stays dead."""
        return await self._move(user_id, version, UserState.ACTIVE)

    async def _move(self, user_id: str, version: int | None, to: UserState) -> tuple[User, int]:
        user, revision = await self._store.move(user_id, version, to)
        log.info("user.moved", user=user_id, to=to.name, revision=revision)
        await self._reach(revision)
        return user, revision

    async def delete(self, user_id: str, version: int | None) -> int:
        """Deletes a user, cuts off what it had, and answers the revision.

        Raises AuthError USER_NOT_FOUND, ETAG_MISMATCH.
        """
        revision = await self._store.delete(user_id, version)
        log.info("user.deleted", user=user_id, revision=revision)
        await self._reach(revision)
        return revision

    async def import_row(self, asked: NewUser) -> Imported:
        """As `create`; a user who is there with the same fields is left as it is."""
        _require_username(asked.username, "username")
        found = await self._same(asked)
        if found is not None:
            return Imported(found, created=False)
        try:
            return Imported(await self._add(asked), created=True)
        except AuthError as error:
            # It may have been added meanwhile, by the same import elsewhere.
            found = await self._same(asked) if error.reason is Reason.ALREADY_EXISTS else None
            if found is None:
                raise
            return Imported(found, created=False)

    async def _same(self, asked: NewUser) -> User | None:
        """The user of the name, where nothing else is asked for than there is."""
        for known in await self._store.page(UserFilter(username=asked.username), "", 1):
            if (known.username, known.display_name, known.email) != (
                asked.username,
                asked.display_name,
                asked.email,
            ):
                raise AuthError(Reason.ALREADY_EXISTS, "username", metadata={"field": "username"})
            return known
        return None


class UserPasswords:
    """Sets passwords: by an administrator, by the user itself, or by a code."""

    def __init__(
        self,
        store: UserStore,
        failures: FailureStore,
        passwords: Passwords,
        check: CheckPassword,
        reach: Callable[[int], Awaitable[None]],
        revision: Callable[[], int],
    ) -> None:
        """`revision` answers the applied one."""
        self._store = store
        self._failures = failures
        self._passwords = passwords
        self._check = check
        self._reach = reach
        self._revision = revision

    async def set(
        self,
        user_id: str,
        current: str,
        new: str,
        caller: Caller | None,
        peer: Peer,
        address: str,
        *,
        keep_session: bool,
    ) -> int:
        """Sets a password and answers the revision; `user_id` empty: the caller's own.

        Raises AuthError TOKEN_MISSING, INSUFFICIENT_SCOPE, USER_NOT_FOUND, USER_STATE_CONFLICT,
        INVALID_GRANT, PASSWORD_NOT_ACCEPTED or RATE_LIMITED.
        """
        whose = user_id or (caller.subject if caller is not None else "")
        if caller is None or not whose:
            raise AuthError(Reason.TOKEN_MISSING)
        version = None
        if SCOPE_ADMIN in caller.scopes:
            user = await self._store.get(whose)
            if user is None:
                raise AuthError(Reason.USER_NOT_FOUND)
        else:
            _require_own(caller, whose)
            known = await self._check.of_user(whose, current, peer, address)
            user, version = known.user, known.password_version
        self._passwords.require_good(new, user.username)
        revision = await self._store.set_password(
            whose,
            await self._passwords.hash(new),
            version=version,
            keep_session=caller.session_id if keep_session and caller.subject == whose else "",
        )
        log.info("user.password_set", user=whose, by=caller.name, revision=revision)
        await self._reach(revision)
        return revision

    async def create_reset_code(self, user_id: str, lifetime_s: float) -> tuple[str, float]:
        """A code and its end. Raises AuthError USER_NOT_FOUND, USER_STATE_CONFLICT."""
        revision, code = self._revision(), new_secret(RESET_CODE_PREFIX)
        expires = await self._store.add_reset_code(user_id, digest(code), revision, lifetime_s)
        return code, expires

    async def reset(self, code: str, new: str, peer: Peer, address: str) -> int:
        """Sets a password by a code, uses it up, and answers the revision.

        Raises AuthError INVALID_GRANT, PASSWORD_NOT_ACCEPTED or RATE_LIMITED: but for the first,
        the code stays good.
        """
        charge = Charge(self._failures, peer_at(peer, address))
        await charge.make()
        value = digest(code)
        is_ours = is_secret(code, RESET_CODE_PREFIX)
        user = await self._store.by_reset_code(value) if is_ours else None
        if user is None:
            raise await charge.stands("", "the code is not good")
        try:
            self._passwords.require_good(new, user.username)
            hashed = await self._passwords.hash(new)
        except AuthError:
            await charge.take_back()
            raise
        revision = await self._store.reset_password(value, hashed)
        if revision is None:
            raise await charge.stands(user.user_id, "the code was used meanwhile")
        await charge.take_back()
        log.info("user.password_reset", user=user.user_id, revision=revision)
        await self._reach(revision)
        return revision


def _require_own(caller: Caller, user_id: str) -> None:
    """That it is the user's own bearer token."""
    if not caller.subject:
        raise AuthError(Reason.TOKEN_MISSING)
    if caller.subject != user_id:
        raise AuthError(Reason.INSUFFICIENT_SCOPE, metadata={"scope": SCOPE_ADMIN})


def _request(caller: Caller, request_id: str, asked: NewUser) -> tuple[bytes, bytes]:
    """Digests of who asks under which id, and of what is asked, but for the password."""
    content: Sequence[object] = (
        asked.username,
        asked.display_name,
        asked.email,
        bool(asked.password),
    )
    return digest(json.dumps(["user", caller.name, request_id])), digest(json.dumps(content))


def _require_username(username: str, where: str) -> None:
    if not is_username(username):
        raise _invalid(where, "is empty, too long, or holds what cannot be seen")


def _invalid(where: str, text: str) -> AuthError:
    violations = (FieldViolation(where, text),)
    return AuthError(Reason.FIELD_INVALID, f"{where} {text}", violations=violations)
