"""The metrics of several workers as those of one server."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

SUMMED = ("counter", "histogram", "summary")

Key = tuple[str, tuple[tuple[str, str], ...]]
"""Name and labels of a sample."""
Own = tuple[str, str, str, float]
"""Name, type, help and value of a metric of the supervisor itself."""


class Scrapes:
    """What workers counted, summed; each gauge with the label `worker`.

    What a worker counted outlives it: a sum that fell would look like a new start of everything.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[str, str]] = {}
        self._last: dict[int, tuple[str, list[Metric]]] = {}
        self._past: dict[str, dict[Key, float]] = {}

    def add(self, pid: int, worker: int, text: str) -> None:
        """The newest scrape of a worker."""
        self._last[pid] = (str(worker), list(text_string_to_metric_families(text)))

    def end(self, pid: int) -> None:
        """The worker is no more; its gauges go with it."""
        _, families = self._last.pop(pid, ("", []))
        _sum(self._past, families)
        for family in families:
            self._kinds[family.name] = (family.type, family.documentation)

    def text(self, *own: Own) -> bytes:
        """All together, as Prometheus reads it."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Fixed([*self._merged(), *(_own(*each) for each in own)]))
        return generate_latest(registry)

    def _merged(self) -> Iterable[Metric]:
        kinds = dict(self._kinds)
        sums = {name: dict(samples) for name, samples in self._past.items()}
        gauges: dict[str, list[Sample]] = {}
        for worker, families in self._last.values():
            _sum(sums, families)
            for family in families:
                kinds[family.name] = (family.type, family.documentation)
                if family.type not in SUMMED:
                    gauges.setdefault(family.name, []).extend(
                        sample._replace(labels={**sample.labels, "worker": worker})
                        for sample in family.samples
                    )
        for name, (kind, documentation) in kinds.items():
            metric = Metric(name, documentation, kind)
            for (sample, labels), value in sums.get(name, {}).items():
                metric.add_sample(sample, dict(labels), value)
            metric.samples.extend(gauges.get(name, ()))
            if metric.samples:
                yield metric


def _sum(into: dict[str, dict[Key, float]], families: Iterable[Metric]) -> None:
    for family in families:
        if family.type in SUMMED:
            sums = into.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sample.labels.items()))
                sums[key] = sums.get(key, 0.0) + sample.value


def _own(name: str, kind: str, documentation: str, value: float) -> Metric:
    metric = Metric(name, documentation, kind)
    metric.add_sample(f"{name}_total" if kind == "counter" else name, {}, value)
    return metric


class _Fixed(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
