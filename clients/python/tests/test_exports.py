"""The public surface: adding to it is a decision, taking from it breaks somebody."""

import inspect
import subprocess
import sys

import pytest

import authsvc_client
from authsvc_client import Reason, Verdict
from authsvc_client.core import judge

EXPORTS = """
CLOSED REMOTE AuthsvcClient AuthsvcError Caller Certificates Claims Conflict Counts DeadlineExceeded
Internal InvalidRequest KeySet LocalValidator NotFound NotImplementedByServer Pace PermissionDenied
Reason ReloadingChannel RemoteVerdict RequireInterceptor ResourceExhausted RuleRefused Step
SyncAuthsvcClient SyncLocalValidator SyncRequireInterceptor SyncTokenSource SyncValidator Token
TokenPlan TokenSource TokenUnavailable Unauthenticated Unavailable Validator Verdict Violation
WhenStale bearer caller channel open_for request_id sync_bearer sync_channel
"""


def test_exports_are_these() -> None:
    assert authsvc_client.__all__ == EXPORTS.split()


@pytest.mark.parametrize("name", authsvc_client.__all__)
def test_every_export_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(authsvc_client, name))


def test_import_needs_the_declared_dependencies_only() -> None:
    """The server is not one of them."""
    program = (
        "import sys, authsvc_client, authsvc_client.core.judge\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"authsvc", "sqlmodel", "starlette", "redis"} & set(done.stdout.split())


def test_verdict_of_the_core_is_one_that_a_validator_may_answer() -> None:
    """Checked by mypy: local validation takes the place of the remote one without a change."""
    verdict: Verdict = judge.Verdict(Reason.TOKEN_REVOKED, 1, 0.0, 0.0)
    assert (verdict.active, verdict.reason) == (False, Reason.TOKEN_REVOKED)
