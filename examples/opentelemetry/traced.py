"""A trace from the transaction that publishes to the consumer that handles the event, with OpenTelemetry's SDK."""

import os

import psycopg
import redis
from opentelemetry import propagate, trace
from opentelemetry.sdk.trace import TracerProvider

trace.set_tracer_provider(TracerProvider())  # an application adds its exporter here
tracer = trace.get_tracer("shop")


def publish(db, event_type, data):
    """Publishes within the transaction of the connection, under the current span."""
    carrier = {}
    propagate.inject(carrier)
    for name in ("traceparent", "tracestate"):
        db.execute("select set_config(%s, %s, true)", [f"outbox_relay.{name}", carrier.get(name, "")])
    db.execute("select outbox.publish_event(%s, 'shop', %s::jsonb)", [event_type, data])


def handle(entry):
    """Handles an entry of the stream in a span that belongs to the publisher's."""
    with tracer.start_as_current_span("handle", context=propagate.extract(entry), kind=trace.SpanKind.CONSUMER) as span:
        print("consumer", f"{span.get_span_context().trace_id:032x}", f"{span.parent.span_id:016x}")


with psycopg.connect() as db, tracer.start_as_current_span("place order", kind=trace.SpanKind.PRODUCER) as span:
    publish(db, "order.placed", '{"order_id": 1}')
    print("publisher", f"{span.get_span_context().trace_id:032x}", f"{span.get_span_context().span_id:016x}")

stream = redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True)
for _, entries in stream.xread({"events": "0"}, block=10_000):
    for _, entry in entries:
        handle(entry)
