//! What a newcomer tries first and Postgres alone would only call "does not exist", or would do nothing about: the
//! error says what to pass instead.

use kit::{Postgres, Refused};

fn start() -> Postgres {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    pg.extension();
    pg.exec("create role publisher login; select outbox.grant_publisher('publisher')");
    pg
}

/// Which unit a number has, or when an interval begins, is not guessed.
#[test]
fn a_scheduled_at_that_is_no_time_is_refused_in_words() {
    let pg = start();
    let mut client = pg.client_as("publisher", "postgres");
    let since_1970 = "Convert it: to_timestamp() takes seconds since 1970.";
    for (value, kind, hint) in [
        (
            "interval '5 min'",
            "interval",
            "Add it to a time: now() + interval '5 minutes'.",
        ),
        ("time '12:00'", "time without time zone", "Pass a date and a time."),
        ("timetz '12:00+00'", "time with time zone", "Pass a date and a time."),
        ("60::smallint", "smallint", since_1970),
        ("1764500000", "integer", since_1970),
        ("1764500000000", "bigint", since_1970),
        ("1764500000.5", "numeric", since_1970),
        ("1764500000::real", "real", since_1970),
        ("1764500000::float8", "double precision", since_1970),
    ] {
        let expected = Refused::new(
            "42804",
            &format!("a value of type {kind} is not a point in time"),
            "scheduled_at is the time before which the event is not sent.",
            hint,
        );
        for call in [
            format!("select outbox.publish_event('t', 's', scheduled_at => {value})"),
            format!("select outbox.publish_event('t', 's', '{{}}'::json, 7, 'default', {value})"),
            format!(
                "select outbox.publish_event('t'::text, 's'::varchar, '{{}}', scheduled_at => {value}, max_retries => 3)"
            ),
        ] {
            assert_eq!(Refused::of(client.simple_query(&call)), expected, "{call}");
        }
    }
}

#[test]
fn a_truth_value_is_no_number_of_attempts() {
    let pg = start();
    let mut client = pg.client_as("publisher", "postgres");
    let expected = Refused::new(
        "42804",
        "a value of type boolean is not a number",
        "max_retries is the total number of attempts.",
        "Pass a number, or NULL for outbox_relay.max_retries.",
    );
    for call in [
        "select outbox.publish_event('t', 's', max_retries => true)",
        "select outbox.publish_event('t', 's', null, null, null, null, false)",
        "select outbox.publish_event('t'::varchar, 's', '{}'::json, 7, max_retries => 1 > 2)",
    ] {
        assert_eq!(Refused::of(client.simple_query(call)), expected, "{call}");
    }
}

/// Whatever a function does with a backend, it says in the same words that there is none of this name. To do nothing
/// would look like success.
#[test]
fn a_backend_that_does_not_exist_is_reported_in_the_same_words_everywhere() {
    let pg = start();
    pg.exec(
        "create table public.orders (id int primary key);
        create table public.old_outbox (id uuid, aggregatetype text, aggregateid text, type text, payload jsonb);
        select outbox.publish_event('t', 's', event_id => '0190d1f0-0000-7000-8000-000000000001')",
    );
    let mut client = pg.client();
    for name in ["typo", "", "Default"] {
        let expected = Refused::new(
            "42704",
            &format!("backend \"{name}\" does not exist"),
            "Backends are the rows of outbox.backends.",
            "Check the name, or create the backend first.",
        );
        for statement in [
            "select outbox.retry_failed(BACKEND)",
            "select outbox.retry_failed(backend => BACKEND, event_type => 't')",
            "call outbox.retry_all_failed(BACKEND)",
            "select outbox.discard_failed(BACKEND)",
            "select outbox.replay(BACKEND, '-infinity')",
            "select outbox.preview('0190d1f0-0000-7000-8000-000000000001', BACKEND)",
            "select outbox.guard_key(BACKEND)",
            "select outbox.guard_key(BACKEND, 'a')",
            "select outbox.take_over(BACKEND)",
            "select outbox.accept_held(BACKEND)",
            "select outbox.test_backend(BACKEND)",
            "select outbox.set_backend_password(BACKEND, 'secret')",
            "select outbox.attach_table('public.orders', backend => BACKEND)",
            "select outbox.bridge_debezium('public.old_outbox', BACKEND)",
        ] {
            // As for outbox.publish_event(), the backend is then the default one.
            if statement.contains("attach_table") && name.is_empty() {
                continue;
            }
            let statement = statement.replace("BACKEND", &format!("'{name}'"));
            assert_eq!(Refused::of(client.simple_query(&statement)), expected, "{statement}");
        }
    }
    for statement in [
        "select outbox.replay(null, '-infinity')",
        "select outbox.guard_key(null)",
        "select outbox.take_over(null)",
        "select outbox.test_backend(null)",
        "select outbox.set_backend_password(null, 'secret')",
    ] {
        let expected = Refused::new(
            "22004",
            "backend must not be null",
            "",
            "Names of backends are in outbox.backends.",
        );
        assert_eq!(Refused::of(client.simple_query(statement)), expected, "{statement}");
    }
}

/// Its failed events cannot be retried, but can be discarded.
#[test]
fn failed_events_of_a_deleted_backend_are_known_by_its_name() {
    let pg = start();
    pg.exec(
        "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, attempts, last_error)
            values (1, '3', now(), gen_random_uuid(), 77, 't', 's', 'gone', 1, 'e')",
    );
    let mut client = pg.client();
    let said = Refused::of(client.simple_query("select outbox.retry_failed('gone')"));
    assert_eq!(
        (said.code.as_str(), said.message.as_str()),
        ("42704", "backend \"gone\" does not exist")
    );
    assert_eq!(pg.one::<i64>("select outbox.retry_failed()"), 0);
    assert_eq!(pg.one::<i64>("select outbox.discard_failed('gone')"), 1);
}
