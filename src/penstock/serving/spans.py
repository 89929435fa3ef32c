"""Spans of requests for OpenTelemetry, sent as OTLP over HTTP from a thread of their own. Needs the extra ``otel``.

Names follow the semantic conventions for generative AI (https://github.com/open-telemetry/semantic-conventions-genai),
as far as those have one. No prompt, no answer: numbers, ids and names of models.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from penstock.base import ConfigError
from penstock.serving.history import Visit

MAX_PENDING = 4096
"""Requests that wait to be sent."""
MOST_CHARS = 512
"""Of a header that names a trace, as the recommendation asks for; a longer one is passed over."""
BATCH_SECONDS, MOST_TOGETHER = 1.0, 256
TIMEOUT_SECONDS = 5.0
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/embeddings": "embeddings",
}
"""``gen_ai.operation.name`` by path; of others there is none."""

_TRACE = (b"traceparent", b"tracestate")
_log = logging.getLogger(__name__)


Headers = Iterable[tuple[bytes, bytes]]


class Spans:
    """A span for each request, with those of its queue, prefill and decode below it.

    Args:
        endpoint: of a collector; ``/v1/traces`` is added. What else it may want is in the variables of OpenTelemetry,
            such as OTEL_EXPORTER_OTLP_HEADERS, OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME.

    Attributes:
        dropped: requests of which no span arrived.

    Raises:
        ConfigError: (invalid_endpoint) it is no address of HTTP.
    """

    def __init__(self, endpoint: str) -> None:
        if not endpoint.startswith(("http://", "https://")):
            why = f"{endpoint[:100]!r} does not begin with http:// or https://"
            fix = "give --otlp-endpoint as http://HOST:4318"
            raise ConfigError("invalid_endpoint", "Spans cannot be sent there", why=why, fix=fix)
        self.dropped = 0
        self._pending: deque[tuple[Visit, dict[str, str]]] = deque()
        self._wake = threading.Event()
        self._closing = self._complained = False
        self._ended = InMemorySpanExporter()
        provider = TracerProvider(resource=Resource.create({"service.name": "penstock"}), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._ended))
        self._tracer = provider.get_tracer("penstock")
        self._exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=TIMEOUT_SECONDS)
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it complains at each attempt
        self._thread = threading.Thread(target=self._run, name="penstock-spans", daemon=True)
        self._thread.start()

    def add(self, visit: Visit, headers: Headers) -> None:
        """A request that ended, and those of its headers that name the trace that it is part of
        (https://www.w3.org/TR/trace-context). From the event loop; nothing is made of it here.
        """
        if len(self._pending) >= MAX_PENDING:
            self.dropped += 1
            return
        given = [(name, value) for name, value in headers if name in _TRACE and len(value) <= MOST_CHARS]
        trace = [(name.decode(), value.decode("latin-1")) for name, value in given]
        self._pending.append((visit, {} if len(dict(trace)) < len(trace) else dict(trace)))  # given twice: in doubt
        self._wake.set()

    def close(self) -> None:
        """Sends what is pending, for two seconds at most."""
        self._closing = True
        self._wake.set()
        self._thread.join(2.0)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _run(self) -> None:
        pause = threading.Event()
        while not (self._closing and not self._pending):
            self._wake.wait()
            self._wake.clear()
            if not self._closing:
                pause.wait(BATCH_SECONDS)  # so that those that end together are sent together
            while self._pending:
                self._send([self._pending.popleft() for _ in range(min(len(self._pending), MOST_TOGETHER))])

    def _send(self, requests: list[tuple[Visit, dict[str, str]]]) -> None:
        for visit, trace in requests:
            self._spans(visit, trace)
        spans = self._ended.get_finished_spans()
        self._ended.clear()
        try:
            sent = not spans or self._exporter.export(spans) is SpanExportResult.SUCCESS
        except Exception as error:  # whatever it is, requests go on
            _log.debug("spans: %s", error)
            sent = False
        if sent:
            self._complained = False
            return
        self.dropped += len(requests)
        if not self._complained:  # once, until some arrive again
            self._complained = True
            _log.error("spans do not arrive, and are dropped and counted until they do")

    def _spans(self, visit: Visit, trace: dict[str, str]) -> None:
        line, above = visit.line, TraceContextTextMapPropagator().extract(trace)
        operation, began = OPERATIONS.get(line.path), round(1e9 * line.time.timestamp())
        name = f"{operation or line.path} {line.model or ''}".rstrip()
        span = self._tracer.start_span(name, above, SpanKind.SERVER, attributes(visit, operation), start_time=began)
        if line.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        below = set_span_in_context(span)
        marks = (line.admitted_s, line.started_s, line.first_token_s, line.total_s)
        for phase, start, end in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
            if start is None:
                break
            part = self._tracer.start_span(phase, below, start_time=began + round(1e9 * start))
            part.end(began + round(1e9 * (line.total_s if end is None else end)))
        span.end(began + round(1e9 * line.total_s))


def attributes(visit: Visit, operation: str | None) -> dict[str, str | int | float | list[str]]:
    """Of a request's span; what is not known is left out."""
    line = visit.line
    told = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "penstock",
        "gen_ai.request.model": line.model,
        "gen_ai.response.model": line.model,
        "gen_ai.response.id": visit.answer,
        "gen_ai.response.finish_reasons": None if line.finish is None else [line.finish],
        "gen_ai.response.time_to_first_chunk": line.first_token_s,
        "gen_ai.usage.input_tokens": line.prompt_tokens,
        "gen_ai.usage.output_tokens": line.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": line.cached_tokens,
        "http.response.status_code": line.status,
        "url.path": line.path,
        "error.type": str(line.status) if line.status >= 400 else None,
        "penstock.request.id": line.id,
        "penstock.tenant": line.tenant,
        "penstock.preemptions": line.preempted,
        "penstock.starved_s": line.starved_s,
        "penstock.client_s": line.client_s,
        "penstock.load_s": line.load_s,
    }
    return {name: value for name, value in told.items() if value is not None}
