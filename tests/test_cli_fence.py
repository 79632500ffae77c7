"""`authsvc fence` on a server that runs, and where nobody is asked."""

import time
from pathlib import Path
from urllib.request import urlopen

from authsvc.cli.output import Exit
from tests.test_cli import ANY_PORTS, START_S, Running, Shell, _admit, serving


def _revision(server: Running) -> float:
    """The revision that a server has applied, by its metrics."""
    with urlopen(server.ready()["metrics_url"], timeout=START_S) as answer:
        lines = answer.read().decode().splitlines()
    return max(
        float(line.split()[-1]) for line in lines if line.startswith("authsvc_feed_revision")
    )


def test_fence_kills_what_was_issued_and_says_so_first(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    refused = shell("fence", "--yes", code=Exit.USAGE)
    assert "authsvc migrate" in refused
    assert not (shell.state_dir / "authsvc.db").exists()
    with serving(shell, *ANY_PORTS) as running:
        shell.address = running.ready()["address"]
        orders = _admit(shell, "orders", "validate")
        token = shell("token", "issue", "--quiet", "--as", "orders", "--client-id", orders)
        presenter = ("--presenter-cert", str(shell.state_dir / "pki/orders.pem"))
        assert shell.json("token", "validate", *presenter, stdin=token)["active"]
        dry = shell.json("fence", "--dry-run")
        assert dry["revision"] == 0
        assert dry["impact"] == {"sessions": 0, "grants": 0, "api_keys": 0}
        assert dry["database"].endswith("/authsvc.db")
        for asked in ([], ["--json"]):
            assert "--yes" in shell("fence", *asked, code=Exit.USAGE)
        assert shell.json("fence", "--dry-run") == dry
        done = shell.json("fence", "--yes", "--comment", "restored")
        assert done == dry | {"revision": done["revision"]}
        assert dry["head"] < done["revision"] < 2**53
        deadline = time.monotonic() + START_S
        while _revision(running) < done["revision"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        verdict = shell.json("token", "validate", *presenter, stdin=token, code=Exit.NOT_ACTIVE)
        assert verdict["reason"] == "ERROR_REASON_TOKEN_CUT_OFF"
        (event,) = shell.json("audit", "list", "--action", "Fence")["audit_events"]
        assert (event["comment"], event["actor"]) == ("restored", "authsvc")
