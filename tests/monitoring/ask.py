"""Sends the queries of the dashboard and of the alerts to a Prometheus. scripts/test-monitoring runs this.

    ask.py URL until QUERY                          waits until a query has a result
    ask.py URL same-series                          all exporters must have the same metrics with the same labels
    ask.py URL panels DASHBOARD INSTANCE            every panel and every variable must have data
    ask.py URL draw DASHBOARD INSTANCE SVG          draws the panels
    ask.py URL alerts [--also] [--in SECONDS] NAME...   these alerts must have a result, and others none (with --also, others
                                                    may have one). --in: their result in so many seconds, if nothing changes
"""

import json
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import draw

URL = sys.argv[1]
WAIT_SECONDS = 60
PREFIX = "OutboxRelay"


def call(path, **args):
    try:
        with urllib.request.urlopen(f"{URL}/api/v1/{path}?{urllib.parse.urlencode(args, doseq=True)}", timeout=30) as reply:
            return json.load(reply)["data"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{args or path}: {error.read().decode()}")


def query(expression, ahead=0):
    return call("query", query=expression, time=time.time() + ahead)["result"]


def wait_until(what, found):
    """Repeats `found` until it returns nothing. What it returns is still wrong."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            wrong = found()
        except urllib.error.URLError as error:
            wrong = error
        if not wrong:
            print(f"ok: {what}")
            return
        if time.monotonic() > end:
            raise SystemExit(f"{what}: {wrong}")
        time.sleep(0.5)


def same_series():
    def series():
        by_instance = {}
        for one in query('{__name__=~"outbox_relay_.+"}'):
            labels = one["metric"]
            key = tuple((k, labels[k]) for k in ("__name__", "database", "backend", "state", "check", "le") if k in labels)
            assert not {"metric", "col"} & labels.keys(), labels
            by_instance.setdefault(labels["instance"], set()).add(key)
        return by_instance

    def differences():
        found = list(series().values())
        if len(found) != 2:
            return f"{len(found)} exporters answer"
        return found[0] ^ found[1]

    wait_until("all exporters have the same series", differences)
    print("    " + ", ".join(sorted({key[0][1] for keys in series().values() for key in keys})))


def alerts(names, also, ahead):
    rules = {rule["name"]: rule for group in call("rules")["groups"] for rule in group["rules"]}
    assert rules, "Prometheus has no rules"
    expected = {PREFIX + name for name in names}
    assert expected <= rules.keys(), expected - rules.keys()

    def wrong():
        states = {rule["name"]: rule["health"] for group in call("rules")["groups"] for rule in group["rules"]}
        broken = [f"{name} is {health}" for name, health in states.items() if health == "err"]
        for name, rule in rules.items():
            # The test does not wait until an event is so old.
            expression = re.sub(r"^(outbox_relay_oldest_pending_seconds > )\d+$", r"\1 1", rule["query"])
            found = query(expression, ahead)
            if name in expected and not found:
                broken.append(f"{name} has no result")
            if name not in expected and found and not also:
                broken.append(f"{name} has the result {found}")
        return broken

    wait_until(f"alerts with a result, of {len(rules)}: {', '.join(names) or 'none'}", wrong)


def filled(expression, instance):
    """A query with the initial values of Grafana's variables."""
    for name, value in {"$instance": re.escape(instance), "$database": ".*", "$backend": ".*", "$__rate_interval": "10s"}.items():
        expression = expression.replace(name, value.replace("\\", "\\\\"))
    assert "$" not in expression, expression
    return expression


def panels_of(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def panels(path, instance):
    dashboard = panels_of(path)
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        match, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
        values = call(f"label/{label}/values", **{"match[]": filled(match, instance)})
        assert values, f"variable {variable['name']} has no values"
        print(f"ok: variable {variable['name']}: {', '.join(values)}")
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)), "a panel's id is used twice"
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = filled(target["expr"], instance)
            wait_until(f"panel \"{panel['title']}\" {target['refId']}", lambda: not query(expression) and f"no data: {expression}")


def draw_panels(path, instance, svg):
    end = time.time()

    def answer(target):
        expression = filled(target["expr"], instance)
        if target["instant"]:
            found = [(one["metric"], [one["value"]]) for one in query(expression)]
        else:
            found = [(one["metric"], one["values"])
                     for one in call("query_range", query=expression, start=end - 60, end=end, step=60 / draw.STEPS)["result"]]
        return [(labels, [(float(t), float(v)) for t, v in values]) for labels, values in found]

    with open(svg, "w", encoding="utf-8") as file:
        file.write(draw.dashboard(panels_of(path), answer, end - 60, end))
    print(f"drawn: {svg}")


def main(command, *args):
    if command == "until":
        wait_until(args[0], lambda: not query(args[0]) and "no result")
    elif command == "same-series":
        same_series()
    elif command == "panels":
        panels(*args)
    elif command == "draw":
        draw_panels(*args)
    elif command == "alerts":
        rest, also, ahead = list(args), False, 0
        while rest and rest[0].startswith("--"):
            option = rest.pop(0)
            if option == "--also":
                also = True
            elif option == "--in":
                ahead = int(rest.pop(0))
            else:
                raise SystemExit(__doc__)
        alerts(rest, also, ahead)
    else:
        raise SystemExit(__doc__)


main(*sys.argv[2:])
