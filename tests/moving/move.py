"""Moves the application of app.py from django-broadcaster of PyPI to outbox_relay and out again, under load.

A consumer reads both streams all the time. At the end, it must have seen each committed event once, and the events of
one aggregate in order. scripts/test-moving starts the servers and runs this.
"""

import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import redis
from throwaway import connect, say, sql, wait

HERE = pathlib.Path(__file__).parent
TOP = HERE.parent.parent
STREAMS = ("events", "urgent")
TABLES = """
    create table aggregates (key text primary key, version bigint not null default 0);
    insert into aggregates select 'k' || n from generate_series(0, 19) n;
    create table ledger (event_id uuid primary key, key text, version bigint, way text not null);
    alter table aggregates owner to app;
    alter table ledger owner to app;
"""


class Consumer(threading.Thread):
    """A consumer group on both streams. It records the entries in the order in which it reads them."""

    def __init__(self):
        super().__init__(daemon=True)
        self.redis = redis.Redis(port=int(os.environ["REDIS_PORT"]), decode_responses=True)
        self.seen = []
        self.running = True
        for stream in STREAMS:
            self.redis.xgroup_create(stream, "consumer", id="0", mkstream=True)

    def run(self):
        while self.running:
            for stream, entries in self.redis.xreadgroup("consumer", "c", {s: ">" for s in STREAMS}, count=500, block=100) or []:
                for entry_id, fields in entries:
                    self.seen.append((stream, fields))
                    self.redis.xack(stream, "consumer", entry_id)


class Process:
    def __init__(self, *command):
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE
        )
        self.said = []
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.child.stdout:
            self.said.append(line.rstrip())

    def tell(self, line):
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()

    def end(self, how=None):
        if how is None:
            self.child.stdin.close()
        else:
            self.child.send_signal(how)
        self.child.wait(60)
        if self.child.returncode not in (0, -(how or 0)):
            sys.exit(f"{self.child.args} ended with {self.child.returncode}: " + "\n".join(self.said[-20:]))


def app(seed):
    return Process(sys.executable, str(HERE / "app.py"), str(seed))


def old_worker():
    return Process(str(pathlib.Path(sys.executable).with_name("django-admin")), "outbox_worker", "--interval", "0", "--batch-size", "50")


def waiting():
    """The number of rows for each status, without the rows that were moved."""
    return dict(sql("select status, count(*) from outbox_events where last_error not like 'moved%' group by 1"))


def columns(where):
    return sql(
        "select column_name, data_type, character_maximum_length, is_nullable from information_schema.columns"
        f" where table_schema = '{where}' and table_name = 'outbox_events' order by ordinal_position"
    )


def check_recorded_schema():
    """The table of the end-to-end tests has the columns that the package creates."""
    sql("create schema recorded")
    sql("set search_path = recorded; " + (TOP / "tests/django_broadcaster/schema.sql").read_text())
    assert columns("recorded") == columns("public"), (columns("recorded"), columns("public"))
    sql("drop schema recorded cascade")


def convert_settings():
    """Converts OUTBOX_* to SQL, and runs it unchanged."""
    converter = [sys.executable, str(TOP / "contrib/settings_to_sql.py"), "django", "settings"]
    script = subprocess.run(converter, check=True, capture_output=True, text=True, cwd=HERE).stdout
    subprocess.run(
        [os.environ["PSQL"], "-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres", "-f", "-"],
        input=script, check=True, text=True, stdout=subprocess.DEVNULL,
    )
    settings = ("default_backend", "batch_size", "poll_interval", "max_retries", "published_retention", "failed_retention")
    wait("the settings", lambda: sql("show outbox_relay.default_backend")[0][0] == "main")
    assert [sql(f"show outbox_relay.{name}")[0][0] for name in settings] == ["main", "200", "2s", "4", "3d", "14d"]


def import_rows(db, arguments):
    rows = db.execute(f"select becomes, count(*) from outbox.import_django_broadcaster('outbox_events'{arguments}) group by 1").fetchall()
    return collections.Counter(dict(rows))


def leave_a_row_in_hand():
    """Kills the old worker until it leaves a row with the status processing."""
    for _ in range(50):
        worker = old_worker()
        wait("the old worker", lambda: any("Processed" in line for line in worker.said) or not waiting().get("pending"))
        time.sleep(random.uniform(0, 0.3))
        worker.end(signal.SIGKILL)
        if waiting().get("processing"):
            return
    sys.exit("the old worker never left a row with the status processing")


def check(consumer, exempt, since):
    """Each committed event was seen once, and the events of an aggregate in order."""
    ledger = {str(row[0]): row[1:] for row in sql("select event_id, key, version, way from ledger")}
    wait("all events to be seen", lambda: len({fields["event_id"] for _, fields in consumer.seen}) >= len(ledger), 30)
    time.sleep(0.5)
    times = collections.Counter(fields["event_id"] for _, fields in consumer.seen)
    lost = set(ledger) - set(times)
    phantoms = set(times) - set(ledger)
    repeated = [event_id for event_id, count in times.items() if count > 1]
    last, disorder = {}, []
    for stream, fields in consumer.seen:
        assert list(fields)[:5] == ["event_id", "event_type", "source", "timestamp", "cloud_event"], fields
        key, version, _ = ledger.get(fields["event_id"], (None, None, None))
        if key is not None:
            assert stream == ("urgent" if int(key[1:]) % 3 == 0 else "events"), (stream, key)
            if version < last.get(key, 0) and key not in exempt:
                disorder.append((key, last[key], version))
            last[key] = max(version, last.get(key, 0))
    ways = collections.Counter(way for *_, way in ledger.values())
    say(f"{since}: {len(ledger)} committed ({dict(ways)}): lost {len(lost)}, phantoms {len(phantoms)}, repeated {len(repeated)},"
        f" out of order {len(disorder)}")
    if lost or phantoms or repeated or disorder:
        states = [sql("select id, status, last_error from outbox_events where id = any(%s)", list(some)[:5]) for some in (lost, repeated)]
        sys.exit(f"lost, repeated: {states}; out of order: {disorder[:5]}")


def move(worker_runs):
    """Moves the application here, and ends the bridge. The documented order stops the old worker first; `worker_runs` does not."""
    apps = [app(seed) for seed in range(3)]
    exempt = set()
    worker = old_worker()
    wait("some events", lambda: waiting().get("published", 0) > 200)
    if worker_runs:
        worker.end(signal.SIGKILL)
        leave_a_row_in_hand()
        # The killed worker has left a row, and later rows have overtaken it. The new worker processes a row during the move.
        exempt = {f"k{n}" for n in range(20)}
        worker = old_worker()
        wait("the old worker to go on", lambda: any("Processed" in line for line in worker.said))
    else:
        worker.end(signal.SIGTERM)
        wait("a backlog", lambda: waiting().get("pending", 0) > 200)
    with connect() as db:
        told = import_rows(db, "")
    say("before the move:", dict(told))
    with connect() as db:
        db.execute("select outbox.bridge_django_broadcaster('outbox_events')")
        done = import_rows(db, ", false")
    say("moved:", dict(done))
    assert done["pending"] > 0 and done["refused"] == done["failed"] == 0, done
    time.sleep(2)
    if worker_runs:
        worker.end(signal.SIGTERM)
    with connect() as db:
        rest = import_rows(db, ", false, 'look'")
    say("moved after the old worker's end:", dict(rest))
    assert rest["ambiguous"] == 0 and (rest["pending"] > 0 or not worker_runs), rest
    time.sleep(2)
    for one in apps:
        one.tell("new")
    wait("the new way", lambda: all("publishes the new way" in one.said for one in apps))
    sql("select outbox.end_bridge('outbox_events')")
    time.sleep(2)
    return apps, exempt


def move_out(apps):
    """Moves back to django-broadcaster: all events of outbox_relay are sent before its worker starts."""
    for one in apps:
        one.tell("old")
    for one in apps:
        wait("the old way", lambda: one.said[-1] == "publishes the old way")
    wait("scheduled events", lambda: sql("select scheduled from outbox.status")[0][0] == 0)
    assert sql("select outbox.drain('30 s')")[0][0]
    worker = old_worker()
    time.sleep(2)
    for one in apps:
        one.end()
    wait("the old worker", lambda: not waiting().get("pending"))
    worker.end(signal.SIGTERM)


def main():
    sql("create role app login superuser")
    subprocess.run([str(pathlib.Path(sys.executable).with_name("django-admin")), "migrate", "--verbosity", "0"], check=True, cwd=HERE)
    sql("alter role app nosuperuser")
    check_recorded_schema()
    sql(TABLES)
    sql("create extension outbox_relay")
    convert_settings()
    sql("select outbox.grant_publisher('app')")
    consumer = Consumer()
    consumer.start()

    say("stop the old worker, then move")
    apps, exempt = move(worker_runs=False)
    move_out(apps)
    check(consumer, exempt, "in and out")

    say("kill the old worker while it processes a row, start it again, and move while it runs")
    apps, exempt = move(worker_runs=True)
    for one in apps:
        one.end()
    wait("scheduled events", lambda: sql("select scheduled from outbox.status")[0][0] == 0)
    assert sql("select outbox.drain('30 s')")[0][0]
    check(consumer, exempt, "in again")
    sql("drop extension outbox_relay")


main()
