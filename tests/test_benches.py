"""That the benches run and say what they should; how fast they find it is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benches.stage import Budget
from benches.suite import BENCHES, BUDGETS

ROOT = Path(__file__).parent.parent


@pytest.mark.timeout(400)
@pytest.mark.parametrize("names", [list(BENCHES)[part::4] for part in range(4)])
def test_each_bench_prints_one_line_and_leaves_nothing(names: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benches", "--quick", *names],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        timeout=360,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["bench"] for line in lines] == names
    for line in lines:
        figures = ["value", "floor", "ratio"]
        if line["unit"] == "requests/s":
            figures.append("cpu_us")
        assert {type(line[name]) for name in figures} <= {int, float}
        assert all(line[name] > 0 for name in figures)
        assert line["unit"]
        assert line["budget"] == str(BUDGETS[line["bench"]])
        assert type(line["ok"]) is bool
        assert type(line["pinned"]) is bool
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_is_refused_with_those_that_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benches", "nothing"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2
    assert all(name in done.stderr for name in ("nothing", *BENCHES))
    assert done.stdout == ""


def test_each_bench_has_a_budget() -> None:
    assert BUDGETS.keys() == BENCHES.keys()


@pytest.mark.parametrize(
    ("budget", "ratio", "holds"),
    [
        (Budget(least=0.90), 0.90, True),
        (Budget(least=0.90), 0.8999, False),
        (Budget(most=1.5), 1.5, True),
        (Budget(most=1.5), 1.5001, False),
        (Budget(least=0.97, most=1.03), 1.0, True),
        (Budget(least=0.97, most=1.03), 1.04, False),
        (Budget(least=0.97, most=1.03), 0.96, False),
        (Budget(), 0.0, True),
    ],
)
def test_a_budget_is_judged_unrounded(budget: Budget, ratio: float, holds: bool) -> None:
    assert budget.holds(ratio) is holds
