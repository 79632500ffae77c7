"""Token exchange (RFC 8693): a client acts for the subject of a token that was sent to it."""

from authsvc.errors import AuthError, FieldViolation, Reason
from authsvc.grants.proof import Exchange, Presented, Proof
from authsvc.model import ANY_AUDIENCE, Origin
from authsvc_client.core.claims import ACTORS_MAX, Claims
from authsvc_client.core.judge import Verified

ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - no password
REFRESH_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:refresh_token"  # noqa: S105


async def token_exchange(presented: Presented) -> Proof:
    """The subject of the subject token, with the client as the one who acts.

    What is made of it has no scope that the subject token lacks, and does not outlive it.
    """
    exchange = presented.exchange
    assert exchange is not None
    _require_types(exchange)
    verified = await _alive(presented, exchange.subject_token)
    subject = verified.claims
    if subject.client_id == presented.client.client_id:
        _require_proof(presented, subject)
    elif not _is_audience(presented, subject):
        raise _refusal("the subject token is for another audience")
    actor = presented.client.client_id
    expires, key_ids = subject.expires, _key_ids(verified)
    if exchange.actor_token:
        other = await _alive(presented, exchange.actor_token)
        acting = other.claims
        if acting.client_id != presented.client.client_id or acting.actors:
            raise _refusal("the actor token is not the client's own")
        _require_proof(presented, acting)
        actor, expires = acting.subject, min(expires, acting.expires)
        key_ids = tuple(dict.fromkeys((*key_ids, *_key_ids(other))))
    if actor != subject.subject and subject.may_act not in ("", actor):
        raise _refusal("may_act names another actor")
    origin = Origin(
        subject=subject.subject,
        actors=_actors(subject, actor),
        grant_id=subject.grant_id,
        session_id=subject.session_id,
        root_jti=subject.root_jti or subject.jti,
        key_ids=key_ids,
        auth_time=subject.auth_time,
        acr=subject.acr,
        amr=subject.amr,
    )
    return Proof(origin, subject.scopes, expires)


def _require_types(exchange: Exchange) -> None:
    """RFC 8693 section 2.1: required, or required to be absent."""
    actor_types = (ACCESS_TOKEN_TYPE,) if exchange.actor_token else ("",)
    known = {
        "subject_token_type": (ACCESS_TOKEN_TYPE,),
        "actor_token_type": actor_types,
        "requested_token_type": ("", ACCESS_TOKEN_TYPE, REFRESH_TOKEN_TYPE),
    }
    for name, types in known.items():
        if getattr(exchange, name) not in types:
            text = "is no type that can be taken here"
            place = f"token_exchange.{name}"
            violation = FieldViolation(place, text)
            raise AuthError(Reason.FIELD_INVALID, f"{place} {text}", violations=(violation,))


async def _alive(presented: Presented, token: str) -> Verified:
    verified = await presented.alive(token)
    if verified is None:
        raise _refusal("the token is not active")
    return verified


def _require_proof(presented: Presented, claims: Claims) -> None:
    """A bound token of the client's own comes over the connection that it is bound to."""
    bound = claims.certificate_thumbprint
    if claims.jwk_thumbprint or (bound and bound != presented.thumbprint):
        raise _refusal("the token is bound to another key")


def _is_audience(presented: Presented, claims: Claims) -> bool:
    """Whether the token was sent to the client: the bearer of another's token is no audience."""
    if ANY_AUDIENCE in presented.audiences:
        return True
    return not presented.audiences.isdisjoint(claims.audiences)


def _actors(subject: Claims, actor: str) -> tuple[str, ...]:
    """The chain, outermost first: the actor, the client that had the token, who acted before."""
    chain = subject.actors
    for party in (subject.client_id, actor):
        if (chain or party != subject.subject) and party not in chain[:1]:
            chain = (party, *chain)
    if len(chain) > ACTORS_MAX:
        raise _refusal("too many actors")
    return chain


def _key_ids(verified: Verified) -> tuple[str, ...]:
    own = (verified.kid,) if verified.kid else ()
    return tuple(dict.fromkeys((*own, *verified.claims.key_ids)))


def _refusal(cause: str) -> AuthError:
    return AuthError(Reason.INVALID_GRANT, cause=cause)
