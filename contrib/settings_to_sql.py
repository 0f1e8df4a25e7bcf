#!/usr/bin/env python3
"""Prints the settings of another outbox as SQL for outbox_relay, to be reviewed and then run with psql.

    python3 contrib/settings_to_sql.py django mysite.settings     OUTBOX_PUBLISHERS, OUTBOX_WORKER and OUTBOX_RETENTION of
                                                                  a module, a .py file, a .json file, or - (JSON)
    python3 contrib/settings_to_sql.py sequin sequin.yaml         sinks of type redis_stream of a .yaml or .json file, or -

Comments name the settings that have no equivalent. Passwords are omitted, and a comment tells how to set them; with
--passwords they are printed. Needs only Python 3.9. Without PyYAML, sequin.yaml may use only the plain parts of YAML.
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import runpy
import shlex
import sys


class Unusable(Exception):
    """The settings cannot be read."""


def literal(value):
    """A value as an SQL literal."""
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if "\0" in str(value):
        raise Unusable("a text contains a NUL character")
    return "'" + str(value).replace("'", "''") + "'"


def mapping(value, what):
    """A dictionary. None counts as an empty one."""
    if value is not None and not isinstance(value, dict):
        raise Unusable(f"{what} is not a dictionary")
    return value or {}


def host(script, value):
    """A host. Of a URL, the parts belong into columns of their own."""
    if value and "://" in str(value):
        script.say(f"CHECK: the host {value!r} is a URL. Set host, port, db, username and tls of the backend from it.")
    return value or None


class Script:
    """The SQL that is printed."""

    def __init__(self):
        self.lines = []

    def say(self, text=""):
        """A comment. Each line of the text becomes a line of it, so that no text can leave the comment."""
        for line in re.split(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+", text):
            self.lines.append(f"-- {line}".rstrip())

    def sql(self, text):
        self.lines.append(text)

    def gap(self):
        if self.lines and self.lines[-1]:
            self.lines.append("")

    def connect(self, database):
        """A command of psql, which ends with its line."""
        if re.search(r"[\0\r\n]", database):
            raise Unusable("the name of a database contains a line break")
        self.sql(f"\\connect {quoted_name(database)}")

    def setting(self, name, value):
        self.sql(f"alter system set outbox_relay.{name} = {literal(value)};")

    def backend(self, name, columns, password, shows_passwords):
        """A row of outbox.backends, and a separate statement for its password. False if there cannot be one."""
        if not 1 <= len(name) <= 63:
            self.say(f"NOT CONVERTED: the name {name!r} does not have 1 to 63 characters.")
            return False
        given = {"name": name, **{key: value for key, value in columns.items() if value is not None}}
        names = ", ".join(given)
        values = ", ".join(literal(value) for value in given.values())
        changes = ", ".join(f"{key} = excluded.{key}" for key in given if key != "name") or "name = excluded.name"
        self.sql(f"insert into outbox.backends ({names})\nvalues ({values})\non conflict (name) do update set {changes};")
        if password in (None, ""):
            pass
        elif shows_passwords:
            self.sql(f"select outbox.set_backend_password({literal(name)}, {literal(password)});")
        else:
            self.say("It has a password. After this script, set it by this command, which shows it in no log and no history:")
            self.say(f"    psql -v backend={shlex.quote(name)} -f contrib/set_backend_password.sql")
        return True

    def print(self):
        print("\n".join(self.lines))


# --- django-broadcaster

REDIS_BACKENDS = ("django_broadcaster.backends.RedisStreamBackend", "django_dispatch.backends.RedisStreamBackend")
SETTINGS = ("OUTBOX_PUBLISHERS", "OUTBOX_WORKER", "OUTBOX_RETENTION")
OPTIONS = ("host", "port", "db", "password", "stream_name", "max_len", "connect_timeout", "socket_timeout")


def plain_name(stream):
    """Doubles the braces of a name, because single ones are placeholders in outbox_relay."""
    return str(stream).replace("{", "{{").replace("}", "}}") if stream else None


def django_settings(source):
    """The three settings of a module, a file, or standard input."""
    if source == "-" or source.endswith(".json"):
        given = json.loads(sys.stdin.read() if source == "-" else pathlib.Path(source).read_text(encoding="utf-8"))
    else:
        given = settings_module(source)
    if not isinstance(given, dict):
        raise Unusable("expected an object with the keys " + ", ".join(SETTINGS))
    found = {name: given.get(name) or {} for name in SETTINGS}
    if not any(found.values()):
        raise Unusable(f"{source} has none of {', '.join(SETTINGS)}")
    for name, value in found.items():
        if not isinstance(value, dict):
            raise Unusable(f"{name} is not a dictionary")
    return found


def settings_module(source):
    """The names of a module or a .py file. Whatever its code raises is reported in one line."""
    try:
        if source.endswith(".py"):
            return runpy.run_path(source)
        sys.path.insert(0, os.getcwd())
        return vars(importlib.import_module(source))
    except Exception as error:  # pylint: disable=broad-exception-caught
        raise Unusable(" ".join(f"{source} cannot be loaded: {type(error).__name__}: {error}".split())) from error


def whole_number(script, name, value, lowest, highest):
    """A number within bounds; otherwise None, and a comment."""
    if value is None:
        return None
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or not lowest <= number <= highest:
        script.say(f"CHECK: {name} is {value!r}, but must be from {lowest} to {highest} here. The default is kept.")
        return None
    return number


def seconds(script, name, value):
    if value is None:
        script.say(f"{name} is None, which means no limit. Here there is always a limit, and the default is kept.")
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 3600:
        script.say(f"CHECK: {name} is {value!r}, but must be above 0 and at most 3600 seconds here. The default is kept.")
        return None
    return f"{value:g} s"


def django_backend(script, name, config, shows_passwords):
    """False: it is not converted."""
    script.gap()
    script.say(f"OUTBOX_PUBLISHERS[{name!r}]")
    config = config if isinstance(config, dict) else {}
    if config.get("BACKEND") not in REDIS_BACKENDS:
        script.say(f"NOT CONVERTED: its BACKEND is {config.get('BACKEND')!r}. outbox_relay writes only to Redis Streams.")
        script.say(f"If that is a RedisStreamBackend of your own, name {REDIS_BACKENDS[0]} instead, and convert again.")
        return False
    label = f"OUTBOX_PUBLISHERS[{name!r}]['OPTIONS']"
    options = mapping(config.get("OPTIONS"), label)
    for key in options:
        if key not in OPTIONS:
            script.say(f"{label}[{key!r}] is not converted: django-broadcaster ignored it.")
    max_len = options.get("max_len", 10000)
    if max_len is None:
        script.say("max_len None means that nothing is trimmed. Here 0 means this.")
    elif max_len == 0:
        script.say("CHECK: with max_len 0, django-broadcaster removes every entry. Here 0 means that nothing is trimmed.")
    columns = {
        "host": host(script, options.get("host", "localhost")),
        "port": whole_number(script, f"{label}['port']", options.get("port", 6379), 1, 65535),
        "db": whole_number(script, f"{label}['db']", options.get("db", 0), 0, 65535),
        "stream_name": plain_name(options.get("stream_name", "events")),
        "max_len": 0 if max_len is None else whole_number(script, f"{label}['max_len']", max_len, 0, 2**63 - 1),
        "connect_timeout": seconds(script, f"{label}['connect_timeout']", options.get("connect_timeout", 5)),
        "socket_timeout": seconds(script, f"{label}['socket_timeout']", options.get("socket_timeout", 5)),
    }
    return script.backend(str(name), columns, options.get("password"), shows_passwords)


def days(value):
    """A retention in days. None keeps everything."""
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 10000:
        raise ValueError
    return f"{value}d" if isinstance(value, int) else f"{round(value * 1440)}min"


def switch(value):
    return "on" if value else "off"


def between(lowest, highest):
    def number(value):
        if isinstance(value, bool) or not lowest <= int(value) <= highest:
            raise ValueError
        return int(value)

    return number


WORKER = {
    "BATCH_SIZE": ("batch_size", between(1, 10000), None),
    "SLEEP_TIME": ("poll_interval", lambda value: f"{max(float(value), 0.1):g}s", "This is only a fallback: commits wake the worker."),
    "MAX_RETRIES": ("max_retries", between(1, 1000), "The number of attempts for an event that Redis refuses. Outages of Redis do not count."),
    "RETRY_BACKOFF": ("retry_backoff", switch, None),
}
RETENTION = {
    "CLEANUP_PUBLISHED": ("cleanup_published", switch, None),
    "PUBLISHED_RETENTION_DAYS": ("published_retention", days, "Counted from the time when an event was sent."),
    "FAILED_RETENTION_DAYS": ("failed_retention", days, "Counted from the time when an event failed."),
}


def django_group(script, group, given, known):
    if given:
        script.gap()
        script.say(group)
    for key, value in given.items():
        if key not in known:
            script.say(f"{group}[{key!r}] has no equivalent.")
            continue
        name, convert, remark = known[key]
        try:
            converted = convert(value)
        except (TypeError, ValueError):
            script.say(f"CHECK: {group}[{key!r}] is {value!r}, which is not a valid value of outbox_relay.{name}. The default is kept.")
            continue
        if remark:
            script.say(remark)
        script.setting(name, converted)


def django(source, shows_passwords):
    given = django_settings(source)
    script = Script()
    script.say("Settings of django-broadcaster for outbox_relay. Review them, then run them with psql as a superuser, in the")
    script.say("database that has the extension. Do not run them in one transaction: ALTER SYSTEM cannot run in one.")
    publishers = given["OUTBOX_PUBLISHERS"]
    converted = [name for name, config in publishers.items() if django_backend(script, name, config, shows_passwords)]
    if converted:
        first = str(converted[0])
        script.gap()
        script.say("Events that name no backend go to the first one, as with django-broadcaster.")
        script.setting("default_backend", first)
        if "default" not in converted:
            script.say("The backend 'default', which CREATE EXTENSION has made, is not needed:")
            script.sql("delete from outbox.backends where name = 'default';")
    django_group(script, "OUTBOX_WORKER", given["OUTBOX_WORKER"], WORKER)
    django_group(script, "OUTBOX_RETENTION", given["OUTBOX_RETENTION"], RETENTION)
    script.gap()
    script.sql("select pg_reload_conf();")
    script.print()


# --- Sequin

def plain_yaml(text):
    """The parts of YAML that sequin.yaml uses: mappings, lists, scalars, and literal blocks. Anything else is an error."""
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith(("---", "%")) and not lines:
            continue
        lines.append((number, len(line) - len(line.lstrip(" ")), line.strip()))
    at = 0

    def fail(number, what):
        raise Unusable(f"line {number}: {what}. Install PyYAML (pip install pyyaml), or pass the file as JSON")

    def skip():
        nonlocal at
        while at < len(lines) and (not lines[at][2] or lines[at][2].startswith("#")):
            at += 1

    def scalar(number, text):
        text = text.strip()
        if text.startswith('"'):
            match = re.fullmatch(r'("(?:[^"\\]|\\.)*")\s*(?:#.*)?', text)
            return json.loads(match[1]) if match else fail(number, "a quoted text does not end on its line")
        if text.startswith("'"):
            match = re.fullmatch(r"'((?:[^']|'')*)'\s*(?:#.*)?", text)
            return match[1].replace("''", "'") if match else fail(number, "a quoted text does not end on its line")
        text = re.sub(r"(^|\s)#.*$", "", text).strip()
        if text[:1] in ("[", "{"):
            return flow(number, text)
        if text[:1] in ("&", "*", "!", "@", "`", ">", "|", "%", "?") or text == "-" or text.startswith("- "):
            fail(number, f"{text[0]} is not supported here")
        if re.search(r":(\s|$)", text):
            fail(number, "this part of YAML is not supported")
        if text in ("", "null", "~"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if re.fullmatch(r"[-+]?(0|[1-9]\d*)", text):
            return int(text)
        return text

    def flow(number, text):
        """A list or a mapping on one line."""
        plain = r"[^\[\]{},:\s](?:[^\[\]{},:]|:(?=\S))*"
        tokens = re.findall(r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\'|[\[\]{},]|:(?=[\s\[{]|$)|' + plain, text)
        if "".join(token.replace(" ", "") for token in tokens) != text.replace(" ", ""):
            fail(number, "this part of YAML is not supported")

        def item():
            if not tokens:
                fail(number, "a list or mapping does not end on its line")
            token = tokens.pop(0)
            if token not in ("[", "{"):
                return scalar(number, token)
            result = [] if token == "[" else {}
            end = "]" if token == "[" else "}"
            while tokens and tokens[0] != end:
                found = item()
                if isinstance(result, dict):
                    if not tokens or tokens.pop(0) != ":":
                        fail(number, "a key has no value")
                    result[found] = item()
                else:
                    result.append(found)
                if tokens and tokens[0] == ",":
                    tokens.pop(0)
            if not tokens:
                fail(number, "a list or mapping does not end on its line")
            tokens.pop(0)
            return result

        result = item()
        return result if not tokens else fail(number, "this part of YAML is not supported")

    def block(indent):
        """The text of `key: |`."""
        nonlocal at
        taken = []
        while at < len(lines) and (not lines[at][2] or lines[at][1] > indent):
            taken.append((lines[at][1], lines[at][2]))
            at += 1
        first = next((i for i, text in taken if text), 0)
        return "\n".join(" " * max(i - first, 0) + text for i, text in taken).rstrip()

    def value(number, rest, indent):
        nonlocal at
        if re.fullmatch(r"\|[-+]?\s*(#.*)?", rest):
            return block(indent)
        if re.sub(r"(^|\s)#.*$", "", rest).strip():
            return scalar(number, rest)
        skip()
        if at < len(lines):
            deeper = lines[at][1] > indent
            # A list may stand at the indent of its key.
            if deeper or (lines[at][1] == indent and lines[at][2].startswith("- ")):
                return node(lines[at][1])
        return None

    def node(indent):
        nonlocal at
        result = None
        while True:
            skip()
            if at >= len(lines) or lines[at][1] < indent:
                return result
            number, here, text = lines[at]
            if here > indent:
                fail(number, "unexpected indentation")
            if text == "-" or text.startswith("- "):
                if result is None:
                    result = []
                if not isinstance(result, list):
                    return result
                rest = text[1:].lstrip()
                inner = here + len(text) - len(rest)
                at += 1
                if re.match(r"[^\s\"'\[{][^\"]*?:(\s|$)|\"[^\"]*\":(\s|$)", rest):
                    at -= 1
                    lines[at] = (number, inner, rest)
                    result.append(node(inner))
                else:
                    result.append(value(number, rest, here))
                continue
            match = re.match(r"(\"[^\"]*\"|'[^']*'|[^\s#:\"'][^:]*?)\s*:(?:\s+(.*))?$", text)
            if not match:
                fail(number, "this part of YAML is not supported")
            result = {} if result is None else result
            if not isinstance(result, dict):
                return result
            at += 1
            result[match[1].strip("\"'")] = value(number, match[2] or "", here)

    skip()
    result = node(lines[at][1]) if at < len(lines) else {}
    skip()
    return result if at >= len(lines) else fail(lines[at][0], "this part of YAML is not supported")


def sequin_config(source):
    text = sys.stdin.read() if source == "-" else pathlib.Path(source).read_text(encoding="utf-8")
    if source.endswith(".json"):
        config = json.loads(text)
    else:
        try:
            import yaml  # pylint: disable=import-outside-toplevel
        except ImportError:
            config = plain_yaml(text)
        else:
            try:
                config = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise Unusable(" ".join(str(error).split())) from error
    if not isinstance(config, dict) or not isinstance(config.get("sinks"), list):
        raise Unusable(f"{source} has no sinks")
    return config


def substituted(value):
    """Replaces ${NAME}, ${NAME:-default} and ${NAME-default}, whose default may have such a name too, as Sequin does. A
    variable that is not set, and has no default, stays as it is written."""
    if isinstance(value, dict):
        return {key: substituted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [substituted(inner) for inner in value]
    if not isinstance(value, str):
        return value

    def known(match):
        found = os.environ.get(match[1])
        if match[3] is None:
            return match[0] if found is None else found
        return substituted(match[3]) if found is None or (match[2] and not found) else found

    return re.sub(r"\$\{(\w+)(?:(:)?-((?:[^{}]|\{[^{}]*\})*))?\}", known, value)


def quoted_name(name):
    """A name in a condition. A plain "user" there would be the role."""
    return '"' + name.replace('"', '""') + '"'


def table_name(name):
    return ".".join(part if re.fullmatch(r"[a-z_][a-z0-9_$]*", part) else quoted_name(part) for part in name.split("."))


def comparison(left, operator, wanted):
    """A comparison as Sequin makes it, where a missing value differs from each value; None if there is no equivalent."""
    if operator in ("is null", "is not null"):
        return f"{left} {operator}"
    if operator in ("in", "not in") and isinstance(wanted, list) and wanted and None not in wanted:
        found = f"{left} in ({', '.join(literal(item) for item in wanted)})"
        return found if operator == "in" else f"({found}) is not true"
    if operator in ("=", "!=", ">", ">=", "<", "<=") and not isinstance(wanted, (list, dict, type(None))):
        return f"{left} {'is distinct from' if operator == '!=' else operator} {literal(wanted)}"
    return None


def filtered(given):
    """A filter on a column or on a part of its JSON, as SQL; None if it has no equivalent."""
    column = quoted_name(str(given.get("column_name") or ""))
    operator = str(given.get("operator", "=")).lower()
    wanted = given.get("comparison_value")
    if column == '""':
        return None
    if not given.get("field_path"):
        return comparison(column, operator, wanted)
    path = f"array[{', '.join(literal(part) for part in str(given['field_path']).split('.'))}]"
    text = f"{column} #>> {path}"
    if given.get("field_type") == "number" and operator not in ("is null", "is not null"):
        # A value that is not a number must not fail the application's statement.
        found = comparison(f"({text})::numeric", operator, wanted)
        otherwise = "true" if operator in ("!=", "not in") else "false"
        return found and f"case when jsonb_typeof({column} #> {path}) = 'number' then {found} else {otherwise} end"
    return comparison(text, operator, ("true" if wanted else "false") if isinstance(wanted, bool) else wanted)


def condition(script, filters):
    """Filters on columns, as a condition. If one of them has no equivalent: None, and a comment."""
    parts = []
    for given in filters:
        part = filtered(mapping(given, "a filter"))
        if part is None:
            words = json.dumps(given, ensure_ascii=False, default=str)
            script.say(f"CHECK: the filter {words} is not converted: ALL rows become events.")
            return None
        parts.append(part)
    return " and ".join(parts) or None


def sequin_tables(script, sink):
    """The tables that a sink names."""
    source = mapping(sink.get("source"), "source")
    tables = list(source.get("include_tables") or [])
    if sink.get("table"):
        tables.insert(0, sink["table"])
    if not tables:
        script.say("CHECK: it names no tables, so it takes all tables of its publication. Call outbox.attach_table() for each of them.")
    for key in ("include_schemas", "exclude_schemas", "exclude_tables"):
        if source.get(key):
            script.say(f"CHECK: its {key} {source[key]!r} has no equivalent: each table is attached by a call of its own.")
    return tables


DESTINATION = ("type", "host", "port", "stream_key", "database", "tls", "username", "password")


def sequin_destination(script, destination):
    """The columns of a backend. What is missing, or has no equivalent, is named."""
    unset = sorted(set(re.findall(r"\$\{(\w+)", json.dumps(destination, default=str))))
    if unset:
        script.say(f"CHECK: these environment variables are not set: {', '.join(unset)}. Set them, and convert again.")
    for key in destination:
        if key not in DESTINATION:
            script.say(f"CHECK: its destination's {key!r} is not converted.")
    if not destination.get("host"):
        script.say("CHECK: its destination has no host: outbox_relay.redis_host is used.")
    if not destination.get("stream_key"):
        script.say("CHECK: its destination has no stream_key: events go to the stream outbox_relay.redis_stream_name.")
    tls = str(destination.get("tls") or "").lower()
    if tls not in ("true", "1", "false", "0", ""):
        script.say(f"CHECK: tls is {destination['tls']!r}, but must be true or false. It is taken for true.")
    return {
        "host": host(script, destination.get("host")),
        "port": whole_number(script, "port", destination.get("port", 6379), 1, 65535),
        "db": whole_number(script, "database", destination.get("database", 0), 0, 65535),
        "username": destination.get("username") or None,
        "tls": None if tls in ("false", "0", "") else True,
        "stream_name": plain_name(destination.get("stream_key")),
        # Sequin does not trim.
        "max_len": 0,
    }


def sequin_sink(script, sink, attached, shows_passwords):
    name = str(sink.get("name", ""))
    destination = mapping(sink.get("destination"), "destination")
    script.gap()
    script.say(f"Sink {name!r} of the database {sink.get('database')!r}")
    if destination.get("type") not in ("redis_stream", "redis"):
        script.say(f"NOT CONVERTED: its destination is {destination.get('type')!r}. outbox_relay writes only to Redis Streams.")
        return
    columns = {"enabled": False if sink.get("status") == "disabled" else None, **sequin_destination(script, destination)}
    is_there = script.backend(name, columns, destination.get("password"), shows_passwords)
    if not is_there:
        return
    operations = ",".join(action for action in ("insert", "update", "delete") if action in (sink.get("actions") or [action]))
    for key in ("transform", "filter", "routing", "enrichment"):
        if sink.get(key) not in (None, "none"):
            script.say(f"CHECK: its {key} {sink[key]!r} is a function of Sequin and is not converted.")
    for key in sorted(set(sink) - {"name", "database", "source", "table", "tables", "status", "actions", "destination", "filters",
                                   "transform", "filter", "routing", "enrichment", "batch_size", "group_column_names", "message_grouping"}):
        script.say(f"Its {key!r} has no equivalent.")
    where = condition(script, sink.get("filters") or [])
    for table in sequin_tables(script, sink):
        if attached.setdefault(str(table), name) != name:
            script.say(f"CHECK: {table!r} was attached for the sink {attached[str(table)]!r} above. A table has only one backend, so this call replaces that one.")
        arguments = [literal(table_name(str(table))), f"backend => {literal(name)}", f"operations => {literal(operations)}", "payload => 'both'"]
        if where:
            arguments.append(f"condition => {literal(where)}")
        script.sql(f"select outbox.attach_table({', '.join(arguments)});")


def sequin(source, shows_passwords):
    config = substituted(sequin_config(source))
    script = Script()
    script.say("Sinks of Sequin for outbox_relay. Review them, then run them with psql as a superuser, in the database of their")
    script.say("tables. Entries do not have Sequin's fields (record, changes, action, metadata): consumers find the row in the")
    script.say("data of cloud_event. Remove each table from Sequin's publication in the same transaction; otherwise a change may be")
    script.say("sent by both, or by neither.")
    sinks_of = {}
    for sink in config["sinks"]:
        sinks_of.setdefault(mapping(sink, "a sink").get("database"), []).append(sink)
    names = {known.get("name"): known.get("database") for known in config.get("databases") or [] if isinstance(known, dict)}
    for database, sinks in sinks_of.items():
        if len(sinks_of) > 1:
            script.gap()
            script.say(f"CHECK: the database {database!r} of Sequin must be on this server, and have the extension.")
            script.connect(str(names.get(database) or database))
        attached = {}
        for sink in sinks:
            sequin_sink(script, sink, attached, shows_passwords)
    for key in ("change_retentions", "functions", "transforms", "http_endpoints"):
        if config.get(key):
            script.gap()
            script.say(f"The section {key!r} has no equivalent.")
    script.print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("django", "sequin"))
    parser.add_argument("source", help="a module, a file, or - for standard input")
    parser.add_argument("--passwords", action="store_true", help="print the passwords, too")
    arguments = parser.parse_args()
    try:
        {"django": django, "sequin": sequin}[arguments.kind](arguments.source, arguments.passwords)
    except (Unusable, ImportError, OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()
