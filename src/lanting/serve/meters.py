"""What Prometheus reads at /metrics. A registry per server, so tests and several servers never share counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from lanting.serve.desk import Desk

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
STEPS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
ANSWERS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100)


class Meters:
    """All counts of one server."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.accepted = Counter("lanting_jobs_accepted", "Jobs accepted.", ["dialect"], registry=own)
        self.ended = Counter("lanting_jobs_ended", "Jobs ended.", ["state"], registry=own)
        self.refused = Counter("lanting_jobs_refused", "Jobs refused because the queue was full.", registry=own)
        self.crashes = Counter("lanting_worker_crashes", "Workers that died.", ["model"], registry=own)
        self.requests = Counter(
            "lanting_http_requests", "Answers by route and status.", ["route", "status"], registry=own
        )
        self.answer = Histogram("lanting_http_seconds", "Seconds until an answer began.", buckets=ANSWERS, registry=own)
        self.waited = Histogram("lanting_job_wait_seconds", "Seconds in the queue.", buckets=SECONDS, registry=own)
        self.latency = Histogram("lanting_job_seconds", "Accepted to ended.", buckets=SECONDS, registry=own)
        self.step = Histogram("lanting_step_seconds", "Seconds of a denoising step.", buckets=STEPS, registry=own)
        self.waiting = Gauge("lanting_jobs_waiting", "Jobs in the queue.", registry=own)
        self.running = Gauge("lanting_jobs_running", "Jobs being drawn.", registry=own)
        self.workers = Gauge("lanting_workers", "Workers that there should be.", registry=own)
        self.ready = Gauge("lanting_workers_ready", "Workers that can draw.", registry=own)
        self.waits = Gauge("lanting_workers_waiting", "Workers that wait for room in the cluster.", registry=own)
        self.disk = Gauge("lanting_disk_free_bytes", "Bytes left where pictures are kept.", registry=own)
        self.lost = Gauge("lanting_log_lines_lost", "Steps that could not be logged.", registry=own)

    def page(self, desk: Desk) -> bytes:
        """In Prometheus' text form."""
        self.waiting.set(len(desk.line))
        self.running.set(len(desk.runs))
        self.workers.set(sum(len(model.hands) for model in desk.models.values()))
        self.ready.set(sum(model.workers for model in desk.models.values()))
        self.waits.set(sum(model.waits for model in desk.models.values()))
        self.disk.set(desk.files.free())
        self.lost.set(desk.ledger.lost)
        return generate_latest(self.registry)
