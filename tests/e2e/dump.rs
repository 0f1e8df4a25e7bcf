//! pg_dump and restore: backends and all unsent events are restored; sent events are not sent again.

use kit::{Cluster, Entry, Mode, Postgres, Stack, types, wait_drained, wait_eq, wait_until};
use postgres::Client;

/// How a dump is written and read.
#[derive(Debug, Clone, Copy)]
enum Form {
    Plain,
    Inserts,
    /// pg_dump -Fc and pg_restore -j2, which loads tables in its own order.
    Parallel,
}

fn carry(from: &Postgres, to: &Postgres, db: &str, form: Form) {
    match form {
        Form::Plain => to.restore(db, &from.pg_dump("postgres")),
        Form::Inserts => {
            let ran = from.run("pg_dump", &["-d", "postgres", "--inserts"], "");
            assert!(ran.ok, "{}", ran.stderr);
            to.restore(db, &ran.stdout);
        }
        Form::Parallel => {
            let file = tempfile::NamedTempFile::new().unwrap();
            let path = file.path().to_str().unwrap();
            let ran = from.run("pg_dump", &["-d", "postgres", "-Fc", "-f", path], "");
            assert!(ran.ok, "{}", ran.stderr);
            let ran = to.run("pg_restore", &["-d", db, "-j2", "--exit-on-error", path], "");
            assert!(ran.ok, "{}", ran.stderr);
        }
    }
}

const BACKENDS: &str = "select string_agg(b::text, E'\\n' order by b.number) from outbox.backends b";

/// The unsent events of the source: 30 of `down`, the scheduled one of `default`, and a failed one.
const UNSENT: i64 = 30;

/// A source with everything that a dump must distinguish. The backend `down` is paused, so that its copies wait as
/// well.
fn source(recreated_default: bool) -> Stack {
    let stack = Stack::start();
    let port = stack.redis.port();
    let mut client = stack.pg.client();
    let mut run = |sql: &str| client.batch_execute(sql).unwrap();
    // Transaction ids that the target has not reached yet.
    for _ in 0..200 {
        run("select pg_current_xact_id()");
    }
    run("insert into outbox.backends (name) values ('short-lived')");
    run("delete from outbox.backends where name = 'short-lived'");
    run(&format!(
        "insert into outbox.backends (name, enabled, host, port, stream_name, max_len, connect_timeout, allowed_streams) \
         values ('down', false, '127.0.0.1', {port}, 'late', 0, '3 s', '{{a,b*}}')"
    ));
    if recreated_default {
        run("delete from outbox.backends where name = 'default'");
        run(&format!(
            "insert into outbox.backends (name, host, port) values ('default', '127.0.0.1', {port})"
        ));
    } else {
        run(
            "update outbox.backends set db = 0, max_len = 5000, stream_name = 'events', connect_timeout = '4 s', \
             socket_timeout = '6 s', allowed_streams = '{*,x}', delivery = 'at_least_once', on_missing_guard = 'halt', \
             wait_replicas = 0 where name = 'default'",
        );
    }
    stack.redis.call(&["SET", "wrong", "no stream"]);
    for i in 1..=UNSENT {
        run(&format!("select outbox.publish_event('sent {i}', 's')"));
        run(&format!(
            "select outbox.publish_event('late {i}', 's', '{{\"n\": {i}}}', backend => 'down', publisher_config => '{{\"k\": 1}}')"
        ));
    }
    run("select outbox.publish_event('failed', 's', stream => 'wrong', max_retries => 1)");
    run("select outbox.publish_event('soon', 's', scheduled_at => '2100-01-01', stream => 'scheduled')");
    run("select outbox.publish_event('soon too', 's', scheduled_at => '2100-01-01', stream => 'scheduled')");
    stack.wait_events(30);
    wait_eq("all but the late ones are done with, and saved", (30, 1), || {
        let sql = "select published_total, failed_total from outbox.backend_status where backend = 'default'";
        let row = stack.pg.client().query_one(sql, &[]).unwrap();
        (row.get::<_, i64>(0), row.get::<_, i64>(1))
    });
    stack
}

/// Checks a restored database, then lets its worker send its events.
fn check(stack: &Stack, target: &Postgres, db: &str) {
    let mut client = target.client_db(db);
    let one = |client: &mut Client, sql: &str| -> i64 { client.query_one(sql, &[]).unwrap().get(0) };
    let backends: String = stack.pg.one(BACKENDS);
    assert_eq!(target.one_db::<String>(db, BACKENDS), backends);
    let last: i64 = stack.pg.one("select last_value from outbox.backends_number_seq");
    client
        .batch_execute("insert into outbox.backends (name, enabled) values ('new', false)")
        .unwrap();
    let new = one(
        &mut client,
        "select number::bigint from outbox.backends where name = 'new'",
    );
    assert!(new > last, "number {new} was given before");

    let late: Vec<String> = (1..=UNSENT).map(|i| format!("late {i}")).collect();
    let events = "select string_agg(event_type, ',' order by seq) from outbox.events";
    assert_eq!(target.one_db::<String>(db, events), late.join(","));
    let fresh: bool = target.one_db(db, "select bool_and(xid < pg_current_xact_id()) from outbox.events");
    assert!(fresh, "transaction ids of the source");
    let whole =
        "select coalesce(string_agg((to_jsonb(e) - '{seq,xid}'::text[])::text, E'\\n' order by e.seq), '') from outbox";
    for table in ["scheduled_events", "failed_events"] {
        let sql = format!("{whole}.{table} e");
        assert_eq!(
            target.one_db::<String>(db, &sql),
            stack.pg.one::<String>(&sql),
            "{table}"
        );
    }
    let waiting = format!("{whole}.events e where e.event_type like 'late%'");
    assert_eq!(target.one_db::<String>(db, &waiting), stack.pg.one::<String>(&waiting));

    client
        .batch_execute("update outbox.backends set enabled = true where name = 'down'")
        .unwrap();
    client
        .batch_execute("select outbox.publish_event('new', 's', backend => 'down')")
        .unwrap();
    let expected: Vec<&str> = late.iter().map(String::as_str).chain(["new"]).collect();
    assert_eq!(types(&stack.redis.wait_entries("late", expected.len())), expected);
    // Scheduled events fall due in the target, in their order; the failed one can be retried.
    client
        .batch_execute("update outbox.scheduled_events set scheduled_at = now()")
        .unwrap();
    client.batch_execute("select outbox.wake()").unwrap();
    assert_eq!(types(&stack.redis.wait_entries("scheduled", 2)), ["soon", "soon too"]);
    stack.redis.call(&["DEL", "wrong"]);
    assert_eq!(one(&mut client, "select outbox.retry_failed()"), 1);
    assert_eq!(types(&stack.redis.wait_entries("wrong", 1)), ["failed"]);
    // Events that the source had sent are not sent again.
    client
        .batch_execute("select outbox.publish_event('marker', 's')")
        .unwrap();
    let sent: Vec<String> = (1..=30)
        .map(|i| format!("sent {i}"))
        .chain(["marker".to_string()])
        .collect();
    assert_eq!(types(&stack.wait_events(31)), sent);
    assert_eq!(stack.redis.xlen("late"), expected.len());
}

fn into_another_database(form: Form, recreated_default: bool) {
    let stack = source(recreated_default);
    stack.pg.exec("create database copy");
    carry(&stack.pg, &stack.pg, "copy", form);
    check(&stack, &stack.pg, "copy");
    // The source goes on undisturbed.
    stack.redis.call(&["DEL", "late"]);
    stack
        .pg
        .exec("update outbox.backends set enabled = true where name = 'down'");
    assert_eq!(types(&stack.redis.wait_entries("late", 30)).len(), 30);
}

#[test]
fn a_dump_goes_into_another_database() {
    into_another_database(Form::Plain, false);
}

#[test]
fn a_dump_with_inserts_goes_into_another_database() {
    into_another_database(Form::Inserts, false);
}

#[test]
fn a_dump_is_restored_in_parallel() {
    into_another_database(Form::Parallel, true);
}

#[test]
fn a_dump_goes_into_another_cluster() {
    let stack = source(true);
    let mut target = Postgres::start();
    target.exec("create database copy");
    let xid: i64 = target.one("select pg_current_xact_id()::text::bigint");
    let of_source: i64 = stack.pg.one("select min(xid::text::bigint) from outbox.events");
    assert!(
        xid < of_source,
        "the target has come further than the source: {xid}, {of_source}"
    );
    carry(&stack.pg, &target, "copy", Form::Plain);
    check(&stack, &target, "copy");
    // The target has saved its own cursors: nothing is sent again after its restart.
    target.stop(Mode::Fast);
    target.start_again();
    target.exec_db("copy", "select outbox.publish_event('restarted', 's')");
    let entries = stack.wait_events(32);
    assert_eq!((entries.len(), entries[31].field("event_type")), (32, "restarted"));
}

/// A dump of only the data, restored into a database that has the extension and was already in use.
#[test]
fn the_dumped_default_backend_replaces_an_unchanged_one() {
    let stack = source(true);
    let target = Postgres::start();
    target.extension();
    wait_eq("its worker", true, || target.worker_pid("postgres").is_some());
    let ran = stack.pg.run("pg_dump", &["-d", "postgres", "--data-only"], "");
    assert!(ran.ok, "{}", ran.stderr);
    target.restore("postgres", &ran.stdout);
    check(&stack, &target, "postgres");
}

/// The backend was down when the dump was made, and events were sent whose cursor was not saved: none is lost.
#[test]
fn a_dump_during_an_outage_loses_nothing() {
    let mut stack = Stack::start();
    stack.publish("sent");
    wait_eq("the saved cursor", 1i64, || {
        stack.pg.one("select published_total from outbox.status")
    });
    stack.redis.kill9();
    stack
        .pg
        .exec("select outbox.publish_event('n' || i, 's') from generate_series(1, 2000) i");
    stack.pg.exec("create database copy");
    carry(&stack.pg, &stack.pg, "copy", Form::Plain);
    stack.pg.exec("drop extension outbox_relay");
    stack.redis.start_again();
    let expected: Vec<String> = (1..=2_000).map(|i| format!("n{i}")).collect();
    assert_eq!(types(&stack.wait_events(2_000)), expected);
}

/// Events that were accepted when they were published, and that would be refused now: `allowed_streams`, the format or
/// the limit of the size have changed since. Where they are they are sent, and so they are where they are restored.
#[test]
fn events_that_would_be_refused_now_do_not_stop_a_restore() {
    for form in [Form::Plain, Form::Inserts, Form::Parallel] {
        let stack = Stack::start();
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, enabled, host, port, stream_name) values ('down', false, '127.0.0.1', {}, 'late');
             create role app login; select outbox.grant_publisher('app'); alter role app set outbox_relay.max_event_size = '4MB'",
            stack.redis.port()
        ));
        stack
            .pg
            .client_as("app", "postgres")
            .batch_execute(
                "select outbox.publish_event('first', 's', backend => 'down');
                 select outbox.publish_event('other', 's', backend => 'down', stream => 'other');
                 select outbox.publish_event('large', 's', to_jsonb(repeat('x', 3000000)), backend => 'down');
                 select outbox.publish_event('field', 's', backend => 'down', publisher_config => '{\"lsn\": 1}');
                 select outbox.publish_event('soon', 's', backend => 'down', stream => 'other', scheduled_at => '2100-01-01');
                 select outbox.publish_event('last', 's', backend => 'down')",
            )
            .expect("allowed then");
        stack
            .pg
            .exec("update outbox.backends set allowed_streams = '{late}', include_lsn = true where name = 'down'");
        stack.pg.exec("create database copy");
        carry(&stack.pg, &stack.pg, "copy", form);
        let events = "select string_agg(event_type, ',' order by seq) from outbox.events";
        assert_eq!(
            stack.pg.one_db::<String>("copy", events),
            "first,other,large,field,last",
            "{form:?}"
        );
        stack.pg.exec_db(
            "copy",
            "update outbox.scheduled_events set scheduled_at = now(); update outbox.backends set enabled = true",
        );
        assert_eq!(types(&stack.redis.wait_entries("late", 3)), ["first", "large", "last"]);
        assert_eq!(types(&stack.redis.wait_entries("other", 2)), ["other", "soon"]);
        // It fails alone, as it does where it was published.
        wait_eq("the event that names a field of the format", "field".to_owned(), || {
            stack.pg.one_db(
                "copy",
                "select coalesce(string_agg(event_type, ','), '') from outbox.failed_events",
            )
        });
    }
}

/// The source goes on after the dump: the events that it has sent by the time of the restore are already in the
/// streams.
fn after_the_source_went_on(form: Form, delivery: &str) -> (Stack, Postgres, Vec<Entry>) {
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "update outbox.backends set enabled = false, delivery = '{delivery}', host = '127.0.0.1', port = {}",
        stack.redis.port()
    ));
    stack
        .pg
        .exec("select outbox.publish_event('n' || i, 's') from generate_series(1, 300) i");
    stack.pg.exec("update outbox.backends set enabled = true");
    // In the dump they are pending: the cursor is not saved yet.
    let target = Postgres::start();
    target.exec("create database copy");
    let paused = "update outbox.backends set enabled = false";
    stack.wait_events(300);
    // Each acknowledgement is saved before the pause, so nothing is saved after it.
    wait_drained(&stack.pg, "default");
    let since: String = stack.pg.one("select clock_timestamp()::text");
    stack.pg.exec(paused);
    // Makes it save everything now, or the cursor would come back.
    wait_until("the paused backend's cursor to be saved", || {
        stack.pg.one::<bool>(&format!(
            "select exists (select from outbox.cursors where backend_number > 0 and saved_at > '{since}')"
        ))
    });
    stack.pg.exec("delete from outbox.cursors");
    stack
        .pg
        .exec("select outbox.publish_event('late ' || i, 's') from generate_series(1, 20) i");
    carry(&stack.pg, &target, "copy", form);
    target.exec_db("copy", "update outbox.backends set enabled = true");
    let expected = match delivery {
        "exactly_once" => 320,
        _ => 620,
    };
    let entries = stack.wait_events(expected);
    (stack, target, entries)
}

#[test]
fn events_that_the_source_has_sent_are_found_and_not_repeated() {
    for form in [Form::Plain, Form::Inserts, Form::Parallel] {
        let (stack, target, entries) = after_the_source_went_on(form, "exactly_once");
        let expected: Vec<String> = (1..=300)
            .map(|i| format!("n{i}"))
            .chain((1..=20).map(|i| format!("late {i}")))
            .collect();
        assert_eq!(types(&entries), expected, "{form:?}");
        target.wait_log("events of a dump were restored for backend \"default\"");
        if !matches!(form, Form::Inserts) {
            target.wait_log("300 of the events after its saved position are already in the streams and are not repeated; 20 are sent");
        }
        wait_eq("nothing is left to compare", 0i64, || {
            target.one_db("copy", "select count(*) from outbox.restores where not is_looked_for")
        });
        target.exec_db("copy", "select outbox.publish_event('new', 's')");
        assert_eq!(types(&stack.wait_events(321))[320], "new");
    }
}

#[test]
fn at_least_once_repeats_it_and_says_how_much() {
    let (_stack, target, entries) = after_the_source_went_on(Form::Plain, "at_least_once");
    let ids = |entries: &[Entry]| -> Vec<String> { entries.iter().map(|e| e.field("event_id").to_owned()).collect() };
    assert_eq!(ids(&entries[..300]), ids(&entries[300..600]));
    target.wait_log("WARNING:  320 events of a dump were restored for backend \"default\"");
}

/// In each lane, also in a slot that the target finds later.
#[test]
fn events_that_the_source_has_sent_to_a_cluster_are_found_and_not_repeated() {
    let cluster = Cluster::start(0);
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "update outbox.backends set mode = 'cluster', nodes = '{}', host = null, port = null",
        cluster.addresses()
    ));
    let publish = "select outbox.publish_event('n' || i, 's', stream => 's' || i % 4)";
    stack.pg.exec(&format!("{publish} from generate_series(1, 400) i"));
    for stream in ["s0", "s1", "s2", "s3"] {
        cluster.wait_entries(stream, 100);
    }
    wait_drained(&stack.pg, "default");
    // Nothing saves the cursors any more: in the dump all events are unsent.
    stack.pg.set("outbox_relay.enabled", "off");
    wait_eq("the worker", None::<i32>, || {
        stack.pg.one("select worker_pid from outbox.status")
    });
    stack.pg.exec("delete from outbox.cursors");
    stack.pg.exec(&format!("{publish} from generate_series(401, 420) i"));
    let target = Postgres::start();
    target.exec("create database copy");
    carry(&stack.pg, &target, "copy", Form::Plain);
    for n in 0..4 {
        let entries = cluster.wait_entries(&format!("s{n}"), 105);
        let expected: Vec<String> = (1..=420).filter(|i| i % 4 == n).map(|i| format!("n{i}")).collect();
        assert_eq!(types(&entries), expected);
    }
    wait_eq("nothing is left to compare", 0i64, || {
        target.one_db("copy", "select count(*) from outbox.restores where not is_looked_for")
    });
    target.exec_db("copy", "select outbox.publish_event('new', 's', stream => 's9')");
    assert_eq!(types(&cluster.wait_entries("s9", 1)), ["new"]);
    for n in 0..4 {
        assert_eq!(cluster.entries(&format!("s{n}")).len(), 105);
    }
}
