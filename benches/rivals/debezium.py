"""Debezium with the outbox event router, writing to Redis as the sink of Debezium Server does: see tests/debezium."""

import os
import pathlib
import subprocess
import sys
import time

from common import STREAM, connect, redis_client

HERE = pathlib.Path(__file__).parent
SINK = HERE.parent.parent / "tests" / "debezium" / "RedisSink.java"
SETUP = """
create table outbox (
    id uuid primary key default gen_random_uuid(),
    aggregatetype text not null default 'events',
    aggregateid text not null default '1',
    type text not null,
    payload json
)
"""
PROPERTIES = """
name=bench
connector.class=io.debezium.connector.postgresql.PostgresConnector
offset.storage=org.apache.kafka.connect.storage.FileOffsetBackingStore
offset.storage.file.filename={offsets}
offset.flush.interval.ms=100
topic.prefix=bench
database.hostname=127.0.0.1
database.port={port}
database.user={user}
database.password=
database.dbname={database}
plugin.name=pgoutput
publication.autocreate.mode=filtered
table.include.list=public.outbox
snapshot.mode=no_data
poll.interval.ms=1
key.converter.schemas.enable=false
value.converter.schemas.enable=false
transforms=outbox
transforms.outbox.type=io.debezium.transforms.outbox.EventRouter
transforms.outbox.table.expand.json.payload=true
transforms.outbox.route.topic.replacement={stream}
"""


def command():
    # In the directory of the Postgres socket, which lives as long as the servers.
    directory = pathlib.Path(os.environ["PGHOST"])
    properties = directory / "debezium.properties"
    properties.write_text(
        PROPERTIES.format(
            offsets=directory / "debezium.offsets",
            port=os.environ["PGPORT"],
            user=os.environ["PGUSER"],
            database=os.environ["PGDATABASE"],
            stream=STREAM,
        )
    )
    libraries = os.environ["OUTBOX_BENCH_DEBEZIUM"]
    return ["java", "-cp", libraries, str(SINK), str(properties), os.environ["REDIS_PORT"]]


def setup():
    """Makes the table, and lets the connector make its slot and note its position: it reads what is written later."""
    redis = redis_client()
    with connect() as connection:
        connection.autocommit = True
        connection.execute(SETUP)
        relay = subprocess.Popen(command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while not connection.execute("select 1 from pg_replication_slots where active").fetchall():
            time.sleep(0.1)
        connection.execute("insert into outbox (type, payload) values ('first', '{}')")
        while not redis.exists(STREAM):
            time.sleep(0.1)
        # The position is saved.
        time.sleep(1)
        relay.terminate()
        relay.wait()
    redis.delete(STREAM)


if sys.argv[1] == "setup":
    setup()
else:
    os.execvp("java", command())
