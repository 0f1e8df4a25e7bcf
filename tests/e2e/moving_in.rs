//! Moving in from django-broadcaster: `outbox.import_django_broadcaster()` and the bridge. Its table is created as the
//! package creates it; `make test-moving` does the same with the package itself.

mod bridge;

use kit::{Refused, Stack, ids, wait_drained};
use postgres::Client;
use uuid::Uuid;

pub(crate) const TABLE: &str = include_str!("../django_broadcaster/schema.sql");

/// Columns that the package's model fills in.
pub(crate) const MODEL: &str = "alter table outbox_events
    alter id set default gen_random_uuid(), alter spec_version set default '1.0', alter event_type set default 't', alter source set default 's',
    alter subject set default '', alter data_content_type set default 'application/json', alter data_schema set default '',
    alter status set default 'pending', alter created_at set default clock_timestamp(), alter updated_at set default clock_timestamp(),
    alter scheduled_at set default now(), alter retry_count set default 0, alter max_retries set default 3, alter last_error set default '',
    alter publisher_backend set default '', alter publisher_config set default '{}'";

fn with_old_table() -> Stack {
    let stack = Stack::start();
    stack.pg.exec(TABLE);
    stack.pg.exec(MODEL);
    stack
}

/// Rows of every kind, in the order of their times; the ids end with their numbers.
const ROWS: &str = "
insert into outbox_events (id, event_type, status, created_at, retry_count, last_error, scheduled_at, data, publisher_backend, publisher_config, data_content_type, max_retries)
values
    ('00000000-0000-4000-8000-000000000001', 'sent', 'published', now() - interval '9 h', 0, '', now() - interval '9 h', null, '', '{}', 'application/json', 3),
    ('00000000-0000-4000-8000-000000000002', 'waits', 'pending', now() - interval '8 h', 0, '', now() - interval '8 h', '{\"n\": 1}', '', '{\"tenant\": \"a\"}', 'application/json', 5),
    ('00000000-0000-4000-8000-000000000003', 'tried', 'retry', now() - interval '7 h', 2, 'Timeout reading from socket', now() + interval '4 min', 'null', 'default', '{}', 'application/json', 3),
    ('00000000-0000-4000-8000-000000000004', 'in.hand', 'processing', now() - interval '6 h', 0, '', now() - interval '6 h', null, '', '{}', 'application/json', 3),
    ('00000000-0000-4000-8000-000000000005', 'gave.up', 'failed', now() - interval '5 h', 3, 'Error 111 connecting', now() - interval '5 h', null, '', '{}', 'application/json', 3),
    ('00000000-0000-4000-8000-000000000006', 'later', 'pending', now() - interval '4 h', 0, '', now() + interval '1 h', null, '', '{}', 'application/json', 3),
    ('00000000-0000-4000-8000-000000000007', 'elsewhere', 'pending', now() - interval '3 h', 0, '', now() - interval '3 h', null, 'none', '{}', 'application/json', 3),
    ('00000000-0000-4000-8000-000000000008', 'xml', 'pending', now() - interval '2 h', 0, '', now() - interval '2 h', null, '', '{}', 'text/xml', 3),
    ('00000000-0000-4000-8000-000000000009', 'nested', 'pending', now() - interval '1 h', 0, '', now() - interval '1 h', null, '', '{\"a\": {}}', 'application/json', 5000);";

fn id(number: u32) -> Uuid {
    format!("00000000-0000-4000-8000-{number:012}").parse().expect("an id")
}

fn run(client: &mut Client, sql: &str) {
    client
        .batch_execute(sql)
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// The report of an import on each row: the last digit of its id, and the result.
fn import(client: &mut Client, arguments: &str) -> Vec<String> {
    let sql = format!(
        "select right(event_id::text, 1) || ' ' || becomes from outbox.import_django_broadcaster('outbox_events'{arguments})"
    );
    let rows = client.query(&sql, &[]).unwrap_or_else(|error| panic!("{error:?}"));
    rows.iter().map(|row| row.get(0)).collect()
}

const FIRST_TIME: [&str; 9] = [
    "1 published",
    "2 pending",
    "3 pending",
    "4 ambiguous",
    "5 failed",
    "6 scheduled",
    "7 refused",
    "8 refused",
    "9 refused",
];

fn states(stack: &Stack) -> String {
    stack
        .pg
        .one("select string_agg(right(id::text, 1) || ' ' || status || ' ' || last_error, E'\\n' order by id) from outbox_events")
}

#[test]
fn a_dry_run_says_what_the_import_then_does() {
    let stack = with_old_table();
    stack.pg.exec(ROWS);
    let mut client = stack.pg.client();
    let before = states(&stack);
    for dry in ["", ", true", ", dry_run => null"] {
        assert_eq!(import(&mut client, dry), FIRST_TIME);
    }
    assert_eq!(states(&stack), before);
    let whys: Vec<String> = client
        .query("select why from outbox.import_django_broadcaster('outbox_events')", &[])
        .expect("it tells")
        .iter()
        .map(|row| row.get(0))
        .collect();
    for (why, words) in whys.iter().zip([
        "The old worker has sent it.",
        "It has not been sent.",
        "Attempt 2 of 3 failed: Timeout reading from socket. The worker first looks for it in its stream, because Redis may have accepted it.",
        "The old worker is processing it, or died while it did: it may be in its stream. Stop that worker, then import with ambiguous => 'look'.",
        "It failed after 3 attempts: Error 111 connecting. It is kept in outbox.failed_events; outbox.retry_failed() sends it.",
        "It is not due yet.",
        "backend \"none\" does not exist. Backends are the rows of outbox.backends.",
        "Entries say specversion 1.0 and datacontenttype application/json. This one has 1.0 and text/xml.",
        "publisher_config",
    ]) {
        assert!(why.starts_with(words), "{why}");
    }

    assert_eq!(import(&mut client, ", false"), FIRST_TIME);
    let entries = stack.wait_events(2);
    assert_eq!(ids(&entries), [id(2), id(3)]);
    assert_eq!(entries[0].field("tenant"), "a");
    assert!(entries[0].field("cloud_event").contains(r#""data": {"n": 1}"#));
    assert!(!entries[1].field("cloud_event").contains("\"data\""));
    let created: String = stack.pg.one(
        "select to_char(created_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"') from outbox_events where right(id::text, 1) = '2'",
    );
    assert_eq!(entries[0].field("timestamp"), created);
    let kept: String = stack.pg.one(
        "select concat_ws(' ', f.event_id = o.id, f.created_at = o.created_at, attempts, f.last_error, f.max_retries)
        from outbox.failed_events f, outbox_events o where o.event_type = 'gave.up'",
    );
    assert_eq!(kept, "t t 3 Error 111 connecting 3");
    let scheduled: bool = stack.pg.one(
        "select s.event_id = o.id and s.created_at = o.created_at and s.scheduled_at = o.scheduled_at
        from outbox.scheduled_events s, outbox_events o where o.event_type = 'later'",
    );
    assert!(scheduled);
    // The remaining attempts.
    let attempts: String = stack
        .pg
        .one("select string_agg(max_retries::text, ' ' order by event_id) from outbox.events");
    assert_eq!(attempts, "5 1");
}

#[test]
fn a_second_import_moves_nothing_twice() {
    let stack = with_old_table();
    stack.pg.exec(ROWS);
    let mut client = stack.pg.client();
    client
        .batch_execute("begin; select count(*) from outbox.import_django_broadcaster('outbox_events', false); rollback")
        .expect("it can be taken back");
    assert_eq!(import(&mut client, ", false"), FIRST_TIME);
    let again = [
        "1 published",
        "2 moved",
        "3 moved",
        "4 ambiguous",
        "5 moved",
        "6 moved",
        "7 refused",
        "8 refused",
        "9 refused",
    ];
    assert_eq!(import(&mut client, ""), again);
    assert_eq!(import(&mut client, ", false"), again);
    // Also if a row was put back whose event is here; it is marked again.
    client
        .batch_execute("update outbox_events set status = 'pending', last_error = '' where event_type in ('waits', 'later', 'gave.up')")
        .expect("a plain update");
    assert_eq!(import(&mut client, ", false"), again);
    assert!(!states(&stack).contains("2 pending") && !states(&stack).contains("6 pending"));
    assert_eq!(ids(&stack.wait_events(2)), [id(2), id(3)]);
    // Corrected rows are imported then.
    client
        .batch_execute("update outbox_events set publisher_backend = '', data_content_type = 'application/json', publisher_config = '{}'")
        .expect("a plain update");
    assert_eq!(
        import(&mut client, ", false")[6..],
        ["7 pending", "8 pending", "9 pending"]
    );
    assert_eq!(ids(&stack.wait_events(5)), [id(2), id(3), id(7), id(8), id(9)]);
    assert_eq!(
        stack
            .pg
            .one::<i32>("select max_retries from outbox.events where event_type = 'nested'"),
        1_000
    );
}

/// As the old worker writes it: Python omits the microseconds of a whole second.
fn old_entry(stack: &Stack, number: u32) {
    let id = id(number).to_string();
    let time: String = stack.pg.one(&format!(
        "select to_char(created_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"+00:00\"') from outbox_events where id = '{id}'"
    ));
    let fields = [
        "event_id",
        &id,
        "event_type",
        "t",
        "source",
        "s",
        "timestamp",
        &time,
        "cloud_event",
        "{}",
    ];
    stack
        .redis
        .call(&[&["XADD", "events", "*"], fields.as_slice()].concat());
}

/// The old worker died after it had sent one event, and before it had sent the other; and Redis accepted one of two
/// events whose sending it gave up.
#[test]
fn rows_that_may_be_in_their_stream_are_looked_for_there() {
    let stack = with_old_table();
    let insert = |number: u32, status: &str, error: &str| {
        stack.pg.exec(&format!(
            "insert into outbox_events (id, status, last_error, retry_count) values ('{}', '{status}', '{error}', {})",
            id(number),
            i32::from(status == "retry")
        ));
    };
    for (number, status, error) in [
        (1, "processing", ""),
        (2, "processing", ""),
        (3, "retry", "Timeout reading from socket"),
        (4, "retry", "Timeout reading from socket"),
        (5, "pending", ""),
    ] {
        insert(number, status, error);
    }
    // One of the two times is a whole second.
    stack.pg.exec(
        "update outbox_events set created_at = date_trunc('second', now()) + right(id::text, 1)::integer * interval '1 s'
            + case when right(id::text, 1) = '1' then interval '0.25 s' else '0' end",
    );
    old_entry(&stack, 1);
    old_entry(&stack, 3);
    let mut client = stack.pg.client();
    assert_eq!(
        import(&mut client, ", false"),
        ["1 ambiguous", "2 ambiguous", "3 pending", "4 pending", "5 pending"]
    );
    assert_eq!(ids(&stack.wait_events(4)), [id(1), id(3), id(4), id(5)]);
    wait_drained(&stack.pg, "default");
    assert_eq!(
        import(&mut client, ", false, 'look'"),
        ["1 pending", "2 pending", "3 moved", "4 moved", "5 moved"]
    );
    wait_drained(&stack.pg, "default");
    assert_eq!(ids(&stack.wait_events(5)), [id(1), id(3), id(4), id(5), id(2)]);

    // A backend that does not compare, and an import that accepts repeats.
    stack.pg.exec("update outbox.backends set delivery = 'at_least_once'");
    insert(6, "processing", "");
    stack.pg.exec(
        "update outbox_events set created_at = now() + interval '1 h' where status = 'processing' and last_error = ''",
    );
    old_entry(&stack, 6);
    assert_eq!(import(&mut client, ", false, 'look'")[5..], ["6 ambiguous"]);
    assert_eq!(import(&mut client, ", false, ambiguous => 'send'")[5..], ["6 pending"]);
    assert_eq!(ids(&stack.wait_events(7))[5..], [id(6), id(6)]);
}

/// The import waits for the table, on which the bridge is being made.
#[test]
fn a_row_that_the_old_worker_has_locked_is_left_to_it() {
    let stack = with_old_table();
    stack.pg.exec(ROWS);
    let mut worker = stack.pg.client();
    run(
        &mut worker,
        "begin; select from outbox_events where event_type = 'waits' for update",
    );
    let mut client = stack.pg.client();
    run(
        &mut client,
        "set lock_timeout = '20 s'; begin; select outbox.bridge_django_broadcaster('outbox_events')",
    );
    let mut expected = FIRST_TIME;
    expected[1] = "2 ambiguous";
    assert_eq!(import(&mut client, ", false"), expected);
    run(&mut client, "commit");
    run(
        &mut worker,
        "update outbox_events set status = 'processing' where event_type = 'waits'; commit;
        update outbox_events set status = 'published' where event_type = 'waits'",
    );
    assert_eq!(import(&mut client, ", false")[1], "2 published");
    assert_eq!(ids(&stack.wait_events(1)), [id(3)]);
}
/// The functions of the import.
const FUNCTIONS: [&str; 5] = [
    "import_django_broadcaster",
    "bridge_django_broadcaster",
    "import_debezium",
    "bridge_debezium",
    "end_bridge",
];

#[test]
fn an_import_needs_rights_and_a_table_that_fits() {
    let stack = with_old_table();
    stack.pg.exec("create role app login; grant all on outbox_events to app; alter table outbox_events owner to app; create view seen as table outbox_events; create table other (id uuid)");
    let mut client = stack.pg.client();
    let mut app = stack.pg.client_as("app", "postgres");
    let refused = |client: &mut Client, call: &str| {
        let said = Refused::of(client.simple_query(&format!("select * from outbox.{call}")));
        (said.code, said.message)
    };
    let error = |code: &str, message: &str| (code.to_owned(), message.to_owned());
    for function in FUNCTIONS {
        let (code, message) = refused(&mut app, &format!("{function}('outbox_events')"));
        assert_eq!(
            (code.as_str(), message.as_str()),
            ("42501", "permission denied for schema outbox"),
            "{function}"
        );
        assert_eq!(
            refused(&mut client, &format!("{function}(null)")),
            error("22004", "source must not be null")
        );
        assert_eq!(
            refused(&mut client, &format!("{function}('seen')")),
            error("42809", "public.seen is not a table")
        );
    }
    stack
        .pg
        .exec("grant usage on schema outbox to app; grant execute on all functions in schema outbox to app");
    for function in FUNCTIONS {
        assert_eq!(
            refused(&mut app, &format!("{function}('outbox_events')")),
            error("42501", "only a superuser may move events in"),
            "{function}"
        );
    }
    let said = Refused::of(client.simple_query("select outbox.import_django_broadcaster('other')"));
    assert_eq!(said.code, "42703");
    assert_eq!(said.message, "public.other is not an outbox of the expected kind");
    assert!(
        said.detail
            .expect("a detail")
            .starts_with("It lacks these columns: spec_version, event_type")
    );
    assert_eq!(
        refused(
            &mut client,
            "import_django_broadcaster('outbox_events', ambiguous => 'guess')"
        ),
        error("22023", "ambiguous must be leave, look or send")
    );
    assert_eq!(
        refused(&mut client, "end_bridge('outbox_events')"),
        error("42704", "public.outbox_events has no bridge")
    );
}

/// Code on the table that belongs to its owner does not run with the rights of the superuser who imports.
#[test]
fn triggers_of_the_old_table_do_not_fire_in_an_import() {
    let stack = with_old_table();
    stack.pg.exec(ROWS);
    stack.pg.exec(
        "create function fires() returns trigger language plpgsql as 'begin raise exception ''it fires''; end';
        create trigger fires before update on outbox_events for each row execute function fires()",
    );
    assert_eq!(import(&mut stack.pg.client(), ", false"), FIRST_TIME);
    stack.wait_events(2);
}

/// Rows that the package does not write, but that the table may hold.
#[test]
fn odd_rows_are_reported_before_they_are_moved() {
    let stack = with_old_table();
    stack
        .pg
        .exec("alter table outbox_events alter last_error drop not null");
    stack.pg.exec(
        "insert into outbox_events (id, event_type, created_at, scheduled_at, last_error) values
            ('00000000-0000-4000-8000-000000000001', 'endless', now() - interval '2 h', 'infinity', ''),
            ('00000000-0000-4000-8000-000000000002', 'no.error', now() - interval '1 h', now(), null),
            ('00000000-0000-4000-8000-000000000003', 'early', now(), '-infinity', '')",
    );
    let mut client = stack.pg.client();
    let expected = ["1 refused", "2 pending", "3 pending"];
    assert_eq!(import(&mut client, ""), expected);
    assert_eq!(import(&mut client, ", dry_run => false"), expected);
    assert_eq!(kit::types(&stack.wait_events(2)), ["no.error", "early"]);
    assert_eq!(import(&mut client, ""), ["1 refused", "2 moved", "3 moved"]);
}
