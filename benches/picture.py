"""`python -m benches ways | python -m benches.picture`: docs/ways.svg, and its figures with it."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent.parent / "docs" / "ways.json"
PICTURE = FIGURES.with_suffix(".svg")

WAYS = {
    "remote": ("Remote", "a call of authsvc, over mTLS"),
    "batch": ("Batch", "100 at once, in one call"),
    "agent": ("Agent", "on the same machine, by a Unix socket"),
    "local": ("Local", "in the caller's own process"),
}
WIDTH, TOP, ROW, BOTTOM = 880, 104, 58, 62
HEIGHT = TOP + ROW * len(WAYS) + BOTTOM
LEAST_US, MOST_US = 1.0, 1e5
PANELS = {"latency": (278, 250), "cpu": (590, 250)}
"""Left edge and width of each."""

STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de }
  text { fill: #1f2328; font: 13px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }
  .value { stroke: #ffffff; stroke-width: 4; paint-order: stroke; stroke-linejoin: round }
  .title { font-size: 17px; font-weight: 600 }
  .name { font-weight: 600; font-size: 14px }
  .small { font-size: 11.5px; fill: #59636e }
  .grid { stroke: #e4e8ec }
  .span { stroke: #0969da; stroke-opacity: .35; stroke-width: 6; stroke-linecap: round }
  .dot { fill: #0969da }
  .cpu { fill: #bc4c00 }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #3d444d }
    text { fill: #e6edf3 }
    .small { fill: #9198a1 }
    .value { stroke: #0d1117 }
    .grid { stroke: #262c34 }
    .span { stroke: #4493f8 }
    .dot { fill: #4493f8 }
    .cpu { fill: #f0883e }
  }
"""


def main() -> None:
    """From the line of the bench `ways` on standard input."""
    [line] = [each for each in map(json.loads, sys.stdin) if each["bench"] == "ways"]
    FIGURES.write_text(json.dumps({**line, "measured": _here()}, indent=2) + "\n")
    PICTURE.write_text(draw(json.loads(FIGURES.read_text())))


def _here() -> dict[str, str]:
    """Where and when."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
    }


def draw(line: Mapping[str, Any]) -> str:
    """The picture, as SVG."""
    where = line["measured"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<title>{escape(_told(line['ways']))}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
        _text(24, 34, "What it costs to have a token judged", "title"),
        _text(PANELS["latency"][0], 70, "Latency of a call", "name"),
        _text(PANELS["latency"][0], 87, "median, and up to the slowest of a hundred", "small"),
        _text(PANELS["cpu"][0], 70, "CPU time of a token", "name"),
        _text(PANELS["cpu"][0], 87, "of the caller and of whom it asks", "small"),
    ]
    bottom = TOP + ROW * len(WAYS)
    for left, width in PANELS.values():
        for power in range(6):
            x = left + width * power / 5
            parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
            parts.append(_text(x, bottom + 18, _time(10.0**power), "small", "middle"))
    for row, (way, (name, how)) in enumerate(WAYS.items()):
        parts += _row(TOP + ROW * row + ROW / 2, name, how, line["ways"][way])
    told = (
        f"Logarithmic. One run, one token, one call at a time; {where['processors']} "
        f"processors, Python {where['python']}, {where['date']}. Made by make picture."
    )
    parts += [_text(24, HEIGHT - 16, told, "small"), "</svg>"]
    return "\n".join(parts) + "\n"


def _row(y: float, name: str, how: str, figures: Mapping[str, float]) -> list[str]:
    p50, p99 = (_x("latency", figures[each]) for each in ("p50_us", "p99_us"))
    cpu = _x("cpu", figures["cpu_us"])
    return [
        _text(24, y - 2, name, "name"),
        _text(24, y + 15, how, "small"),
        f'<path class="span" d="M{p50:.1f} {y}H{p99:.1f}"/>',
        f'<circle class="dot" cx="{p50:.1f}" cy="{y}" r="6"/>',
        _text(p50, y - 12, _time(figures["p50_us"]), "value", "middle"),
        _text(p99 + 10, y + 4, _time(figures["p99_us"]), "value small"),
        f'<rect class="cpu" x="{cpu - 5.5:.1f}" y="{y - 5.5}" width="11" height="11" rx="2"/>',
        _text(cpu, y - 12, _time(figures["cpu_us"]), "value", "middle"),
    ]


def _x(panel: str, us: float) -> float:
    left, width = PANELS[panel]
    share = math.log(us / LEAST_US) / math.log(MOST_US / LEAST_US)
    return left + width * min(max(share, 0.0), 1.0)


def _time(us: float) -> str:
    """Two digits are all that the next run would find again."""
    value, unit = (us / 1000, "ms") if us >= 1000 else (us, "\N{MICRO SIGN}s")
    digits = 1 if value < 10 and value != int(value) else 0
    return f"{value:.{digits}f} {unit}"


def _told(ways: Mapping[str, Mapping[str, float]]) -> str:
    """The picture in words."""
    return "; ".join(
        f"{name}: {_time(ways[way]['p50_us'])} a call, {_time(ways[way]['cpu_us'])} of CPU a token"
        for way, (name, _) in WAYS.items()
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


if __name__ == "__main__":
    main()
