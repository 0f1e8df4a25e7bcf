import os
from uuid import uuid4

import psycopg
import pytest
import redis


@pytest.fixture(scope="session")
def database():
    """A database for this run of the tests, made from the template that has the extension."""
    name = f"test_{uuid4().hex}"
    with psycopg.connect(dbname="postgres", autocommit=True) as server:
        server.execute(f"create database {name} template app_template")
        yield name
        server.execute(f"drop database {name} with (force)")


@pytest.fixture
def db(database):
    """A connection whose transaction is rolled back: nothing is sent. For almost all tests."""
    with psycopg.connect(dbname=database) as connection, connection.transaction(force_rollback=True):
        yield connection


@pytest.fixture
def committing_db(database):
    """A connection whose transactions are committed, and whose events are sent. For a few tests, from end to end."""
    with psycopg.connect(dbname=database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def published(db):
    """Returns a function that lists what the test's transaction has published."""
    columns = "event_type, subject, data"
    return lambda: db.execute(f"select {columns} from outbox.published_here()").fetchall()


@pytest.fixture
def stream():
    """The entries of the stream of tests."""
    with redis.Redis.from_url(os.environ["REDIS_URL"], decode_responses=True) as client:
        client.delete("test_events")
        yield lambda: [entry for _, entry in client.xrange("test_events")]
