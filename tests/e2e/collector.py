"""A collector of OpenTelemetry, in this process."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """What has been sent to it by /v1/traces."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                found = self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
                if found:
                    requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200 if found else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Span]:
        return [
            span
            for request in list(self.requests)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def of(self, id: str) -> tuple[Span, list[Span]]:
        """The span of the request with this id, and those below it."""
        deadline = time.monotonic() + 60
        while True:
            for span in self.spans():
                if told(span).get("penstock.request.id") == id:
                    return span, [child for child in self.spans() if child.parent_span_id == span.span_id]
            assert time.monotonic() < deadline, "the span does not come"
            time.sleep(0.05)


def told(span: Span) -> dict[str, Any]:
    values = {pair.key: pair.value for pair in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}
