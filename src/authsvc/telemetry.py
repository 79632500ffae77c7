"""Logs and metrics."""

import logging
import sys
from collections.abc import Callable, Iterable

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

SECONDS = (0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Metrics:
    """Everything that the metrics port shows, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "authsvc_rpc_calls",
            "Calls that ended, by method and gRPC status code",
            ("method", "code"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "authsvc_rpc_seconds",
            "Time in the server, by method",
            ("method",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.verdicts = Counter(
            "authsvc_verdicts",
            "Tokens judged, by reason (UNSPECIFIED: active)",
            ("reason",),
            registry=self.registry,
        )

    def gauges(self, *gauges: tuple[str, str, Callable[[], float]]) -> None:
        """Adds gauges (name, help, reader) that are read at each scrape."""
        self.registry.register(_Gauges(gauges))


class _Gauges:
    def __init__(self, gauges: tuple[tuple[str, str, Callable[[], float]], ...]) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, documentation, read in self._gauges:
            yield GaugeMetricFamily(name, documentation, value=read())


def configure_logs(level: str, *, json: bool | None = None) -> None:
    """Logs to standard error: JSON for machines, by default where it is no terminal."""
    as_json = not sys.stderr.isatty() if json is None else json
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
