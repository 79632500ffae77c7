"""Grants: each file proves one kind of identity and nothing else."""

from collections.abc import Mapping
from typing import Protocol

from authsvc.grants.client_credentials import client_credentials
from authsvc.model import Client, GrantType


class Grant(Protocol):
    """Proves an identity for an authenticated client; raises AuthError INVALID_GRANT."""

    async def __call__(self, client: Client) -> str:
        """The subject of the token."""


GRANTS: Mapping[GrantType, Grant] = {GrantType.CLIENT_CREDENTIALS: client_credentials}
"""What this version can do; the rest of GrantType is NOT_IMPLEMENTED."""
