//! `include_lsn`: an entry names the position that a standby must have replayed to show the rows of the event's
//! transaction.

use kit::owners::wait_caught_up;
use kit::process::signal;
use kit::{Entry, LIMIT, Mode, Postgres, Redis, Stack, eventually, wait_drained, wait_eq, wait_until};
use nix::sys::signal::Signal;
use postgres::Client;
use std::time::Duration;

/// A primary that adds positions, its standby, and a table.
fn with_standby(settings: &[(&str, &str)]) -> (Stack, Postgres) {
    let stack = Stack::of(
        Postgres::with(&[
            ("max_prepared_transactions", "5"),
            ("outbox_relay.poll_interval", "300ms"),
        ])
        .with(settings),
        Redis::start(),
    );
    stack.pg.exec("create table things (name text)");
    stack.pg.exec("update outbox.backends set include_lsn = true");
    let standby = stack.pg.standby().start();
    (stack, standby)
}

/// Commits a row of this name, and its event. Also returns the write position of the WAL before the commit record.
fn commit(client: &mut Client, name: &str, prepared: bool) -> u64 {
    client
        .batch_execute(&format!(
            "begin; insert into things values ('{name}'); select outbox.publish_event('{name}', 'kit')"
        ))
        .unwrap();
    let written = |client: &mut Client| {
        let row = client.query_one("select pg_current_wal_insert_lsn()::text", &[]);
        position(&row.unwrap().get::<_, String>(0))
    };
    if prepared {
        client.batch_execute(&format!("prepare transaction '{name}'")).unwrap();
        let before = written(client);
        client.batch_execute(&format!("commit prepared '{name}'")).unwrap();
        return before;
    }
    let before = written(client);
    client.batch_execute("commit").unwrap();
    before
}

/// A `pg_lsn`.
fn position(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap_or_else(|| panic!("no position: {text:?}"));
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap_or_else(|e| panic!("{text:?}: {e}"));
    number(high) << 32 | number(low)
}

fn pause(standby: &Postgres) {
    standby.exec("select pg_wal_replay_pause()");
    // It is paused at the next record, or when it waits for one.
    wait_eq("a paused replay", "paused".to_owned(), || {
        standby.one("select pg_get_wal_replay_pause_state()")
    });
}

fn resume(standby: &Postgres) {
    standby.exec("select pg_wal_replay_resume()");
}

fn shows(standby: &Postgres, name: &str) -> bool {
    standby.one(&format!("select exists (select from things where name = '{name}')"))
}

/// The query of a consumer before it reads.
fn has_replayed(standby: &Postgres, entry: &Entry) -> bool {
    standby.one(&format!(
        "select not pg_is_in_recovery() or pg_last_wal_replay_lsn() >= '{}'::pg_lsn",
        entry.field("lsn")
    ))
}

#[test]
fn a_standby_that_has_replayed_an_entrys_position_shows_its_row_and_one_that_lags_does_not() {
    let (stack, standby) = with_standby(&[]);
    let mut client = stack.pg.client();
    for (count, (setting, prepared)) in [("on", false), ("off", false), ("off", true)].into_iter().enumerate() {
        let name = format!("thing{count}");
        client
            .batch_execute(&format!("set synchronous_commit = {setting}"))
            .unwrap();
        wait_caught_up(&stack.pg, &standby);
        pause(&standby);
        commit(&mut client, &name, prepared);
        let entry = stack.wait_events(count + 1).remove(count);
        assert!(!has_replayed(&standby, &entry), "{entry:?}");
        assert!(!shows(&standby, &name));
        resume(&standby);
        // Nothing else is written: the standby reaches the position without later WAL.
        wait_until("the position to be replayed", || has_replayed(&standby, &entry));
        assert!(shows(&standby, &name), "{name}");
    }
}

#[test]
fn a_position_is_never_before_the_commit_record() {
    let (stack, _standby) = with_standby(&[]);
    let publishers: Vec<_> = ["on", "off", "local"]
        .into_iter()
        .map(|setting| {
            let mut client = stack.pg.client();
            client
                .batch_execute(&format!("set synchronous_commit = {setting}"))
                .unwrap();
            std::thread::spawn(move || -> Vec<(String, u64)> {
                let name = |i: usize| format!("{setting}{i}");
                (0..60)
                    .map(|i| (name(i), commit(&mut client, &name(i), i % 10 == 9)))
                    .collect()
            })
        })
        .collect();
    let committed: Vec<_> = publishers.into_iter().flat_map(|p| p.join().unwrap()).collect();
    let entries = stack.wait_events(committed.len());
    let flushed = position(&stack.pg.one::<String>("select pg_current_wal_flush_lsn()::text"));
    for (name, before) in committed {
        let entry = entries.iter().find(|entry| entry.field("event_type") == name).unwrap();
        let told = position(entry.field("lsn"));
        assert!(
            before < told && told <= flushed,
            "{name}: {before:X} {told:X} {flushed:X}"
        );
    }
}

/// Its replay waits, and it has the WAL on disk: the sender waits for the disk, not for the replay.
#[test]
fn with_standby_flush_an_entry_comes_before_a_standby_shows_its_row() {
    let (stack, standby) = with_standby(&[("outbox_relay.send_after", "standby_flush")]);
    stack.pg.set("synchronous_standby_names", "*");
    wait_eq("synchronous standbys", 1i64, || {
        stack
            .pg
            .one("select count(*) from pg_stat_replication where sync_state = 'sync'")
    });
    wait_caught_up(&stack.pg, &standby);
    pause(&standby);
    commit(&mut stack.pg.client(), "thing", false);
    let entry = stack.wait_events(1).remove(0);
    assert!(!has_replayed(&standby, &entry) && !shows(&standby, "thing"));
    resume(&standby);
    wait_until("the position to be replayed", || has_replayed(&standby, &entry));
    assert!(shows(&standby, "thing"));
}

/// Where the WAL writer stops at the beginning of a page, in the middle of a record that nobody flushes the rest of, a
/// standby replays only what comes before the record.
#[test]
fn a_position_is_never_in_the_middle_of_a_record() {
    let (stack, standby) = with_standby(&[("outbox_relay.poll_interval", "1h"), ("wal_writer_delay", "10ms")]);
    stack.publish("first");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    // It takes its tick once the WAL is as it shall be, and has nothing of its own to save before.
    let worker = stack.pg.wait_worker("postgres");
    signal(worker, Signal::SIGSTOP);
    let mut client = stack.pg.client();
    commit(&mut client, "thing", false);
    // Nobody commits any more, so nothing asks for the rest of a page.
    client.batch_execute("begin").unwrap();
    let record_end = eventually("the WAL to be flushed up to the beginning of a page", LIMIT, || {
        client
            .batch_execute("select pg_logical_emit_message(false, 'kit', repeat('x', 20000))")
            .unwrap();
        (0..50).find_map(|_| {
            std::thread::sleep(Duration::from_millis(10));
            let row = client
                .query_one(
                    "select pg_current_wal_flush_lsn()::text, pg_current_wal_insert_lsn()::text",
                    &[],
                )
                .unwrap();
            let (flushed, inserted) = (position(&row.get::<_, String>(0)), position(&row.get::<_, String>(1)));
            (flushed % 8192 == 0 && flushed < inserted).then_some(inserted)
        })
    });
    signal(worker, Signal::SIGCONT);
    let entry = stack.wait_events(2).remove(1);
    let told = position(entry.field("lsn"));
    assert!(told >= record_end, "{told:X} {record_end:X}");
    wait_until("the position to be replayed", || has_replayed(&standby, &entry));
    assert!(shows(&standby, "thing"));
}

#[test]
fn after_a_promotion_positions_go_on_and_the_new_primary_shows_all() {
    let (mut stack, standby) = with_standby(&[]);
    commit(&mut stack.pg.client(), "old", false);
    let old = stack.wait_events(1).remove(0);
    wait_caught_up(&stack.pg, &standby);
    stack.pg.stop(Mode::Fast);
    standby.promote();
    standby.wait_worker("postgres");
    // A position of the old primary that a consumer has stored does not make it wait for ever.
    assert!(has_replayed(&standby, &old) && shows(&standby, "old"));
    let next = standby.standby().start();
    wait_caught_up(&standby, &next);
    pause(&next);
    let before = commit(&mut standby.client(), "new", false);
    let new = stack.wait_events(2).remove(1);
    assert!(position(new.field("lsn")) > before.max(position(old.field("lsn"))));
    assert!(has_replayed(&next, &old) && !has_replayed(&next, &new) && !shows(&next, "new"));
    resume(&next);
    wait_until("the position to be replayed", || has_replayed(&next, &new));
    assert!(shows(&next, "new"));
}

/// The rest of a batch, refused events, and events from an earlier run of the server.
#[test]
fn events_that_are_sent_late_tell_a_position_too() {
    let (mut stack, _standby) = with_standby(&[
        ("outbox_relay.retry_delay", "100ms"),
        ("outbox_relay.max_retries", "1000"),
    ]);
    stack.redis.call(&["SET", "bad", "a string"]);
    stack
        .pg
        .exec("select outbox.publish_event('refused', 'kit', stream => 'bad')");
    wait_eq("refused events", 1i64, || {
        stack.pg.one("select count(*) from outbox.refused_events")
    });
    let before = position(&stack.pg.one::<String>("select pg_current_wal_insert_lsn()::text"));
    stack.redis.call(&["DEL", "bad"]);
    let entry = stack.redis.wait_entries("bad", 1).remove(0);
    assert!(position(entry.field("lsn")) > 0 && before > 0);

    stack.pg.exec("update outbox.backends set enabled = false");
    let before = commit(&mut stack.pg.client(), "waits", false);
    stack.pg.restart();
    stack.pg.exec("update outbox.backends set enabled = true");
    let entry = stack.wait_events(1).remove(0);
    assert!(position(entry.field("lsn")) > before);
}
