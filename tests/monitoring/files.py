"""Checks in the files of contrib/monitoring what no other program checks. scripts/test-monitoring runs this.

    files.py alerts CONTRIB OPERATIONS.md       every alert must have a reason, a section of the runbook, and two unit tests
    files.py otel CONTRIB PSQL HOST             the collector's queries must return the same series as outbox.metrics
"""

import json
import re
import subprocess
import sys

import yaml

# The keys of the receiver "sqlquery" that are used here: internal/sqlquery/config.go of the collector's contrib repository.
RECEIVER_KEYS = {"driver", "datasource", "collection_interval", "queries"}
METRIC_KEYS = {"metric_name", "description", "value_column", "value_type", "data_type", "monotonic", "aggregation",
               "attribute_columns"}
# This metric does not come from outbox.metrics.
HEALTH = "outbox_relay_health"


def load(path):
    with open(path, encoding="utf-8") as file:
        return yaml.safe_load(file)


def anchors(path):
    """The sections of a Markdown file, as GitHub names them in links."""
    with open(path, encoding="utf-8") as file:
        titles = re.findall(r"^#+ (.+)$", file.read(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_alerts(contrib, operations):
    rules = load(f"{contrib}/alerts.yml")["groups"][0]["rules"]
    tests = [case for test in load(f"{contrib}/alerts_test.yml")["tests"] for case in test["alert_rule_test"]]
    sections = anchors(operations)
    for rule in rules:
        name, notes = rule["alert"], rule["annotations"]
        assert set(notes) == {"summary", "reason", "runbook_url"} and all(notes.values()), f"{name}: {sorted(notes)}"
        assert rule["labels"]["severity"] in ("warning", "critical"), name
        page, section = notes["runbook_url"].split("#")
        assert page.endswith("/docs/operations.md") and section in sections, f"{name}: no section {section} in {operations}"
        cases = [case["exp_alerts"] for case in tests if case["alertname"] == name]
        assert any(cases) and not all(cases), f"{name}: needs a test that it fires, and one that it does not"
    print(f"ok: {len(rules)} alerts have a reason, a section of the runbook, and unit tests")


def check_otel(contrib, psql, host):
    config = load(f"{contrib}/otel-collector.yml")
    receiver = config["receivers"]["sqlquery/outbox_relay"]
    assert set(receiver) == RECEIVER_KEYS and receiver["driver"] == "postgres", sorted(receiver)
    pipeline = config["service"]["pipelines"]["metrics/outbox_relay"]
    assert pipeline["receivers"] == ["sqlquery/outbox_relay"] and set(pipeline["exporters"]) <= set(config["exporters"]), pipeline

    def rows(sql):
        # In one snapshot, since both sides are compared.
        out = subprocess.run([psql, "-X", "-At", "-v", "ON_ERROR_STOP=1", "-h", host, "-U", "outbox_monitor", "-d", "postgres",
                              "-c", f"select coalesce(jsonb_agg(r), '[]') from ({sql}) r"], check=True, capture_output=True, text=True)
        return json.loads(out.stdout)

    found = set()
    for query in receiver["queries"]:
        answer = rows(query["sql"])
        assert answer, query["sql"]
        for metric in query["metrics"]:
            assert set(metric) <= METRIC_KEYS, sorted(metric)
            counter = metric["data_type"] == "sum"
            assert metric["data_type"] in ("sum", "gauge") and metric["value_type"] == "double", metric
            assert not counter or metric["monotonic"] and metric["aggregation"] == "cumulative", metric
            for row in answer:
                assert all(value is not None for value in row.values()), f"the receiver complains of NULL: {row}"
                float(row[metric["value_column"]])
                labels = tuple(sorted((name, row[name]) for name in metric["attribute_columns"] if name != "database"))
                assert row["database"] == "postgres"
                found.add((metric["metric_name"], "counter" if counter else "gauge", labels, metric["description"]))
    # The receiver makes no histograms: their series are counters.
    expected = {(row["name"], row["type"].replace("histogram", "counter"), tuple(sorted(row["labels"].items())), row["help"])
                for row in rows("select * from outbox.metrics")}
    found = {one for one in found if one[0] != HEALTH}
    assert found == expected, f"only in the collector: {found - expected}; only in the view: {expected - found}"
    print(f"ok: the collector's queries give {len(found)} series, all that outbox.metrics has")


if sys.argv[1] == "alerts":
    check_alerts(*sys.argv[2:])
else:
    check_otel(*sys.argv[2:])
