"""What Prometheus reads at /metrics, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from penstock.base.logs import unhurried
from penstock.core.service import Status
from penstock.fleet import Admission
from penstock.serving.gate import Caller
from penstock.serving.requestlog import RequestLog

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_ITL = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5)
_E2E = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)

_GAUGES = {
    "running": ("penstock_requests_running", "Samples that are being computed"),
    "waiting": ("penstock_requests_waiting", "Samples that wait to be computed"),
    "blocks_total": ("penstock_kv_blocks", "KV blocks of the pool"),
    "blocks_used": ("penstock_kv_blocks_used", "KV blocks held by requests"),
}
_COUNTERS = {
    "steps": ("penstock_steps", "Steps executed"),
    "prompt_tokens": ("penstock_prompt_tokens", "Prompt tokens accepted"),
    "generated_tokens": ("penstock_generation_tokens", "Tokens generated"),
    "prefix_hit_tokens": ("penstock_prefix_hit_tokens", "Prompt tokens found in the prefix cache"),
    "preemptions": ("penstock_preemptions", "Requests whose KV was given up and recomputed"),
    "failed_steps": ("penstock_failed_steps", "Steps that raised and were rolled back"),
    "restarts": ("penstock_engine_restarts", "Times the engine process was started again"),
    "bad_frames": ("penstock_bad_frames", "Frames from the engine process that could not be read"),
}


class EngineCollector(Collector):
    """Asks the engine at the moment of the scrape."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self.status = status

    def collect(self) -> Iterator[Metric]:
        status = self.status()
        for field, (name, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, value=getattr(status, field))
        usage = status.blocks_used / status.blocks_total if status.blocks_total else 0.0
        yield GaugeMetricFamily("penstock_kv_usage_ratio", "Share of the KV pool held by requests", value=usage)
        for field, (name, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(status.counters, field))


class QueueCollector(Collector):
    """What has been admitted and has not ended."""

    def __init__(self, admission: Admission, log: RequestLog | None) -> None:
        self.admission, self.log = admission, log

    def collect(self) -> Iterator[Metric]:
        text = "Lines for stderr that nobody took"
        yield CounterMetricFamily("penstock_stderr_lines_dropped", text, value=unhurried().dropped)
        if self.log is not None:
            text = "Requests that the log has no line for"
            yield CounterMetricFamily("penstock_log_lines_dropped", text, value=self.log.dropped)
        values = (
            ("penstock_queue_requests", "Requests admitted and not ended", self.admission.running),
            ("penstock_queue_tokens", "Tokens charged for them", self.admission.held),
            ("penstock_queue_tokens_limit", "Most tokens charged at a time", self.admission.budget),
        )
        for name, text, value in values:
            yield GaugeMetricFamily(name, text, value=value)


class Metrics:
    """Counters and histograms of the requests as clients see them, beside the engine's own."""

    def __init__(self, status: Callable[[], Status], paths: frozenset[str]) -> None:
        self.paths = paths
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCollector(status))
        self.responses = Counter("penstock_http_responses", "HTTP responses", ["path", "status"], registry=registry)
        self.requests = Counter("penstock_tenant_requests", "Requests", ["tenant", "status"], registry=registry)
        self.tokens = Counter("penstock_tenant_tokens", "Tokens", ["tenant", "kind"], registry=registry)
        self.finished = Counter("penstock_samples_finished", "Finished samples", ["reason"], registry=registry)
        self.first_token = _histogram("penstock_time_to_first_token_seconds", "Arrival to first token", _TTFT, registry)
        self.between = _histogram("penstock_inter_token_latency_seconds", "Token to next token", _ITL, registry)
        self.whole = _histogram("penstock_e2e_request_latency_seconds", "Arrival to last token", _E2E, registry)

    def count(self, path: str, status: int) -> None:
        """Unknown paths share one label, so that a scanner cannot grow the registry."""
        self.responses.labels(path if path in self.paths else "other", str(status)).inc()

    def account(self, caller: Caller, status: int) -> None:
        """By tenant; of requests without a key nobody knows whose they are. There are as many series as tenants."""
        if caller.key is not None and caller.visit is not None:
            self.requests.labels(caller.tenant, str(status)).inc()
            self.tokens.labels(caller.tenant, "prompt").inc(caller.prompt_tokens)
            self.tokens.labels(caller.tenant, "completion").inc(caller.completion_tokens)

    def expose(self) -> bytes:
        return generate_latest(self.registry)


def _histogram(name: str, text: str, buckets: tuple[float, ...], registry: CollectorRegistry) -> Histogram:
    return Histogram(name, text, buckets=buckets, registry=registry)
