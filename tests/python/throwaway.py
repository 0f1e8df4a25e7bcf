"""What the tests in Python share. They run against throwaway servers, which their scripts start."""

import sys
import time

import psycopg


def say(*words):
    print("==>", *words, flush=True)


def connect(user="postgres", autocommit=False):
    return psycopg.connect(user=user, dbname="postgres", autocommit=autocommit)


def sql(statement, *arguments, user="postgres"):
    """Runs a statement in a session of its own, and returns its rows."""
    with connect(user, autocommit=True) as db:
        cursor = db.execute(statement, arguments or None)
        return cursor.fetchall() if cursor.description else []


def wait(what, holds, seconds=120):
    """Waits until `holds()`; ends the test if that takes too long."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            sys.exit(f"waited {seconds} s for {what}")
        time.sleep(0.05)
