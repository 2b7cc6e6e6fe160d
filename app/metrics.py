"""What the service counts, in Prometheus' text form. Names and units follow that project's conventions: base units, ``_total``.

Nothing in here holds a prompt, a name of a visitor or an address.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from qdiff.resources import resident_bytes

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)


class Metrics:
    """Counters of one service. Several services in one process (tests) do not meet: each has its own registry."""

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float], engine_bytes: Callable[[], float]):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "qdiff_requests", "Requests by kind and outcome (done, failed, cancelled, refused).", ["kind", "outcome"],
            registry=registry,
        )  # fmt: skip
        self.pictures = Counter("qdiff_pictures", "Pictures made, by engine.", ["engine"], registry=registry)
        self.queue_seconds = Histogram(
            "qdiff_queue_seconds", "Time between admission and start.", ["kind"], buckets=_SECONDS, registry=registry
        )
        self.compute_seconds = Histogram(
            "qdiff_compute_seconds", "Time in the compute slot.", ["kind"], buckets=_SECONDS, registry=registry
        )
        self.loads = Counter("qdiff_engine_loads", "Engines loaded into memory.", registry=registry)
        self.evictions = Counter("qdiff_engine_evictions", "Engines evicted from memory.", registry=registry)
        self.out_of_memory = Counter("qdiff_out_of_memory", "Times that memory ran out in a job.", registry=registry)
        gauges: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("qdiff_queue_length", "Requests that wait.", waiting),
            ("qdiff_jobs_running", "Jobs in the compute slot.", running),
            ("qdiff_engine_bytes", "Memory that loaded models and engines took.", engine_bytes),
            ("qdiff_resident_bytes", "Resident memory of the process.", resident_bytes),
        )
        for name, text, value in gauges:
            Gauge(name, text, registry=registry).set_function(value)

    def text(self) -> bytes:
        """Return the page ``/metrics``."""
        return generate_latest(self._registry)
