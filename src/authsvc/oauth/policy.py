"""What a client may do, by its state and registration."""

from authsvc.errors import AuthError, Reason
from authsvc.model import Catalog, Client, ClientState, GrantType

_STATES = {
    ClientState.PENDING: Reason.CLIENT_PENDING,
    ClientState.REJECTED: Reason.CLIENT_REJECTED,
    ClientState.EXPIRED: Reason.CLIENT_EXPIRED,
    ClientState.SUSPENDED: Reason.CLIENT_SUSPENDED,
}
NOT_LET_IN = frozenset(_STATES.values())


def require_let_in(client: Client, now: float) -> None:
    """Raises AuthError CLIENT_PENDING, _REJECTED, _EXPIRED or _SUSPENDED."""
    if client.state is not ClientState.APPROVED:
        raise AuthError(_STATES[client.state])
    if client.approval_expire_time is not None and client.approval_expire_time <= now:
        raise AuthError(Reason.CLIENT_EXPIRED)


def require_grant(client: Client, grant: GrantType) -> None:
    """Raises AuthError GRANT_TYPE_NOT_ALLOWED unless the client registered for the grant."""
    if grant not in client.metadata.grant_types:
        raise AuthError(Reason.GRANT_TYPE_NOT_ALLOWED, metadata={"grant_type": grant.name})


def validated_by(client: Client, catalog: Catalog) -> frozenset[str]:
    """Whose tokens a client may validate: those named to it, and of the resources that it owns."""
    return client.metadata.validates | catalog.owned_by(client.client_id)
