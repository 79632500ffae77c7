"""client_credentials (RFC 6749 section 4.4): the client is its own subject."""

from authsvc.model import Client


async def client_credentials(client: Client) -> str:
    """The subject: the client's id."""
    return client.client_id
