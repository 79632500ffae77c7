"""Looks at all that a server would use, without one: `authsvc doctor`."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from authsvc.clock import Clock
from authsvc.config import Settings
from authsvc.doctor import certificates, database, files, ports, redis
from authsvc.doctor import settings as chosen
from authsvc.doctor.finding import Finding, Outcome, Report
from authsvc.doctor.threads import in_thread

__all__ = ["Finding", "Outcome", "Report", "examine"]

TARGETS = ("settings", "files", "tls", "listen", "database", "redis")
BUDGET_S = 5.0
"""What each target has for all its checks."""


async def examine(settings: Settings, clock: Clock, *, budget_s: float = BUDGET_S) -> list[Finding]:
    """Findings of all targets, which are looked at side by side. Changes nothing, never raises."""
    reports = {name: Report(name) for name in TARGETS}
    looks = {
        "settings": in_thread(chosen.look, settings, reports["settings"]),
        "files": in_thread(files.look, settings, reports["files"]),
        "tls": in_thread(certificates.look, settings, reports["tls"], clock.wall()),
        "listen": in_thread(ports.look, settings, reports["listen"]),
        "database": database.look(settings, reports["database"], clock),
        "redis": redis.look(settings.redis, reports["redis"], clock),
    }
    await asyncio.gather(*(_within(budget_s, looks[name], reports[name]) for name in looks))
    return [finding for report in reports.values() for finding in report.findings[:]]


async def _within(budget_s: float, look: Coroutine[Any, Any, None], report: Report) -> None:
    advice = "what comes before it hangs: a database, a name server or a network filesystem?"
    with report.running("all", report.target):
        try:
            async with asyncio.timeout(budget_s):
                await look
        except TimeoutError:
            report.problem("all", report.target, f"not done within {budget_s:g} s", advice)
