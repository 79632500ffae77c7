"""Fixtures: certificates once, servers for each test."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, settings

from authsvc_client import Certificates

from .support import Authsvc, Pki, running_authsvc

# A machine that is busy is no failure; `timeout` is what ends a test.
settings.register_profile("authsvc", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("authsvc")


@pytest.fixture(scope="session")
def pki() -> Pki:
    return Pki()


@pytest.fixture(scope="session")
def server_certificates(pki: Pki) -> Certificates:
    return pki.issue("server")


@pytest.fixture(scope="session")
def client_certificates(pki: Pki) -> Certificates:
    return pki.issue("orders")


@pytest.fixture
async def authsvc(
    server_certificates: Certificates, client_certificates: Certificates
) -> AsyncIterator[Authsvc]:
    async with running_authsvc(server_certificates, client_certificates) as running:
        yield running
