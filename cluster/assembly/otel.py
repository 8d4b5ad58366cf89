"""Sends traces to a collector of OpenTelemetry, in batches, from a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cluster.contracts.config.base import LoggingConfig
from cluster.contracts.errors import UserError
from cluster.loop.traces import Span, Trace, Traces
from cluster.machine.clock import MonotonicClock

FROM_ENVIRONMENT = "env"
PATH = "/v1/traces"


@contextmanager
def traces_of(config: LoggingConfig, run: str) -> Iterator[Traces | None]:
    """None when they are off. What is not sent yet is sent at the end."""
    if config.otel is None:
        yield None
        return
    exporter = TraceExporter(run, _collector(config.otel))
    try:
        yield Traces(config.otel_share, MonotonicClock(), exporter)
    finally:
        exporter.close()


class TraceExporter:
    """``collector``: a span exporter of the OpenTelemetry SDK."""

    def __init__(self, run: str, collector: Any) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._context_of = trace.set_span_in_context
        resource = Resource.create({"service.name": "accord", "accord.run": run})
        # Not the process's own: Ray's use of OpenTelemetry stays as it is.
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(collector))
        self._tracer = self._provider.get_tracer("accord")

    def __call__(self, trace: Trace) -> None:
        whole = self._begin(trace.whole, None)
        context = self._context_of(whole)
        for part in trace.parts:
            self._begin(part, context).end(end_time=_nanoseconds(part.end))
        whole.end(end_time=_nanoseconds(trace.whole.end))

    def _begin(self, span: Span, context: Any) -> Any:
        facts = {f"accord.{name}": value for name, value in span.facts.items()}
        start = _nanoseconds(span.start)
        return self._tracer.start_span(span.name, context, attributes=facts, start_time=start)

    def close(self) -> None:
        self._provider.shutdown()


def _collector(address: str) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise UserError(
            "is set, but OpenTelemetry's exporter is not installed",
            where="logging.otel",
            fix="install opentelemetry-exporter-otlp-proto-http, or leave logging.otel out",
        ) from None
    if address == FROM_ENVIRONMENT:
        return OTLPSpanExporter()
    base = address.rstrip("/")
    return OTLPSpanExporter(endpoint=base if base.endswith(PATH) else base + PATH)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
