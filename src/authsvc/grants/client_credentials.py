"""client_credentials (RFC 6749 section 4.4): the client is its own subject."""

from authsvc.grants.proof import Presented, Proof
from authsvc.model import Origin


async def client_credentials(presented: Presented) -> Proof:
    """The client itself."""
    return Proof(Origin(presented.client.client_id))
