"""Sends traces to a collector of OpenTelemetry, in batches, from a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.contracts.config.base import LoggingConfig
from cluster.contracts.errors import UserError
from cluster.loop.traces import Span, Trace, Traces
from cluster.machine.clock import MonotonicClock

FROM_ENVIRONMENT = "env"
PATH = "/v1/traces"
SEND_S = 5.0  # of one batch, with what is tried again
CLOSE_S = 2.0


@contextmanager
def traces_of(
    config: LoggingConfig, run: str, say: Callable[[str], None]
) -> Iterator[Traces | None]:
    """None when they are off. What is not sent yet is sent at the end, if that is quick. ``say``:
    told once when the collector does not take them."""
    if config.otel is None:
        yield None
        return

    def failed() -> None:
        say(f"traces cannot be sent to {config.otel}: see logging.otel; the run goes on")

    exporter = TraceExporter(run, _collector(config.otel), failed)
    try:
        yield Traces(config.otel_share, MonotonicClock(), exporter)
    finally:
        exporter.close()


class TraceExporter:
    """``collector``: a span exporter of the OpenTelemetry SDK; ``failed`` is called the first time
    that it cannot send."""

    def __init__(self, run: str, collector: Any, failed: Callable[[], None]) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

        send, told = collector.export, threading.Event()

        def export(spans: Any) -> Any:
            result = send(spans)
            if result is not SpanExportResult.SUCCESS and not told.is_set():
                told.set()
                failed()
            return result

        collector.export = export
        # It would print a line at each attempt; `failed` says it once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._context_of = trace.set_span_in_context
        resource = Resource.create({"service.name": "accord", "accord.run": run})
        # Not the process's own: Ray's use of OpenTelemetry stays as it is.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(collector, schedule_delay_millis=1000))
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
        """A collector that does not answer must not hold up the end of a run."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_S)


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
        return OTLPSpanExporter(timeout=SEND_S)
    base = address.rstrip("/")
    return OTLPSpanExporter(base if base.endswith(PATH) else base + PATH, timeout=SEND_S)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
