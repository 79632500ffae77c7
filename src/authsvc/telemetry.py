"""Logs and metrics."""

import logging
import os
import socket
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

SECONDS = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """Everything that the metrics port shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counters(
            "authsvc_rpc_calls",
            "Calls that ended, by method and gRPC status code",
            ("method", "code"),
        )
        self.seconds = Histograms("authsvc_rpc_seconds", "Time in the server, by method", "method")
        self.verdicts = Counters(
            "authsvc_verdicts", "Tokens judged, by reason (UNSPECIFIED: active)", ("reason",)
        )
        self.limited = Counters(
            "authsvc_rate_limited", "Calls refused because there were too many", ("limit",)
        )
        for family in (self.calls, self.seconds, self.verdicts, self.limited):
            self.registry.register(family)

    def gauges(self, *gauges: tuple[str, str, Callable[[], float]]) -> None:
        """Adds gauges (name, help, reader) that are read at each scrape."""
        self.registry.register(_Gauges(gauges))


class Counter:
    """Counts on the event loop alone: without the lock that made prometheus_client's dear."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self) -> None:
        """One more."""
        self.value += 1


class Counters(Collector):
    """Counters of one name, by the values of their labels."""

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...]) -> None:
        self._about = (name, documentation)
        self._labels = labels
        self._counters: dict[tuple[str, ...], Counter] = {}

    def labels(self, *values: str) -> Counter:
        """The counter of these values."""
        return self._counters.setdefault(values, Counter())

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(*self._about, labels=self._labels)
        for values, counter in list(self._counters.items()):
            family.add_metric(values, counter.value)
        yield family


class Histogram:
    """As Counter, for durations."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """One more, of so many seconds."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds


class Histograms(Collector):
    """Histograms of one name, by the value of one label."""

    def __init__(self, name: str, documentation: str, label: str) -> None:
        self._about = (name, documentation)
        self._label = label
        self._histograms: dict[str, Histogram] = {}

    def labels(self, value: str) -> Histogram:
        """The histogram of this value."""
        return self._histograms.setdefault(value, Histogram())

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(*self._about, labels=(self._label,))
        bounds = [*map(str, SECONDS), "+Inf"]
        for value, histogram in list(self._histograms.items()):
            buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
            family.add_metric((value,), buckets, histogram.sum_s)
        yield family


class _Gauges(Collector):
    def __init__(self, gauges: tuple[tuple[str, str, Callable[[], float]], ...]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, documentation, read in self._gauges:
            yield GaugeMetricFamily(name, documentation, value=read())


_subject: ContextVar[Callable[[], Mapping[str, str]]] = ContextVar("log", default=dict)


def log_about(told: Callable[[], Mapping[str, str]]) -> None:
    """Adds fields to the lines of this task from here on, and of what it starts.

    They are asked only where a line is written: who logs nothing pays for nothing.
    """
    _subject.set(told)


def configure_logs(
    level: str, *, json: bool | None = None, instance: str = "", once: bool = False
) -> None:
    """Logs to standard error: JSON for machines, by default where it is no terminal.

    Each line names the instance, by default by its host and process. `once`: nobody does it again
    in this process, so a logger need not be made anew for each line, written or not.
    """
    as_json = not sys.stderr.isatty() if json is None else json
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            Subject(instance or f"{socket.gethostname()}:{os.getpid()}"),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=once,
    )


class Subject:
    """Adds the instance, and what the line is about; what the line itself says goes before."""

    def __init__(self, instance: str) -> None:
        self._instance = instance

    def __call__(
        self, _logger: object, _name: str, line: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        line.setdefault("instance", self._instance)
        for key, value in _subject.get()().items():
            if value:
                line.setdefault(key, value)
        return line
