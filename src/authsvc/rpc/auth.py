"""AuthService: decode, call the verb, encode."""

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial

import structlog
from google.protobuf.duration_pb2 import Duration

from authsvc.authenticate import Authenticate, Credentials
from authsvc.errors import AuthError, Reason
from authsvc.feed.watch import WatchChanges
from authsvc.issue import IssueToken, TokenRequest
from authsvc.keys.secrets import new_id
from authsvc.mint import Again
from authsvc.model import SCOPE_ADMIN, Caller, GrantType
from authsvc.oauth.policy import NOT_LET_IN
from authsvc.refresh import RefreshRequest, RefreshToken
from authsvc.register import RegisterClient
from authsvc.revoke import Revocation, RevokeToken
from authsvc.rpc import convert, registered
from authsvc.rpc.answers import Batch, Judged, Questions
from authsvc.rpc.limits import field_invalid
from authsvc.rpc.pipeline import REQUEST_ID_KEY, Call, Read, name_of
from authsvc.rpc.policy import Grounds
from authsvc.rpc.repeats import Context
from authsvc.telemetry import Metrics, log_about
from authsvc.validate import ValidateToken
from authsvc_client.core.state import State
from authsvc_client.v1 import auth_pb2

log = structlog.get_logger()

_request_id = re.compile(r"[A-Za-z0-9_-]{8,64}").fullmatch


class AuthServicer:
    """The hot path. RPCs that are not here answer UNIMPLEMENTED."""

    def __init__(
        self,
        *,
        issue: IssueToken,
        refresh: RefreshToken,
        validate: ValidateToken,
        revoke: RevokeToken,
        register: RegisterClient,
        watch: WatchChanges,
        authenticate: Authenticate,
        state: State,
        metrics: Metrics,
        client_pb: registered.ClientEncoder,
        keys_max_age_s: int,
    ) -> None:
        self._issue = issue
        self._refresh = refresh
        self._revoke = revoke
        self._register = register
        self._watch = watch
        self._authenticate = authenticate
        self._state = state
        self._client_pb = client_pb
        self._keys_max_age_s = keys_max_age_s
        self._judged = Judged(validate, state, metrics)
        self._batch = Batch(self._judged)
        questions = Questions()
        self.repeated = frozenset({"ValidateToken", "IssueToken"})
        self.readers: Mapping[str, Read] = {
            "ValidateToken": questions.one,
            "BatchValidateTokens": questions.many,
        }

    async def IssueToken(
        self, request: auth_pb2.IssueTokenRequest, call: Call
    ) -> auth_pb2.IssueTokenResponse:
        """Codes, and DPoP, are not built yet."""
        grant = request.WhichOneof("grant")
        if grant is None:
            raise AuthError(Reason.GRANT_MISSING)
        convert.require_absent(request, "dpop_proof")
        asked = TokenRequest(
            GrantType[grant.upper()],
            _credentials(request.client_id, request.client_credential, call),
            tuple(request.scopes),
            tuple(request.resources),
            convert.exchange(request.token_exchange) if grant == "token_exchange" else None,
            convert.password(request.password) if grant == "password" else None,
            call.address,
        )
        answer = await self._issue(asked, call.peer)
        _log_issued(request.client_id, answer.jti, answer.audiences, grant)
        response = auth_pb2.IssueTokenResponse(token=convert.issued_pb(answer))
        if (again := answer.again) is not None:
            call.grounds = Grounds.of(again.client, call.peer, again.catalog)
            call.repeat = _Reissue(again, call, answer.audiences, grant, response)
        return response

    async def RefreshToken(
        self, request: auth_pb2.RefreshTokenRequest, call: Call
    ) -> auth_pb2.RefreshTokenResponse:
        """DPoP is not built yet."""
        convert.require_absent(request, "dpop_proof")
        asked = RefreshRequest(
            request.refresh_token,
            _credentials(request.client_id, request.client_credential, call),
            tuple(request.scopes),
            tuple(request.resources),
        )
        answer = await self._refresh(asked, call.peer)
        log.info("token.refreshed", client=request.client_id, jti=answer.jti)
        return auth_pb2.RefreshTokenResponse(token=convert.issued_pb(answer))

    async def ValidateToken(self, asked: convert.Asked, call: Call) -> bytes:
        """Warm: no database, no signature check."""
        return await self._judged(asked, call)

    async def BatchValidateTokens(
        self, questions: Sequence[convert.Asked | AuthError], call: Call
    ) -> bytes:
        """Answers in order; what is wrong with one item fails it alone."""
        return await self._batch(questions, call)

    async def RevokeToken(
        self, request: auth_pb2.RevokeTokenRequest, call: Call
    ) -> auth_pb2.RevokeTokenResponse:
        """By the token, its client; by `jti`, administrators."""
        target = request.WhichOneof("target")
        if target is None:
            raise field_invalid("target", "is required: token or jti")
        dry = request.validate_only
        if target == "jti":
            if not request.jti:
                raise field_invalid("jti", "is required")
            if request.client_id or request.HasField("client_credential"):
                raise field_invalid("client_id", "goes with a token, not with a jti")
            await call.require_caller(SCOPE_ADMIN)
            return _revoked(await self._revoke.by_jti(request.jti, dry=dry))
        client_id = await self._revoking_client(request, call)
        return _revoked(await self._revoke.by_token(request.token, client_id, dry=dry))

    async def _revoking_client(self, request: auth_pb2.RevokeTokenRequest, call: Call) -> str:
        """The client that asks: by its credential, or the one that its certificate names.

        One that is not let in may still revoke what it holds, if it names itself and proves it
        (RFC 7009 section 2.1).
        """
        if request.client_id:
            offered = _credentials(request.client_id, request.client_credential, call)
            return (await self._authenticate(offered, call.peer)).client.client_id
        if request.HasField("client_credential"):
            raise field_invalid("client_id", "is required with client_credential")
        caller = await call.require_caller()
        return caller.client_id

    async def RegisterClient(
        self, request: auth_pb2.RegisterClientRequest, call: Call
    ) -> auth_pb2.RegisterClientResponse:
        """Registers a client."""
        if request.request_id and not _request_id(request.request_id):
            raise field_invalid("request_id", "is not 8 to 64 characters of A-Z a-z 0-9 _ -")
        bears = bool(request.initial_access_token)
        found = await self._register(
            registered.registration(request.metadata),
            None if bears else await _registrant(call),
            call.peer,
            call.now,
            dry=request.validate_only,
            request_id=request.request_id,
            initial_access_token=request.initial_access_token,
        )
        return auth_pb2.RegisterClientResponse(
            client=self._client_pb(found.client),
            client_secret=found.secret,
            registration_access_token=found.registration_token,
        )

    def WatchChanges(
        self, request: auth_pb2.WatchChangesRequest, _call: Call
    ) -> AsyncGenerator[bytes, None]:
        """Snapshot, deltas, heartbeats."""
        return self._watch(request.resume_revision)

    async def GetKeys(
        self, _request: auth_pb2.GetKeysRequest, _call: Call
    ) -> auth_pb2.GetKeysResponse:
        """The JWK set."""
        jwks = [verifier.jwk for verifier in self._state.keys.by_kid.values()]
        return auth_pb2.GetKeysResponse(
            keys=[auth_pb2.Jwk(**jwk) for jwk in jwks],
            max_age=Duration(seconds=self._keys_max_age_s),
        )


async def _registrant(call: Call) -> Caller | None:
    """The caller; None for a peer that is no client, and for one that is not let in."""
    try:
        return await call.find_caller()
    except AuthError as error:
        if error.reason in NOT_LET_IN:
            return None
        raise


class _Reissue:
    """Issues a token once more, for the same request."""

    __slots__ = ("_about", "_audiences", "_client_id", "_grant", "_issue", "_response")

    def __init__(
        self,
        again: Again,
        call: Call,
        audiences: tuple[str, ...],
        grant: str,
        response: auth_pb2.IssueTokenResponse,
    ) -> None:
        self._issue = again.issue
        self._client_id = again.client.client_id
        self._about = {"method": call.method, "peer": name_of(call.peer)}
        self._audiences = audiences
        self._grant = grant
        self._response = response

    def __call__(self, _boot: float, context: Context, request_id: str) -> bytes:
        answer = self._issue()
        log_about(partial(self._line, context, request_id))
        _log_issued(self._client_id, answer.jti, self._audiences, self._grant)
        convert.reissue(self._response.token, answer)
        return self._response.SerializeToString()

    def _line(self, context: Context, request_id: str) -> dict[str, str]:
        """As Call.line: an id that is made because somebody logs is told to the caller."""
        if not request_id:
            request_id = new_id()
            context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        return {**self._about, "request_id": request_id}


def _log_issued(client_id: str, jti: str, audiences: tuple[str, ...], grant: str) -> None:
    log.info("token.issued", client=client_id, jti=jti, audiences=audiences, grant=grant)


def _credentials(client_id: str, credential: auth_pb2.ClientCredential, call: Call) -> Credentials:
    return Credentials(
        client_id,
        secret=credential.client_secret,
        assertion=credential.client_assertion,
        authorization=call.authorization,
    )


def _revoked(done: Revocation) -> auth_pb2.RevokeTokenResponse:
    return auth_pb2.RevokeTokenResponse(
        revision=done.revision,
        revoked=[
            auth_pb2.RevokedObject(kind=auth_pb2.MarkerKind.ValueType(dead.kind), id=dead.ids[0])
            for dead in done.killed
        ],
    )
