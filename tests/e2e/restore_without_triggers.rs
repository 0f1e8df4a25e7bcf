//! Triggers that were disabled, by `pg_restore --disable-triggers` or by hand: they are enabled again in a moment,
//! nothing depends on them meanwhile, and rows that were inserted without them are sent once.

use kit::{Bystander, Entry, Postgres, Redis, Stack, types, wait_eq, wait_until};
use std::time::{Duration, Instant};

const BURN: &str = "do $$ begin for i in 1..3000 loop perform pg_current_xact_id(); commit; end loop; end $$";
const BROKEN: &str = "select count(*) from outbox.broken_triggers()";
const WAITING: usize = 40;

/// How the data are restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// pg_restore --disable-triggers of a custom dump.
    Custom,
    Parallel,
    /// Only `outbox.events`, and its section.
    Section,
    /// A script with ALTER TABLE DISABLE TRIGGER and one INSERT for each row.
    Inserts,
    /// A script that runs with session_replication_role = replica.
    Replica,
    /// Disabled by hand, and enabled again in the same transaction.
    ByHand,
}

/// A server with sent, pending, failed and scheduled events.
fn source() -> Stack {
    let stack = Stack::start();
    stack.redis.call(&["SET", "wrong", "no stream"]);
    stack
        .pg
        .exec("select outbox.publish_event('sent ' || i, 's') from generate_series(1, 300) i");
    stack
        .pg
        .exec("select outbox.publish_event('failed', 's', stream => 'wrong', max_retries => 1)");
    stack.wait_events(300);
    wait_eq("a failed event", 1i64, || {
        stack.pg.one("select count(*) from outbox.failed_events")
    });
    kit::wait_drained(&stack.pg, "default");
    stack.pg.exec("update outbox.backends set enabled = false");
    for i in 1..=WAITING {
        stack.pg.exec(&format!(
            "select outbox.publish_event('late {i}', 's', stream => 'late')"
        ));
    }
    for at in ["2100-01-01", "2100-01-02"] {
        stack.pg.exec(&format!(
            "select outbox.publish_event('soon', 's', stream => 'scheduled', scheduled_at => '{at}')"
        ));
    }
    stack
}

/// A server that was already in use, whose events go to the same Redis.
fn target(stack: &Stack) -> Postgres {
    let target = Postgres::with(&[("outbox_relay.poll_interval", "500ms")]).start();
    target.extension();
    target.exec(&format!(
        "update outbox.backends set host = '127.0.0.1', port = {}, stream_name = 'own'",
        stack.redis.port()
    ));
    for i in 1..=20 {
        target.exec(&format!("select outbox.publish_event('own {i}', 's')"));
    }
    stack.redis.wait_entries("own", 20);
    kit::wait_drained(&target, "default");
    target
}

fn carry(from: &Postgres, to: &Postgres, form: Form) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let dump = |args: &[&str]| {
        let ran = from.run(
            "pg_dump",
            &[&["-d", "postgres", "-f", path, "--data-only"], args].concat(),
            "",
        );
        assert!(ran.ok, "{}", ran.stderr);
    };
    // Some of it fails: the target already has a backend "default", which is not replaced.
    let restore = |args: &[&str]| {
        let _ = to.run(
            "pg_restore",
            &[&["-d", "postgres", "--data-only", "--disable-triggers"], args, &[path]].concat(),
            "",
        );
    };
    match form {
        Form::Custom => {
            dump(&["-Fc"]);
            restore(&[]);
        }
        Form::Parallel => {
            dump(&["-Fc"]);
            restore(&["--jobs=2"]);
        }
        Form::Section => {
            dump(&["-Fc"]);
            restore(&["--section=data", "--table=events", "--schema=outbox"]);
        }
        Form::Inserts => {
            dump(&["--inserts", "--disable-triggers"]);
            to.run("psql", &["-q", "-d", "postgres", "-f", path], "");
        }
        Form::Replica => {
            dump(&["--disable-triggers"]);
            to.run(
                "psql",
                &[
                    "-q",
                    "-d",
                    "postgres",
                    "-c",
                    "set session_replication_role = replica",
                    "-f",
                    path,
                ],
                "",
            );
        }
        Form::ByHand => {
            dump(&["--table=outbox.events"]);
            let script = std::fs::read_to_string(path).unwrap();
            to.restore(
                "postgres",
                &format!(
                    "begin; alter table outbox.events disable trigger user; {script}\n\
                     do $$ declare t record; begin for t in select name from outbox.our_triggers() where relation = 'events' loop \
                     execute format('alter table outbox.events enable always trigger %I', t.name); end loop; end $$; commit;"
                ),
            );
        }
    }
}

fn late(entries: &[Entry]) -> Vec<String> {
    entries
        .iter()
        .map(|entry| entry.field("event_type").to_owned())
        .collect()
}

fn expected() -> Vec<String> {
    (1..=WAITING).map(|i| format!("late {i}")).collect()
}

/// Events that were pending in the source are sent by the target, each once and in order, and everything works as
/// before.
fn check(form: Form, prepare: impl Fn(&Postgres, &Postgres)) {
    let stack = source();
    let target = target(&stack);
    prepare(&stack.pg, &target);
    carry(&stack.pg, &target, form);
    let entries = stack.redis.wait_entries("late", WAITING);
    assert_eq!(late(&entries), expected(), "{form:?}");
    wait_eq("the triggers to be mended", 0i64, || target.one(BROKEN));
    kit::wait_drained(&target, "default");
    // Only rows of events: as if they had been published here.
    let foreign = "select count(*) from outbox.events where xid::text::bigint & 4294967295 <> xmin::text::bigint";
    assert_eq!(target.one::<i64>(foreign), 0);
    if form != Form::Section && form != Form::ByHand {
        target.exec("update outbox.scheduled_events set scheduled_at = now() where scheduled_at = '2100-01-01'");
        target.exec("select outbox.wake()");
        assert_eq!(types(&stack.redis.wait_entries("scheduled", 1)), ["soon"]);
        stack.redis.call(&["DEL", "wrong"]);
        assert_eq!(target.one::<i64>("select outbox.retry_failed()"), 1);
        assert_eq!(types(&stack.redis.wait_entries("wrong", 1)), ["failed"]);
    }
    target.exec("select outbox.publish_event('after', 's', stream => 'late')");
    assert_eq!(types(&stack.redis.wait_entries("late", WAITING + 1))[WAITING], "after");
    assert_eq!(stack.redis.xlen("late"), WAITING + 1);
    assert_eq!(stack.redis.xlen("own"), 20);
}

/// The target has not reached the source's transaction ids.
#[test]
fn rows_of_a_cluster_that_is_ahead_are_sent_once() {
    for form in [Form::Custom, Form::Inserts, Form::ByHand] {
        check(form, |_, _| ());
    }
}

#[test]
fn rows_of_a_cluster_that_is_far_ahead_are_sent_once() {
    for form in [Form::Parallel, Form::Replica] {
        let ahead = |source: &Postgres, _: &Postgres| {
            source.exec("delete from outbox.events where stream = 'late'");
            source.exec(BURN);
            for i in 1..=WAITING {
                source.exec(&format!(
                    "select outbox.publish_event('late {i}', 's', stream => 'late')"
                ));
            }
        };
        check(form, ahead);
    }
}

/// The target has passed them: its cursor covers their transactions.
#[test]
fn rows_of_a_cluster_that_is_behind_are_sent_once() {
    for form in [Form::Custom, Form::Section, Form::Inserts, Form::ByHand] {
        let behind = |_: &Postgres, target: &Postgres| {
            target.exec(BURN);
            target.exec("select outbox.publish_event('burnt', 's', stream => 'burnt')");
            kit::wait_drained(target, "default");
        };
        check(form, behind);
    }
}

#[test]
fn events_that_the_source_has_sent_since_are_not_repeated() {
    let stack = source();
    let target = target(&stack);
    target.exec(BURN);
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_str().unwrap();
    let ran = stack
        .pg
        .run("pg_dump", &["-d", "postgres", "-Fc", "--data-only", "-f", path], "");
    assert!(ran.ok, "{}", ran.stderr);
    stack.pg.exec("update outbox.backends set enabled = true");
    assert_eq!(late(&stack.redis.wait_entries("late", WAITING)), expected());
    target.run(
        "pg_restore",
        &["-d", "postgres", "--data-only", "--disable-triggers", path],
        "",
    );
    target.wait_log("rows of outbox.events carried transaction ids of another cluster");
    target.wait_log(&format!(
        "{WAITING} of the events after its saved position are already in the streams"
    ));
    target.exec("select outbox.publish_event('after', 's', stream => 'late')");
    assert_eq!(types(&stack.redis.wait_entries("late", WAITING + 1))[WAITING], "after");
}

/// The worker was not running: it notices when it starts.
#[test]
fn a_restore_beside_a_stopped_relay_is_noticed_later() {
    let stack = source();
    let mut target = target(&stack);
    target.set("outbox_relay.enabled", "off");
    wait_eq("the worker", None::<i32>, || {
        target.one("select worker_pid from outbox.status")
    });
    target.exec(BURN);
    carry(&stack.pg, &target, Form::ByHand);
    assert_eq!(target.one::<i64>(BROKEN), 0);
    target.configure(&[("outbox_relay.enabled", "on")]);
    target.exec("alter system reset outbox_relay.enabled");
    target.restart();
    assert_eq!(late(&stack.redis.wait_entries("late", WAITING)), expected());
}

/// Each trigger, in each way in which it can be disabled.
#[test]
fn a_trigger_that_was_switched_off_is_on_again() {
    let stack = Stack::start();
    let all: Vec<(String, String)> = stack
        .pg
        .client()
        .query("select relation, name from outbox.our_triggers()", &[])
        .unwrap()
        .iter()
        .map(|row| (row.get(0), row.get(1)))
        .collect();
    for (table, name) in &all {
        for act in ["disable", "enable", "enable replica"] {
            stack
                .pg
                .exec(&format!("alter table outbox.{table} {act} trigger \"{name}\""));
        }
        // Postgres refuses this while the worker is setting the same trigger to ENABLE ALWAYS.
        let sql = format!("drop trigger if exists \"{name}\" on outbox.{table}");
        wait_until("it to be dropped", || stack.pg.client().batch_execute(&sql).is_ok());
    }
    for table in [
        "events",
        "scheduled_events",
        "backends",
        "backend_passwords",
        "take_overs",
        "restores",
    ] {
        stack
            .pg
            .exec(&format!("alter table outbox.{table} disable trigger user"));
    }
    // It notices them at its next check at the latest.
    stack.publish("looks");
    wait_eq("the triggers", 0i64, || stack.pg.one(BROKEN));
    // Missing or disabled: the worker may have looked between the statements.
    stack.pg.wait_log("trigger \"complete_event\" of outbox.events was ");
    stack
        .pg
        .wait_log("trigger \"backends_changed\" of outbox.restores was ");
    stack.publish("goes on");
    assert_eq!(types(&stack.wait_events(2)), ["looks", "goes on"]);
}

/// Another session writes to the table all the time, so that triggers cannot be enabled: nothing depends on them.
#[test]
fn scheduled_and_failed_events_go_on_while_a_trigger_cannot_be_mended() {
    let stack = Stack::start();
    stack.redis.call(&["SET", "wrong", "no stream"]);
    stack
        .pg
        .exec("select outbox.publish_event('failed', 's', stream => 'wrong', max_retries => 1)");
    wait_eq("a failed event", 1i64, || {
        stack.pg.one("select count(*) from outbox.failed_events")
    });
    let mut holder = stack.pg.client();
    let mut open = holder.transaction().unwrap();
    stack.pg.exec("alter table outbox.events disable trigger all");
    open.batch_execute("select outbox.publish_event('open', 's')").unwrap();
    stack.publish("looks");
    stack
        .pg
        .wait_log("triggers of outbox_relay cannot be mended: canceling statement due to lock timeout");
    stack
        .pg
        .exec("select outbox.publish_event('soon', 's', scheduled_at => now() + interval '200 ms')");
    assert_eq!(types(&stack.wait_events(2)), ["looks", "soon"]);
    stack.redis.call(&["DEL", "wrong"]);
    assert_eq!(stack.pg.one::<i64>("select outbox.retry_failed()"), 1);
    assert_eq!(types(&stack.redis.wait_entries("wrong", 1)), ["failed"]);
    assert!(
        stack
            .pg
            .one::<bool>("select count(*) > 0 and bool_and(found = 'disabled') from outbox.broken_triggers()")
    );
    open.commit().unwrap();
    wait_eq("the triggers", 0i64, || stack.pg.one(BROKEN));
    assert_eq!(types(&stack.wait_events(3)), ["looks", "soon", "open"]);
    wait_until("all to be published", || {
        stack.pg.one::<i64>("select pending from outbox.status") == 0
    });
}

/// Rows of `outbox.scheduled_events` that were inserted directly.
#[test]
fn a_plain_insert_of_a_scheduled_event_is_checked() {
    let stack = Stack::start();
    let insert = |columns: &str, values: &str| {
        format!(
            "insert into outbox.scheduled_events (event_type, source, scheduled_at{columns}) values ('x', 's', {values})"
        )
    };
    stack.pg.exec(&insert("", "now() + interval '300 ms'"));
    for (columns, values, code) in [
        ("", "'infinity'", "22023"),
        (", backend", "now(), 'nobody'", "42704"),
        (", publisher_config", "now(), '[1]'", "22023"),
        ("", "null", "23502"),
    ] {
        let error = stack.pg.client().batch_execute(&insert(columns, values)).unwrap_err();
        assert_eq!(error.code().unwrap().code(), code, "{values}");
    }
    assert_eq!(types(&stack.wait_events(1)), ["x"]);
}

/// A scheduled event of the dump fell due in the source before the restore: it was sent there.
#[test]
fn a_scheduled_event_that_was_sent_since_the_dump_is_not_repeated() {
    let stack = Stack::start();
    stack
        .pg
        .exec("select outbox.publish_event('soon', 's', scheduled_at => '2100-01-01')");
    let dump = stack.pg.pg_dump("postgres").replace("2100-01-01", "2020-01-01");
    assert!(dump.contains("2020-01-01"));
    stack.pg.exec("update outbox.scheduled_events set scheduled_at = now()");
    stack.pg.exec("select outbox.wake()");
    stack.wait_events(1);
    let target = Postgres::start();
    target.exec("create database copy");
    target.restore("copy", &dump);
    target.wait_log(
        "1 of the events after its saved position are already in the streams and are not repeated; 0 are sent",
    );
    target.exec_db("copy", "select outbox.publish_event('after', 's')");
    assert_eq!(types(&stack.wait_events(2)), ["soon", "after"]);
}

/// Inserts a row without the trigger, with a transaction id from long ago, in the transaction of these statements.
fn foreign_row(statements: &str) -> String {
    format!(
        "begin; alter table outbox.events disable trigger user;
         insert into outbox.events (seq, xid, created_at, event_id, backend_number, event_type, source, backend)
            select nextval('outbox.events_seq_seq'), '3', now(), gen_random_uuid(), number, 'foreign', 's', name
            from outbox.backends where name = 'default';
         do $$ declare t record; begin for t in select name from outbox.our_triggers() where relation = 'events' loop
            execute format('alter table outbox.events enable always trigger %I', t.name); end loop; end $$;
         {statements} commit"
    )
}

/// A transaction is seen before it tells others what it has changed. The worker must not take its rows for older than
/// the change.
#[test]
fn rows_that_are_seen_before_the_change_of_their_trigger_are_noticed() {
    let stack = Stack::of(
        Postgres::with(&[("outbox_relay.poll_interval", "200ms")]).faults(),
        Redis::start(),
    );
    stack.publish("first");
    kit::wait_drained(&stack.pg, "default");
    stack.pg.hold_at("at_commit");
    let mut client = stack.pg.client();
    let restore =
        std::thread::spawn(move || client.batch_execute(&foreign_row("select outbox.publish_event('seen', 's');")));
    stack.pg.wait_reached();
    assert_eq!(types(&stack.wait_events(2)), ["first", "seen"]);
    stack.pg.release();
    restore.join().expect("it does not panic").expect("it commits");
    assert_eq!(types(&stack.wait_events(3)), ["first", "seen", "foreign"]);
}

/// A step of the sweep that fails is tried again each second. It rests three times as long beside publishers only after
/// a step that has done something.
#[test]
fn a_sweep_that_somebody_held_up_goes_on_soon_beside_publishers() {
    let stack = Stack::start();
    let others = Bystander::start(&stack);
    let mut holder = stack.pg.client();
    let mut open = holder.transaction().unwrap();
    open.batch_execute("lock table outbox.restores in exclusive mode")
        .unwrap();
    stack.pg.exec(&foreign_row(""));
    stack
        .pg
        .wait_log("triggers of outbox_relay cannot be mended: canceling statement due to lock timeout");
    let released = Instant::now();
    open.commit().unwrap();
    stack
        .pg
        .wait_log("1 rows of outbox.events carried transaction ids of another cluster");
    let took = released.elapsed();
    assert!(took < Duration::from_millis(2_500), "{took:?}");
    assert_eq!(types(&stack.wait_events(1)), ["foreign"]);
    others.stop(&stack);
}
