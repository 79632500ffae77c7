"""password (RFC 6749 section 4.3): a person, by what it told a first party."""

from authsvc.errors import AuthError, Reason
from authsvc.grants.proof import Presented, Proof
from authsvc.model import OWN_SCOPES, Origin

ACR = "urn:authsvc:acr:1fa"
"""One factor was shown."""
AMR = ("pwd",)
"""RFC 8176 section 2."""


async def password(presented: Presented) -> Proof:
    """The user, if the client is a first party; never with a scope of authsvc itself."""
    if not presented.client.metadata.first_party:
        raise AuthError(
            Reason.GRANT_TYPE_NOT_ALLOWED,
            "the client is not a first party",
            metadata={"grant_type": "PASSWORD"},
        )
    assert presented.check_password is not None
    checked = await presented.check_password()
    origin = Origin(
        subject=checked.user.user_id,
        auth_time=int(presented.now),
        acr=ACR,
        amr=AMR,
    )
    scopes = presented.client.metadata.scopes - frozenset(OWN_SCOPES)
    return Proof(origin, scopes, password_version=checked.password_version)
