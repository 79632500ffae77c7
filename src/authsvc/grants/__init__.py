"""Grants: each file proves one kind of identity and nothing else."""

from collections.abc import Mapping
from typing import Protocol

from authsvc.grants.client_credentials import client_credentials
from authsvc.grants.password import password
from authsvc.grants.proof import Presented, Proof
from authsvc.grants.token_exchange import token_exchange
from authsvc.model import GrantType


class Grant(Protocol):
    """Proves an identity for an authenticated client; raises AuthError INVALID_GRANT."""

    async def __call__(self, presented: Presented) -> Proof:
        """Whom the token speaks for, and what bounds it."""


GRANTS: Mapping[GrantType, Grant] = {
    GrantType.CLIENT_CREDENTIALS: client_credentials,
    GrantType.TOKEN_EXCHANGE: token_exchange,
    GrantType.PASSWORD: password,
}
"""What IssueToken can do in this version; the rest of GrantType is NOT_IMPLEMENTED."""
