"""`python -m benches [--quick] [names…]`: one JSON line a bench on standard output."""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .processes import Cores, authsvc, pin
from .scene import scene
from .stage import FULL, QUICK, Size, Stage
from .suite import BENCHES, measure


def main() -> None:
    """Ends with 0 even where a budget is missed: `ok` says it."""
    parser = argparse.ArgumentParser(prog="benches", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=" ".join(BENCHES))
    parser.add_argument("--quick", action="store_true", help="few rounds: does it work at all?")
    given = parser.parse_args()
    unknown = set(given.names) - BENCHES.keys()
    if unknown:
        parser.error(f"no bench: {' '.join(sorted(unknown))}; there are: {' '.join(BENCHES)}")
    asyncio.run(run(given.names or list(BENCHES), QUICK if given.quick else FULL))


async def run(names: Sequence[str], size: Size) -> None:
    """Starts authsvc once, and the benches one after another."""
    cores = Cores.here()
    with tempfile.TemporaryDirectory(prefix="authsvc-bench-") as directory:
        state_dir = Path(directory)
        tell("authsvc starts")
        with authsvc(state_dir, cores.servers) as server:
            pin(cores.load)
            async with scene(state_dir, server.port) as made:
                for name in names:
                    started = time.perf_counter()
                    line = await measure(name, Stage(made, server, cores, size))
                    print(json.dumps(line), flush=True)
                    tell(f"{name}: {time.perf_counter() - started:.0f} s")


def tell(text: str) -> None:
    """Progress, beside the lines."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
