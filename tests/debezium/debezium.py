"""Compares format `debezium` with what Debezium itself writes, and moves an outbox table from Debezium to outbox_relay as
docs/moving.md says. scripts/test-debezium starts the servers and runs this.
"""

import json
import os
import pathlib
import random
import subprocess
import threading
import time

import redis
from throwaway import connect, say, sql, wait

HERE = pathlib.Path(__file__).parent
WORK = pathlib.Path(os.environ["WORK"])
STREAM = "outbox.event.orders"


class Debezium:
    """An engine with a connector for one table."""

    def __init__(self, name, table, more={}):
        self.slot = name
        properties = {
            "name": name,
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
            "offset.storage.file.filename": WORK / f"{name}.offsets",
            "offset.flush.interval.ms": "100",
            "topic.prefix": name,
            "database.hostname": "127.0.0.1",
            "database.port": os.environ["PGPORT"],
            "database.user": "postgres",
            "database.password": "",
            "database.dbname": "postgres",
            "plugin.name": "pgoutput",
            "slot.name": name,
            "publication.name": f"{name}_publication",
            "publication.autocreate.mode": "filtered",
            "table.include.list": f"public.{table}",
            "snapshot.mode": "no_data",
            "tombstones.on.delete": "false",
            "skipped.operations": "none",
            "key.converter.schemas.enable": "false",
            "value.converter.schemas.enable": "false",
        } | more
        file = WORK / f"{name}.properties"
        file.write_text("".join(f"{key}={value}\n" for key, value in properties.items()))
        self.log = open(WORK / f"{name}.log", "w")
        self.process = subprocess.Popen(
            ["java", "-cp", os.environ["DEBEZIUM"], HERE / "RedisSink.java", file, os.environ["REDIS_PORT"]],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        wait("Debezium's slot", lambda: sql("select 1 from pg_replication_slots where slot_name = %s and active", name))

    def stop(self):
        self.process.terminate()
        self.process.wait(60)
        self.log.close()
        sql("select pg_drop_replication_slot(%s)", self.slot)


def compare(streams):
    """Both write the same changes of one table; a reader of before, after and op cannot tell them apart."""
    sql(
        """create table orders (id int primary key, name text, is_paid boolean, pieces bigint, weight float8, note text);
           alter table orders replica identity full;
           insert into outbox.backends (name, host, port, stream_name, format)
               select 'changes', host, port, 'ours', 'debezium' from outbox.backends where name = 'default';
           select outbox.attach_table('orders', backend => 'changes', payload => 'both',
               operations => 'insert,update,delete,truncate')"""
    )
    debezium = Debezium("theirs", "orders")
    dice, rows, changes = random.Random(7), set(), 0
    with connect(autocommit=True) as db:
        for number in range(300):
            what = dice.choice(["insert", "insert", "update", "delete"]) if rows else "insert"
            if what == "insert":
                values = (number, f'"ü" {number}', dice.choice([True, False, None]), 2**60 + number, number / 8, None)
                db.execute("insert into orders values (%s, %s, %s, %s, %s, %s)", values)
                rows.add(number)
            elif what == "update":
                row = dice.choice(sorted(rows))
                db.execute("update orders set pieces = pieces + 1, note = 'changed' where id = %s", (row,))
            else:
                row = dice.choice(sorted(rows))
                db.execute("delete from orders where id = %s", (row,))
                rows.remove(row)
            changes += 1
        table = {row[0]: row[1] for row in db.execute("select id, to_jsonb(orders) from orders")}
        db.execute("truncate orders")
        changes += 1
    names = ["ours", "theirs.public.orders"]
    for name in names:
        wait(f"all changes in {name}", lambda: streams.xlen(name) >= changes)
    debezium.stop()

    read = [[json.loads(entry[b"value"]) for _, entry in streams.xrange(name)] for name in names]
    told = [[(value["op"], value["before"], value["after"]) for value in values] for values in read]
    for number, (ours, theirs) in enumerate(zip(*told, strict=True)):
        assert ours == theirs, f"change {number}: {ours} beside {theirs}"
    copy = {}
    for op, before, after in told[0][:-1]:
        if before:
            del copy[before["id"]]
        if after:
            copy[after["id"]] = after
    assert copy == table, "a copy that is built of the changes is not the table"
    for values in read:
        assert all(isinstance(value["ts_ms"], int) and isinstance(value["source"]["ts_ms"], int) for value in values)
    say(f"{changes} changes: op, before and after are the same as Debezium's")
    said = [(entry[b"key"].decode(), set(value["source"])) for name, values in zip(names, read) for (_, entry), value in
            zip(streams.xrange(name, count=1), values)]
    say(f"keys: {said[0][0]} beside {said[1][0]}; in source: {sorted(said[0][1])} beside {sorted(said[1][1])}")


class Application(threading.Thread):
    """Writes events into its outbox table: some aggregates, each with a version that grows."""

    def __init__(self):
        super().__init__(daemon=True)
        self.running, self.written = True, []

    def run(self):
        dice, versions = random.Random(11), {}
        with connect(autocommit=True) as db:
            while self.running:
                key = f"k{dice.randrange(10)}"
                versions[key] = versions.get(key, 0) + 1
                payload = json.dumps({"key": key, "version": versions[key]})
                db.execute(
                    "insert into outbox_table (id, aggregatetype, aggregateid, type, payload) "
                    "values (gen_random_uuid(), 'orders', %s, 'OrderChanged', %s)",
                    (key, payload),
                )
                self.written.append((key, versions[key]))
                time.sleep(0.002)

    def wait_more(self, count):
        goal = len(self.written) + count
        wait("the application", lambda: len(self.written) >= goal)

    def stop(self):
        self.running = False
        self.join()


def payload_of(entry):
    """Of either kind of entry."""
    if b"cloud_event" in entry:
        return json.loads(entry[b"cloud_event"])["data"]
    return json.loads(entry[b"value"])


def move(streams):
    """An application that goes on writing its outbox table moves without losing, repeating or reordering an event."""
    sql(
        """create table outbox_table (id uuid primary key, aggregatetype text not null, aggregateid text not null,
               type text not null, payload jsonb)"""
    )
    debezium = Debezium(
        "mover",
        "outbox_table",
        {
            "transforms": "outbox",
            "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
            "transforms.outbox.table.expand.json.payload": "true",
        },
    )
    application = Application()
    application.start()
    application.wait_more(500)
    wait("entries of Debezium", lambda: streams.xlen(STREAM) > 100)

    sql("update outbox.backends set enabled = false where name = 'default'")
    with connect() as db:
        db.execute("insert into outbox_table values (gen_random_uuid(), 'moved', '', 'moved', '{}')")
        db.execute("alter publication mover_publication drop table outbox_table")
        db.execute("select outbox.bridge_debezium('outbox_table', stream_prefix => 'outbox.event.')")
    wait("Debezium to be through", lambda: streams.exists("outbox.event.moved"))
    debezium.stop()
    theirs = streams.xlen(STREAM)
    sql("update outbox.backends set enabled = true where name = 'default'")
    application.wait_more(500)
    application.stop()
    wait("all events", lambda: streams.xlen(STREAM) >= len(application.written))
    time.sleep(0.5)

    read = [payload_of(entry) for _, entry in streams.xrange(STREAM)]
    read = [(event["key"], event["version"]) for event in read]
    assert sorted(read) == sorted(application.written), "lost or repeated"
    last = {}
    for key, version in read:
        assert version == last.get(key, 0) + 1, f"{key} {version} after {last.get(key)}"
        last[key] = version
    say(f"moved: {theirs} entries of Debezium, then {len(read) - theirs} of outbox_relay; each event once, in order")
    first = streams.xrange(STREAM, count=1)[0][1]
    say("an entry of Debezium's event router:", first)


if __name__ == "__main__":
    sql("create extension outbox_relay")
    sql("update outbox.backends set host = '127.0.0.1', port = %s, max_len = 0", int(os.environ["REDIS_PORT"]))
    streams = redis.Redis(port=int(os.environ["REDIS_PORT"]))
    compare(streams)
    move(streams)
