"""Publishes with SQLAlchemy 2: by a function, and by a mapped class. Connects with PGHOST, PGUSER... of the environment."""

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID, uuid4

from sqlalchemy import JSON, FetchedValue, bindparam, create_engine, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column


def publish(session, event_type, data, **options):
    """Publishes within the session's transaction; the options are arguments of outbox.publish_event."""
    names = "".join(f", {name} => :{name}" for name in options)
    values = {"data": data, **options}
    json = [bindparam(name, type_=JSON) for name, value in values.items() if isinstance(value, dict)]
    call = text(f"select outbox.publish_event(:type, 'shop', :data{names})").bindparams(*json)
    return session.scalar(call, {"type": event_type, **values})


class Base(DeclarativeBase):
    type_annotation_map = {dict: JSON}


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    total: Mapped[Decimal]


class Event(Base):
    """A row of the outbox: an object added to a session is published by its commit."""

    __tablename__ = "events"
    __table_args__ = {"schema": "outbox"}
    event_id: Mapped[UUID] = mapped_column(primary_key=True, server_default=FetchedValue())
    event_type: Mapped[str]
    source: Mapped[str]
    data: Mapped[dict | None]
    subject: Mapped[str | None]
    backend: Mapped[str | None]
    stream: Mapped[str | None]
    data_schema: Mapped[str | None]
    publisher_config: Mapped[dict | None]
    max_retries: Mapped[int | None]


engine = create_engine("postgresql+psycopg://")

with Session(engine) as session, session.begin():  # the order and its events, or nothing
    order = Order(customer="Ada", total=Decimal("9.90"))
    session.add(order)
    session.flush()
    data = {"order_id": order.id, "total": str(order.total)}
    print("order.placed", publish(session, "order.placed", data, subject=f"order/{order.id}"))
    config = {"tenant": "acme"}  # a further field of the entry
    print("order.paid", publish(session, "order.paid", {"order_id": order.id}, max_retries=5, publisher_config=config))
    later = datetime.now(timezone.utc) + timedelta(days=14)
    print("order.reminder", publish(session, "order.reminder", {"order_id": order.id}, scheduled_at=later))

    event = Event(event_type="order.imported", source="shop", data={"order_id": order.id})
    session.add(event)
    session.flush()
    print("order.imported", event.event_id)

    # With your own id, an event is published once, even if the statement is repeated.
    shipped = {"event_id": uuid4(), "event_type": "order.shipped", "source": "shop", "data": {"order_id": order.id}}
    for _ in range(2):
        session.execute(insert(Event).values(shipped).on_conflict_do_nothing(index_elements=["event_id"]))
    print("order.shipped", shipped["event_id"])

with Session(engine) as session:
    publish(session, "order.cancelled", {})
    session.rollback()  # and no event is sent
