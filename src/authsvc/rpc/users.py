"""UserService: decode, call the verb, encode."""

import asyncio
import re

import structlog

from authsvc.errors import AuthError, Reason
from authsvc.model import User, UserState
from authsvc.rpc import status
from authsvc.rpc.convert import timestamp, version_of
from authsvc.rpc.limits import Shape, field_invalid
from authsvc.rpc.paging import PAGE_SIZE_DEFAULT, Pages
from authsvc.rpc.pipeline import Call
from authsvc.store.port import UserFilter
from authsvc.users import NewUser, UserPasswords, Users
from authsvc_client.v1 import auth_pb2, error_reason_pb2, users_pb2

CODE_LIFETIME_S = 3600
IMPORT_S_MAX = 20.0
"""No row of an import is begun later: all are answered before the call takes too long."""

log = structlog.get_logger()

_request_id = re.compile(r"[A-Za-z0-9_-]{8,64}").fullmatch


class UserServicer:
    """Users and their passwords."""

    def __init__(self, users: Users, passwords: UserPasswords, pages: Pages) -> None:
        self._users = users
        self._passwords = passwords
        self._pages = pages
        self._row = Shape(users_pb2.ImportUsersRow.DESCRIPTOR)

    async def CreateUser(
        self, request: users_pb2.CreateUserRequest, call: Call
    ) -> users_pb2.CreateUserResponse:
        """Creates one, or answers the one of the same request."""
        if request.request_id and not _request_id(request.request_id):
            raise field_invalid("request_id", "is not 8 to 64 characters of A-Z a-z 0-9 _ -")
        asked = _new_user(request.user, request.password)
        user = await self._users.create(asked, call.caller, request.request_id)
        return users_pb2.CreateUserResponse(user=user_pb(user))

    async def GetUser(
        self, request: users_pb2.GetUserRequest, _call: Call
    ) -> users_pb2.GetUserResponse:
        """One user."""
        return users_pb2.GetUserResponse(user=user_pb(await self._users.get(request.user_id)))

    async def ListUsers(
        self, request: users_pb2.ListUsersRequest, _call: Call
    ) -> users_pb2.ListUsersResponse:
        """A page of users."""
        state = UserState(request.state) if request.state else None
        wanted = UserFilter(request.username, request.email, state)
        what, size = f"users:{wanted}", request.page_size or PAGE_SIZE_DEFAULT
        after = self._pages.after(request.page_token, what)
        found = await self._users.page(wanted, after, size + 1)
        return users_pb2.ListUsersResponse(
            users=[user_pb(user) for user in found[:size]],
            next_page_token=self._pages.next([user.user_id for user in found], size, what),
        )

    async def UpdateUser(
        self, request: users_pb2.UpdateUserRequest, _call: Call
    ) -> users_pb2.UpdateUserResponse:
        """Changes the fields of the mask."""
        if not request.user.user_id:
            raise field_invalid("user.user_id", "is required")
        user, revision = await self._users.update(
            request.user.user_id,
            _new_user(request.user),
            frozenset(request.update_mask.paths),
            version_of(request.user.etag),
        )
        return users_pb2.UpdateUserResponse(user=user_pb(user), revision=revision)

    async def DisableUser(
        self, request: users_pb2.DisableUserRequest, _call: Call
    ) -> users_pb2.DisableUserResponse:
        """ACTIVE to DISABLED; cuts its tokens off."""
        user, revision = await self._users.disable(request.user_id, version_of(request.etag))
        return users_pb2.DisableUserResponse(user=user_pb(user), revision=revision)

    async def EnableUser(
        self, request: users_pb2.EnableUserRequest, _call: Call
    ) -> users_pb2.EnableUserResponse:
        """DISABLED to ACTIVE; revives nothing."""
        user, revision = await self._users.enable(request.user_id, version_of(request.etag))
        return users_pb2.EnableUserResponse(user=user_pb(user), revision=revision)

    async def DeleteUser(
        self, request: users_pb2.DeleteUserRequest, _call: Call
    ) -> users_pb2.DeleteUserResponse:
        """With all that it has."""
        revision = await self._users.delete(request.user_id, version_of(request.etag))
        return users_pb2.DeleteUserResponse(revision=revision)

    async def SetPassword(
        self, request: users_pb2.SetPasswordRequest, call: Call
    ) -> users_pb2.SetPasswordResponse:
        """By an administrator, or by the user itself."""
        revision = await self._passwords.set(
            request.user_id,
            request.current_password,
            request.new_password,
            await call.find_caller(),
            call.peer,
            call.address,
            keep_session=request.keep_session,
        )
        return users_pb2.SetPasswordResponse(revision=revision)

    async def CreatePasswordResetCode(
        self, request: users_pb2.CreatePasswordResetCodeRequest, _call: Call
    ) -> users_pb2.CreatePasswordResetCodeResponse:
        """A code, shown this once."""
        lifetime = request.lifetime.seconds if request.HasField("lifetime") else CODE_LIFETIME_S
        code, expires = await self._passwords.create_reset_code(request.user_id, lifetime)
        return users_pb2.CreatePasswordResetCodeResponse(code=code, expire_time=timestamp(expires))

    async def ResetPassword(
        self, request: users_pb2.ResetPasswordRequest, call: Call
    ) -> users_pb2.ResetPasswordResponse:
        """By a code."""
        revision = await self._passwords.reset(
            request.code, request.new_password, call.peer, call.address
        )
        return users_pb2.ResetPasswordResponse(revision=revision)

    async def ImportUsers(
        self, request: users_pb2.ImportUsersRequest, _call: Call
    ) -> users_pb2.ImportUsersResponse:
        """Row by row: so an import takes one thread of those for passwords, and leaves the rest."""
        if not request.rows:
            raise field_invalid("rows", "is required")
        begun = asyncio.get_running_loop().time()
        results = [await self._import(row, begun) for row in request.rows]
        return users_pb2.ImportUsersResponse(results=results)

    async def _import(
        self, row: users_pb2.ImportUsersRow, begun: float
    ) -> users_pb2.ImportUsersResult:
        try:
            if asyncio.get_running_loop().time() > begun + IMPORT_S_MAX:
                limit = {"limit_seconds": f"{IMPORT_S_MAX:g}"}
                raise AuthError(Reason.DEADLINE_EXCEEDED, metadata=limit)
            self._row.check(row)
            asked = NewUser(row.username, row.display_name, row.email, row.password)
            found = await self._users.import_row(asked)
        except Exception as error:
            return users_pb2.ImportUsersResult(error=_item_error(error))
        return users_pb2.ImportUsersResult(user=user_pb(found.user), created=found.created)


def _new_user(user: users_pb2.User, password: str = "") -> NewUser:
    return NewUser(user.username, user.display_name, user.email, password)


def user_pb(user: User) -> users_pb2.User:
    """A user."""
    return users_pb2.User(
        user_id=user.user_id,
        username=user.username,
        display_name=user.display_name,
        email=user.email,
        state=users_pb2.UserState.ValueType(user.state),
        password_set_time=timestamp(user.password_set_time),
        etag=str(user.version),
        create_time=timestamp(user.create_time),
        update_time=timestamp(user.update_time),
    )


def _item_error(error: Exception) -> auth_pb2.ItemError:
    told, incident = status.public(error)
    if incident:
        log.error("rpc.incident", incident=incident, exc_info=error)
    return auth_pb2.ItemError(
        code=told.rule.code.value,
        reason=error_reason_pb2.ErrorReason.ValueType(told.reason),
        message=status.text(told),
    )
