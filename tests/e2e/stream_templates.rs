//! Streams by template (`stream_name = 'orders.{event_type}'`): each way to publish stores the stream that the template
//! gives, limits apply to it, and events that were published under another name stay there.

mod delivery;

use std::io::Write;

use kit::{Postgres, Refused, Stack, ids, publish_many, types, wait_drained, wait_eq, wait_trouble, wait_until};
use postgres::Client;
use uuid::Uuid;

const DETAIL: &str = "Placeholders are {event_type}, {source}, {subject} and {database}; with a number, as in {subject|16}, a hash of the value from 0 to 15.";
const HINT: &str = "Correct the placeholder, or write {{ and }} for literal braces.";

fn with_template(template: &str) -> Stack {
    let stack = Stack::start();
    set_template(&stack.pg, template);
    stack
}

fn set_template(pg: &Postgres, template: &str) {
    pg.exec(&format!("update outbox.backends set stream_name = '{template}'"));
}

/// Stream and subject of all events, in the order of publishing.
fn rows(pg: &Postgres) -> Vec<(String, String)> {
    let sql = "select coalesce(stream, '-'), coalesce(subject, '-') from
        (select stream, subject, seq from outbox.events union all select stream, subject, seq from outbox.scheduled_events) e order by seq";
    let found = pg.client().query(sql, &[]).expect("events");
    found.iter().map(|row| (row.get(0), row.get(1))).collect()
}

fn copied(client: &mut Client, lines: &str) -> Result<u64, postgres::Error> {
    let mut copy = client.copy_in("copy outbox.events (event_type, source, subject) from stdin")?;
    copy.write_all(lines.as_bytes()).expect("sent");
    copy.finish()
}

/// Each way publishes one event of type `t` and this subject.
const WAYS: [&str; 10] = [
    "select outbox.publish_event('t', 's', subject => 'S')",
    "select outbox.publish_event('t', 's', '{}'::text, subject => 'S', stream => '')",
    "select outbox.publish_event('t', 's', subject => 'S', scheduled_at => '2100-01-01')",
    "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\", \"subject\": \"S\"}]')",
    "insert into outbox.events (event_type, source, subject) values ('t', 's', 'S')",
    "insert into outbox.events (event_type, source, subject, stream) values ('t', 's', 'S', '')",
    "insert into outbox.events (event_type, source, subject) values ('t', 's', 'S') on conflict do nothing returning stream",
    "insert into outbox.scheduled_events (event_type, source, subject, scheduled_at) values ('t', 's', 'S', '2100-01-01')",
    "insert into of_another_make values ('t', 's', 'S')",
    "insert into attached values ('S')",
];

/// Tables whose rows become events.
const TABLES: &str = "
    create table of_another_make (kind text, origin text, subject text);
    create trigger bridge after insert on of_another_make for each row execute function
        outbox.publish_row('event_type', 'kind', 'source', 'origin', 'subject', 'subject');
    create table attached (id text); select outbox.attach_table('attached', source => 's', key => '{id}')";

#[test]
fn each_way_to_publish_goes_into_the_stream_that_the_template_gives() {
    let stack = with_template("{database}/{source}/{{{event_type}}}/{subject}/{subject|16}");
    stack.pg.exec(TABLES);
    let mut client = stack.pg.client();
    for way in WAYS {
        client
            .batch_execute(&way.replace("'S'", "'4711'").replace("\"S\"", "\"4711\""))
            .expect(way);
    }
    copied(&mut client, "t\ts\t4711\n").expect("COPY");
    let stream = |event_type: &str| (format!("postgres/s/{{{event_type}}}/4711/7"), "4711".to_owned());
    let mut expected = vec![stream("t"); WAYS.len()];
    expected[WAYS.len() - 1] = stream("attached.insert");
    expected.push(stream("t"));
    assert_eq!(rows(&stack.pg), expected);
    assert_eq!(stack.redis.wait_entries("postgres/s/{t}/4711/7", 8).len(), 8);
    assert_eq!(
        stack.redis.wait_entries("postgres/s/{attached.insert}/4711/7", 1).len(),
        1
    );
    assert_eq!(stack.redis.xlen("events"), 0);

    // A scheduled event was given its stream when it was published.
    set_template(&stack.pg, "other.{source}");
    stack.pg.exec("update outbox.scheduled_events set scheduled_at = now()");
    // Once that has committed.
    stack.pg.exec("select outbox.wake()");
    assert_eq!(stack.redis.wait_entries("postgres/s/{t}/4711/7", 10).len(), 10);
    // A stream that the publisher names is used unchanged, with its braces.
    stack
        .pg
        .exec("select outbox.publish_event('t', 's', stream => 'own:{source}')");
    stack.redis.wait_entries("own:{source}", 1);
    wait_drained(&stack.pg, "default");
}

#[test]
fn an_event_without_the_parts_of_its_streams_name_is_refused() {
    let stack = with_template("o.{subject|4}");
    stack.pg.exec(TABLES);
    let mut client = stack.pg.client();
    let lacks = Refused::new(
        "22023",
        "event has no subject, which the stream of backend \"default\" is named after",
        "The backend's stream_name is a template with the placeholder {subject}.",
        "Pass it, or name a stream.",
    );
    for way in WAYS {
        for nothing in ["''", "null"] {
            let (sql, json) = (way.replace("'S'", nothing), nothing.replace('\'', "\""));
            assert_eq!(
                Refused::of(client.batch_execute(&sql.replace("\"S\"", &json))),
                lacks,
                "{way}"
            );
        }
    }
    assert_eq!(Refused::of(copied(&mut client, "t\ts\t\\N\n")), lacks, "COPY");
    stack.pg.exec("insert into attached values ('x')");
    stack.pg.exec("select outbox.detach_table('attached'); select outbox.attach_table('attached', key => '{id}', operations => 'truncate')");
    assert_eq!(
        Refused::of(client.batch_execute("truncate attached")),
        lacks,
        "TRUNCATE has no subject"
    );
    stack
        .pg
        .exec("select outbox.publish_event('t', 's', stream => 'named')");
    stack.redis.wait_entries("named", 1);
}

#[test]
fn the_name_that_a_template_gives_is_bounded_like_one_that_a_publisher_gives() {
    let stack = with_template("{subject}");
    stack.pg.exec(
        "update outbox.backends set allowed_streams = '{a*,outbox_relay:*}';
        create role app login; select outbox.grant_publisher('app', null, '{ab*}')",
    );
    stack.pg.exec(TABLES);
    stack.pg.exec("grant insert on of_another_make to app");
    let mut app = stack.pg.client_as("app", "postgres");
    let mut admin = stack.pg.client();
    let with = |way: &str, subject: &str| {
        way.replace("'S'", &format!("'{subject}'"))
            .replace("\"S\"", &format!("\"{subject}\""))
    };
    for way in &WAYS[..9] {
        let refused = Refused::of(admin.batch_execute(&with(way, "b")));
        let said = (refused.code.as_str(), refused.message.as_str());
        assert_eq!(
            said,
            ("42501", "backend \"default\" does not allow the stream \"b\""),
            "{way}"
        );
        let reserved = "outbox_relay:guard:1";
        let refused = Refused::of(admin.batch_execute(&with(way, reserved)));
        assert_eq!(
            (refused.message, refused.hint.as_deref()),
            (
                format!("backend \"default\" does not allow the stream \"{reserved}\""),
                Some("Choose another name.")
            ),
            "{way}"
        );
        if way.contains("scheduled_events") {
            continue;
        }
        let refused = Refused::of(app.batch_execute(&with(way, "ac")));
        let said = (refused.code.as_str(), refused.message.as_str());
        let expected = "permission denied to publish to stream \"ac\" of backend \"default\"";
        assert_eq!(said, ("42501", expected), "{way}");
        app.batch_execute(&with(way, "abc")).expect(way);
    }
    assert!(rows(&stack.pg).iter().all(|(stream, _)| stream == "abc"));

    // Any other characters of a subject are part of the name.
    set_template(&stack.pg, "a{subject}{subject}");
    admin
        .batch_execute("select outbox.publish_event('t', 's', subject => E'\\n*{x} ü')")
        .expect("published");
    stack.redis.wait_entries("a\n*{x} ü\n*{x} ü", 1);
    let long = Refused::of(admin.batch_execute("select outbox.publish_event('t', 's', subject => repeat('ü', 512))"));
    let expected = Refused::new(
        "22023",
        "event would go into a stream of backend \"default\" with too long a name",
        "The backend's stream_name is a template. The name has 1025 characters; at most 1024 are allowed.",
        "Pass a shorter subject, name a stream, or have the template hash the value, as {subject|16} does.",
    );
    assert_eq!(long, expected);
    admin
        .batch_execute("select outbox.publish_event('t', 's', subject => repeat('ü', 511))")
        .expect("published");
}

#[test]
fn an_invalid_template_is_refused_when_the_row_is_written() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    for (wrong, fault) in [
        ("o.{event}", "has the unknown placeholder \"{event}\""),
        ("{}", "has the unknown placeholder \"{}\""),
        ("o.{subject", "has an unclosed \"{\""),
        ("o}", "has an unmatched \"}\""),
        (
            "{subject|0}",
            "has the placeholder \"{subject|0}\", whose number of streams is not between 1 and 65536",
        ),
        (
            "{subject|x}",
            "has the placeholder \"{subject|x}\", whose number of streams is not between 1 and 65536",
        ),
    ] {
        let said = |name: &str| {
            Refused::new(
                "23514",
                &format!("stream_name of backend \"{name}\" {fault}"),
                DETAIL,
                HINT,
            )
        };
        let inserted = client.batch_execute(&format!(
            "insert into outbox.backends (name, stream_name) values ('new', '{wrong}')"
        ));
        assert_eq!(Refused::of(inserted), said("new"));
        let updated = client.batch_execute(&format!("update outbox.backends set stream_name = '{wrong}'"));
        assert_eq!(Refused::of(updated), said("default"));
    }
    let long = Refused::of(client.batch_execute("update outbox.backends set stream_name = repeat('x', 1025)"));
    assert_eq!(
        long.message,
        "stream_name of backend \"default\" is too long: it has 1025 characters, but at most 1024 are allowed"
    );
    // Names of guards are refused as streams.
    for reserved in ["outbox_relay:guard", "outbox_relay:{subject}"] {
        let refused =
            Refused::of(client.batch_execute(&format!("update outbox.backends set stream_name = '{reserved}'")));
        assert_eq!(refused.code, "23514", "{refused:?}");
    }
    // A role that may only write backends.
    stack.pg.exec("create role dba login; grant usage on schema outbox to dba; grant select, insert, update on outbox.backends to dba; grant usage on sequence outbox.backends_number_seq to dba");
    let mut dba = stack.pg.client_as("dba", "postgres");
    dba.batch_execute("insert into outbox.backends (name, stream_name) values ('of dba', '{subject|2}'); update outbox.backends set stream_name = '{{x}}' where name = 'of dba'")
        .expect("written");
    let own: String = stack
        .pg
        .one("select own_stream from outbox.backends where name = 'of dba'");
    assert_eq!(own, "{x}", "braces that are doubled are those of the name");
}

#[test]
fn events_stay_in_the_stream_that_they_were_published_into() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let mut publish = |event_type: &str| -> Uuid {
        let sql = "select outbox.publish_event($1, 's', subject => 'x')";
        client.query_one(sql, &[&event_type]).expect("published").get(0)
    };
    stack
        .pg
        .exec("update outbox.backends set stream_name = 'plain', enabled = false");
    let plain = publish("plain");
    set_template(&stack.pg, "one.{event_type}");
    let one = publish("t");
    set_template(&stack.pg, "two.{event_type}");
    let two = publish("t");
    let shown = |id: Uuid| -> (String, String) {
        let sql = format!(
            "select s.stream, (outbox.preview(s.event_id))[2] from outbox.event_status s where event_id = '{id}'"
        );
        let row = stack.pg.client().query_one(&sql, &[]).expect("shown");
        (row.get(0), row.get(1))
    };
    for (id, stream) in [(plain, "plain"), (one, "one.t"), (two, "two.t")] {
        assert_eq!(shown(id), (stream.to_owned(), stream.to_owned()));
    }
    let own: String = stack.pg.one("select own_stream from outbox.backends");
    assert_eq!(own, "plain", "a template follows upon another");
    stack.pg.exec("update outbox.backends set enabled = true");
    assert_eq!(ids(&stack.redis.wait_entries("plain", 1)), [plain]);
    assert_eq!(ids(&stack.redis.wait_entries("one.t", 1)), [one]);
    assert_eq!(ids(&stack.redis.wait_entries("two.t", 1)), [two]);
    wait_drained(&stack.pg, "default");
    for id in [plain, one, two] {
        let status: String = stack.pg.one(&format!(
            "select status from outbox.event_status where event_id = '{id}'"
        ));
        assert_eq!(status, "published");
    }
    // Replayed, and retried after they have failed.
    assert_eq!(stack.pg.one::<i64>("select outbox.replay('default', '-infinity')"), 3);
    for (stream, id) in [("plain", plain), ("one.t", one), ("two.t", two)] {
        assert_eq!(ids(&stack.redis.wait_entries(stream, 2)), [id, id]);
    }
    stack.pg.exec("update outbox.backends set stream_name = 'last'");
    for stream in ["three.t", "last"] {
        stack.redis.call(&["SET", stream, "no stream"]);
    }
    set_template(&stack.pg, "three.{event_type}");
    stack.pg.exec("select outbox.publish_event('t', 's', max_retries => 1)");
    wait_eq("a failed event", 1, || {
        stack
            .pg
            .one::<i64>("select count(*) from outbox.failed_events where stream = 'three.t'")
    });
    let status: String = stack
        .pg
        .one("select stream from outbox.event_status where status = 'failed'");
    assert_eq!(status, "three.t");
    set_template(&stack.pg, "four.{event_type}");
    stack.redis.call(&["DEL", "three.t"]);
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 1);
    stack.redis.wait_entries("three.t", 1);
}

#[test]
fn the_setting_may_be_a_template_too() {
    let mut stack = Stack::start();
    stack.pg.set("outbox_relay.redis_stream_name", "plain");
    stack.pg.reload();
    publish_many(&mut stack.pg.client(), "default", "", "t", 1);
    stack.redis.wait_entries("plain", 1);
    wait_eq("the setting is noted", "plain".to_owned(), || {
        stack.pg.one("select common_stream from outbox.installation")
    });
    stack.pg.exec("update outbox.backends set enabled = false");
    let waits = publish_many(&mut stack.pg.client(), "default", "", "t", 1);
    stack
        .pg
        .set("outbox_relay.redis_stream_name", "{source}.{event_type|8}");
    stack.pg.reload();
    let mut client = stack.pg.client();
    wait_until("sessions know it", || {
        let stream: Option<String> = client
            .query_one("select outbox.template_stream('t', 's')", &[])
            .expect("asked")
            .get(0);
        stream.is_some()
    });
    let id: Uuid = client
        .query_one("select outbox.publish_event('t1', 's')", &[])
        .expect("published")
        .get(0);
    let part: i32 = stack.pg.one("select outbox.stream_part('t1', 8)");
    let shown = || -> Vec<String> {
        let sql = "select stream from outbox.event_status where status = 'pending' order by created_at";
        let rows = stack.pg.client().query(sql, &[]).expect("shown");
        rows.iter().map(|row| row.get(0)).collect()
    };
    assert_eq!(shown(), ["plain".to_owned(), format!("s.{part}")]);
    stack.pg.exec("update outbox.backends set enabled = true");
    assert_eq!(
        ids(&stack.redis.wait_entries("plain", 2))[1],
        waits[0],
        "what waited stays where it was"
    );
    assert_eq!(ids(&stack.redis.wait_entries(&format!("s.{part}"), 1)), [id]);
    let own: Option<String> = stack.pg.one("select own_stream from outbox.backends");
    assert_eq!(own, None);

    let mut admin = stack.pg.client();
    let refused = Refused::of(admin.batch_execute("alter system set outbox_relay.redis_stream_name = 'x.{nothing}'"));
    assert_eq!(
        refused,
        Refused::new(
            "22023",
            "invalid value for parameter \"outbox_relay.redis_stream_name\": \"x.{nothing}\"",
            &format!("It has the unknown placeholder \"{{nothing}}\". {DETAIL}"),
            HINT
        )
    );
    // A restored file can be invalid all the same. No other stream is used instead.
    drop((admin, client));
    stack.pg.exec("alter system reset outbox_relay.redis_stream_name");
    let file = stack.pg.data_dir().join("postgresql.conf");
    let mut text = std::fs::read_to_string(&file).expect("read");
    text.push_str("\noutbox_relay.redis_stream_name = 'x.{nothing}'\n");
    std::fs::write(&file, text).expect("written");
    stack.pg.restart();
    wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        "stream_name is NULL, and outbox_relay.redis_stream_name has the unknown placeholder \"{nothing}\"",
    );
    let refused = Refused::of(stack.pg.client().query("select outbox.publish_event('t', 's')", &[]));
    assert_eq!(
        (refused.code.as_str(), refused.message.as_str()),
        (
            "55000",
            "stream_name of backend \"default\" has the unknown placeholder \"{nothing}\""
        )
    );
    set_template(&stack.pg, "own.{source}");
    stack.pg.exec("select outbox.publish_event('t', 's')");
    stack.redis.wait_entries("own.s", 1);
}

#[test]
fn an_invalid_template_in_the_table_sends_nothing_elsewhere() {
    let stack = Stack::start();
    stack.pg.exec(
        "alter table outbox.backends disable trigger backend_stream; update outbox.backends set stream_name = 'o.{'",
    );
    let refused = Refused::of(stack.pg.client().query("select outbox.publish_event('t', 's')", &[]));
    assert_eq!(
        refused,
        Refused::new(
            "55000",
            "stream_name of backend \"default\" has an unclosed \"{\"",
            DETAIL,
            "Name a stream, or have the administrator correct outbox.backends.stream_name or outbox_relay.redis_stream_name."
        )
    );
    stack
        .pg
        .exec("select outbox.publish_event('t', 's', stream => 'named')");
    wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        "stream_name has an unclosed \"{\"",
    );
    // Meanwhile the worker enables the trigger again.
    set_template(&stack.pg, "o.{source}");
    stack.redis.wait_entries("named", 1);
}

#[test]
fn a_dump_carries_templates_and_the_streams_of_events() {
    let stack = Stack::start();
    stack.pg.exec(
        "update outbox.backends set enabled = false, stream_name = 'plain'; select outbox.publish_event('a', 's')",
    );
    set_template(&stack.pg, "o.{event_type}");
    stack.pg.exec("select outbox.publish_event('b', 's'); select outbox.publish_event('c', 's', scheduled_at => now() + interval '1 s')");
    stack
        .pg
        .exec("insert into outbox.backends (name, stream_name) values ('other', '{subject|16}')");
    let target = Postgres::start();
    target.restore("postgres", &stack.pg.pg_dump("postgres"));
    let streams = "select string_agg(stream_name || ' ' || own_stream, ', ' order by number) from outbox.backends";
    assert_eq!(
        target.one::<String>(streams),
        "o.{event_type} plain, {subject|16} events"
    );
    target.exec("update outbox.backends set enabled = true");
    for (stream, event_type) in [("plain", "a"), ("o.b", "b"), ("o.c", "c")] {
        assert_eq!(types(&stack.redis.wait_entries(stream, 1)), [event_type]);
    }
    target.exec("select outbox.publish_event('d', 's')");
    assert_eq!(types(&stack.redis.wait_entries("o.d", 1)), ["d"]);
}

#[test]
fn views_and_test_backend_work_for_backends_with_a_template() {
    let stack = with_template("o.{subject}");
    let rules = [
        "on",
        ">word",
        "~o.*",
        "~outbox_relay:*",
        "+@all",
        "-@dangerous",
        "+info",
        "+client|setname",
    ];
    stack
        .redis
        .call(&[&["ACL", "SETUSER", "relay"], rules.as_slice()].concat());
    stack.pg.exec("update outbox.backends set username = 'relay', trim = 'read', max_len = 1000; select outbox.set_backend_password('default', 'word')");
    let tested = || -> (bool, Option<String>) {
        let row = stack
            .pg
            .client()
            .query_one("select ok, error from outbox.test_backend('default')", &[])
            .expect("tested");
        (row.get(0), row.get(1))
    };
    wait_eq("a test without a known stream", (true, None), tested);
    stack
        .pg
        .exec("select outbox.publish_event('t', 's', subject => n::text) from generate_series(1, 3) n");
    stack.redis.wait_entries("o.3", 1);
    stack.redis.call(&["XGROUP", "CREATE", "o.2", "g", "0"]);
    wait_eq("a test of a known stream", (true, None), tested);
    wait_eq("streams", "o.2 g".to_owned(), || {
        stack.pg.one("select coalesce(string_agg(stream || ' ' || coalesce(consumer_group, '-'), ', ' order by stream), '') from outbox.consumers")
    });
    let health = "select string_agg(\"check\" || ': ' || detail, '; ') from outbox.health() where status <> 'ok' and \"check\" in ('consumers', 'backend default')";
    wait_eq("complaints", None, || stack.pg.one::<Option<String>>(health));
    stack
        .redis
        .call(&["ACL", "SETUSER", "relay", "resetkeys", "~outbox_relay:*"]);
    wait_until("a test that misses rights", || {
        tested().1.is_some_and(|error| error.contains("NOPERM"))
    });
}

#[test]
fn rows_of_django_broadcaster_go_by_the_template() {
    let stack = with_template("o.{event_type}");
    stack.pg.exec(include_str!("../django_broadcaster/schema.sql"));
    let row = |id: u32, event_type: &str, status: &str| {
        format!(
            "insert into outbox_events (id, spec_version, event_type, source, subject, data_content_type, data_schema, status, created_at, updated_at, scheduled_at, retry_count, max_retries, last_error, publisher_backend, publisher_config)
            values ('00000000-0000-4000-8000-00000000000{id}', '1.0', '{event_type}', 's', '', 'application/json', '', '{status}', now(), now(), now(), 1, 3, 'x', '', '{{}}');"
        )
    };
    stack
        .pg
        .exec(&(row(1, "a", "pending") + &row(2, "b", "retry") + &row(3, "c", "failed")));
    stack
        .pg
        .exec("select count(*) from outbox.import_django_broadcaster('outbox_events', false)");
    for (stream, event_type) in [("o.a", "a"), ("o.b", "b")] {
        assert_eq!(types(&stack.redis.wait_entries(stream, 1)), [event_type]);
    }
    stack.pg.exec("select outbox.retry_failed()");
    assert_eq!(types(&stack.redis.wait_entries("o.c", 1)), ["c"]);
    stack
        .pg
        .exec("select outbox.bridge_django_broadcaster('outbox_events')");
    stack.pg.exec(&row(4, "d", "pending"));
    assert_eq!(types(&stack.redis.wait_entries("o.d", 1)), ["d"]);
    set_template(&stack.pg, "o.{subject}");
    let refused: i64 = {
        stack.pg.exec("select outbox.end_bridge('outbox_events')");
        stack.pg.exec(&row(5, "e", "pending"));
        stack.pg.one("select count(*) from outbox.import_django_broadcaster('outbox_events') where becomes = 'refused' and why like 'event has no subject, which %'")
    };
    assert_eq!(refused, 1);
}
