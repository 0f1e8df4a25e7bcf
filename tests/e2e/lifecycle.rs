//! The extension is created and dropped, and its worker comes and goes with it: without a restart, and without blocking
//! others.

use kit::{
    BlackHole, Ledger, Load, Postgres, QUICK, Redis, Refused, Stack, env, ids, process, promptly, publish_many, types,
    wait_drained, wait_eq, wait_until,
};

#[track_caller]
fn wait_gone(pg: &Postgres, worker: i32) {
    wait_eq("the worker's title", String::new(), || process::title(worker));
    assert_eq!(pg.worker_pid("postgres"), None);
}

fn processes(pg: &Postgres, backend_type: &str) -> i64 {
    pg.one(&format!(
        "select count(*) from pg_stat_activity where backend_type = '{backend_type}'"
    ))
}

#[test]
fn the_library_alone_runs_a_launcher_and_no_worker() {
    let pg = Postgres::start();
    wait_eq("launchers", 1, || processes(&pg, "outbox_relay launcher"));
    wait_eq("workers", 0, || processes(&pg, "outbox_relay worker"));
    assert_eq!(pg.one::<Option<String>>("select to_regnamespace('outbox')::text"), None);
}

#[test]
fn the_extension_starts_a_worker_and_dropping_it_ends_it() {
    let pg = Postgres::start();
    let redis = Redis::start();
    for round in 0..3 {
        pg.extension();
        let worker = pg.wait_worker("postgres");
        wait_eq("the state", (Some(worker), "running".to_string()), || {
            let row = pg
                .client()
                .query_one("select worker_pid, state from outbox.status", &[])
                .unwrap();
            (row.get(0), row.get(1))
        });
        assert!(process::title(worker).contains("outbox_relay worker"));
        pg.exec(&format!(
            "update outbox.backends set host = '127.0.0.1', port = {}, stream_name = 'round{round}'",
            redis.port()
        ));
        let published = publish_many(&mut pg.client(), "default", "", "event", 3);
        assert_eq!(ids(&redis.wait_entries(&format!("round{round}"), 3)), published);
        promptly(&pg, "drop extension outbox_relay");
        wait_gone(&pg, worker);
    }
    wait_eq("launchers", 1, || processes(&pg, "outbox_relay launcher"));
}

/// A rolled back CREATE or DROP changes nothing.
#[test]
fn a_rolled_back_statement_neither_starts_nor_ends_a_worker() {
    let stack = Stack::start();
    let worker = stack.pg.wait_worker("postgres");
    let mut client = stack.pg.client();
    client
        .batch_execute("begin; drop extension outbox_relay; rollback")
        .unwrap();
    let published = publish_many(&mut client, "default", "", "event", 3);
    assert_eq!(ids(&stack.wait_events(3)), published);
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
}

/// The worker looks for the extension when the transaction has committed, not when the command has run.
#[test]
fn a_worker_comes_with_the_commit_of_the_extension() {
    let pg = Postgres::start();
    let redis = Redis::start();
    let mut client = pg.client();
    client.batch_execute("begin; create extension outbox_relay").unwrap();
    client
        .execute(
            "update outbox.backends set host = '127.0.0.1', port = $1",
            &[&i32::from(redis.port())],
        )
        .unwrap();
    let published = publish_many(&mut client, "default", "", "event", 2);
    assert_eq!(pg.worker_pid("postgres"), None);
    client.batch_execute("commit").unwrap();
    assert_eq!(ids(&redis.wait_entries("events", 2)), published);
}

/// It can be created all the same, and the session gets a warning about what is missing.
#[test]
fn without_the_library_preloaded_creating_the_extension_warns() {
    let pg = Postgres::with(&[("shared_preload_libraries", "")]).start();
    for (create, drop) in [
        ("create extension outbox_relay", "drop extension outbox_relay"),
        ("create extension if not exists outbox_relay cascade", "select 1"),
    ] {
        let ran = pg.psql(&["-c", create]);
        assert!(ran.ok, "{}", ran.stderr);
        assert_eq!(
            ran.stderr,
            "WARNING:  outbox_relay is not preloaded: events are kept, but not sent\n\
             HINT:  Add outbox_relay to shared_preload_libraries and restart the server.\n"
        );
        pg.exec(drop);
    }
    assert_eq!(
        pg.one::<String>("select state from outbox.status"),
        "library not in shared_preload_libraries"
    );
    let preloaded = Postgres::start();
    assert_eq!(preloaded.psql(&["-c", "create extension outbox_relay"]).stderr, "");
}

/// COMMIT PREPARED is recognised by the name of the prepared transaction, whatever stands before it in its text.
#[test]
fn a_prepared_extension_gets_its_worker_when_it_is_committed() {
    let pg = Postgres::with(&[("outbox_relay.poll_interval", "1h")]).start();
    let redis = Redis::start();
    let mut client = pg.client();
    let point = format!("update outbox.backends set host = '127.0.0.1', port = {}", redis.port());
    client
        .batch_execute(&format!(
            "begin; create extension outbox_relay; {point}; prepare transaction 'extension'"
        ))
        .unwrap();
    wait_eq("workers", 0, || processes(&pg, "outbox_relay worker"));
    client
        .batch_execute("/* of a tool */ commit prepared 'extension'")
        .unwrap();
    pg.wait_worker("postgres");
    client
        .batch_execute("begin; select outbox.publish_event('prepared', 'kit'); prepare transaction 'event'")
        .unwrap();
    client.execute("commit prepared 'event'", &[]).unwrap();
    assert_eq!(types(&redis.wait_entries("events", 1)), ["prepared"]);
}

#[test]
fn dropping_the_extension_waits_neither_for_a_drain_nor_for_redis() {
    let stack = Stack::start();
    Ledger::create(&stack.pg);
    let load = Load::start(&stack.pg, 2, "");
    load.wait_more(100);
    let worker = stack.pg.wait_worker("postgres");
    // Waits only for publishers' transactions, which are short.
    promptly(&stack.pg, "drop extension outbox_relay cascade");
    wait_gone(&stack.pg, worker);
    load.stop();

    for hole in [BlackHole::start(), BlackHole::unreachable()] {
        stack.pg.extension();
        stack.point_at("default", "127.0.0.1", hole.port());
        publish_many(&mut stack.pg.client(), "default", "", "event", 3);
        let worker = stack.pg.wait_worker("postgres");
        promptly(&stack.pg, "drop extension outbox_relay");
        wait_gone(&stack.pg, worker);
    }

    stack.pg.extension();
    stack.point("default", &stack.redis);
    publish_many(&mut stack.pg.client(), "default", "other", "event", 1);
    stack.redis.wait_entries("other", 1);
    stack.redis.sigstop();
    publish_many(&mut stack.pg.client(), "default", "other", "event", 1);
    let worker = stack.pg.wait_worker("postgres");
    promptly(&stack.pg, "drop extension outbox_relay");
    wait_gone(&stack.pg, worker);
    stack.redis.sigcont();
}

#[test]
fn dropping_the_schema_takes_the_extension_and_the_worker() {
    let stack = Stack::start();
    let worker = stack.pg.wait_worker("postgres");
    let refused = Refused::of(stack.pg.client().batch_execute("drop schema outbox"));
    assert_eq!(refused.code, "2BP01", "{refused:?}");
    promptly(&stack.pg, "drop schema outbox cascade");
    wait_gone(&stack.pg, worker);
    assert_eq!(
        stack
            .pg
            .one::<i64>("select count(*) from pg_extension where extname = 'outbox_relay'"),
        0
    );
    stack.pg.extension();
    stack.pg.wait_worker("postgres");
}

/// Another schema of that name: the worker looks, finds no extension, and ends without a message.
#[test]
fn a_schema_without_the_extension_gets_no_worker() {
    let mut pg = Postgres::start();
    pg.exec("create schema outbox; create table outbox.events (id integer); create table outbox.backends (name text)");
    pg.restart();
    wait_eq("launchers", 1, || processes(&pg, "outbox_relay launcher"));
    let refused = Refused::of(pg.client().batch_execute("create extension outbox_relay"));
    assert_eq!(refused.code, "55000", "{refused:?}");
    wait_eq("workers", 0, || processes(&pg, "outbox_relay worker"));
    for word in ["WARNING", "PANIC", "terminating connection because of crash"] {
        assert!(!pg.log().contains(word), "{word} in the log");
    }
}

#[test]
fn another_version_idles_the_worker_until_it_is_set_right() {
    let stack = Stack::with(&[("outbox_relay.poll_interval", "200ms")]);
    let before = stack.publish("before");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let right: String = stack
        .pg
        .one("select extversion from pg_extension where extname = 'outbox_relay'");
    let worker = stack.pg.wait_worker("postgres");
    stack
        .pg
        .exec("update pg_extension set extversion = '0.0.9' where extname = 'outbox_relay'");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    stack
        .pg
        .wait_log("outbox_relay worker is idle: library and extension have different versions");
    stack
        .pg
        .wait_log(&format!("The library has version {right}, the extension 0.0.9."));
    wait_eq("the state", "version mismatch".to_string(), || {
        stack.pg.one("select state from outbox.status")
    });
    let meanwhile = stack.publish("meanwhile");
    let idle = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!(
        "update pg_extension set extversion = '{right}' where extname = 'outbox_relay'"
    ));
    assert_eq!(ids(&stack.wait_events(2)), [before, meanwhile]);
    wait_eq("the state", "running".to_string(), || {
        stack.pg.one("select state from outbox.status")
    });
    assert_eq!(stack.pg.worker_pid("postgres"), Some(idle));
    let said = stack.pg.log().matches("different versions").count();
    assert_eq!(said, 1, "it said so {said} times");
}

/// With a second for a minute.
#[test]
fn the_reason_for_a_missing_worker_is_logged_each_minute() {
    let mut pg = Postgres::with(QUICK).faults().stopped();
    pg.mutation("short_minutes");
    pg.start_again();
    pg.extension();
    pg.wait_worker("postgres");
    let said_thrice = |words: &str| {
        wait_until(&format!("the log to say thrice: {words}"), || {
            pg.log().matches(words).count() >= 3
        });
    };
    for (setting, value, words) in [
        (
            "outbox_relay.enabled",
            "off",
            "no database has a worker of outbox_relay: outbox_relay.enabled is off",
        ),
        (
            "outbox_relay.databases",
            "other",
            "no worker of outbox_relay in \"postgres\": excluded by outbox_relay.databases",
        ),
    ] {
        pg.set(setting, value);
        said_thrice(words);
        pg.exec(&format!("alter system reset {setting}"));
        pg.exec("select pg_reload_conf()");
        pg.wait_worker("postgres");
    }
    pg.exec("update pg_extension set extversion = '0.0.9' where extname = 'outbox_relay'");
    pg.exec("select pg_terminate_backend(pid) from pg_stat_activity where backend_type = 'outbox_relay worker'");
    said_thrice("outbox_relay worker is idle: library and extension have different versions");
}

/// While the work is done, and not for longer.
#[test]
fn pg_stat_activity_says_what_the_worker_is_doing() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let shown = || {
        stack.pg.one::<String>(
            "select concat(state, ': ', query) from pg_stat_activity where backend_type = 'outbox_relay worker'",
        )
    };
    wait_eq("what is shown", "idle: ".to_string(), shown);
    let mut locker = stack.pg.client();
    locker
        .batch_execute("begin; lock table outbox.cursors in share mode")
        .expect("a lock");
    stack.publish("two");
    wait_eq("what is shown", "active: saving cursors".to_string(), shown);
    locker.batch_execute("rollback").expect("it ends");
    wait_eq("what is shown", "idle: ".to_string(), shown);
}

#[test]
fn a_terminated_launcher_comes_back_and_disturbs_no_worker() {
    let stack = Stack::start();
    let worker = stack.pg.wait_worker("postgres");
    let launcher: i32 = stack
        .pg
        .one("select pid from pg_stat_activity where backend_type = 'outbox_relay launcher'");
    stack.pg.exec(&format!("select pg_terminate_backend({launcher})"));
    wait_until("another launcher", || {
        stack.pg.one::<bool>(&format!(
            "select exists (select from pg_stat_activity where backend_type = 'outbox_relay launcher' and pid <> {launcher})"
        ))
    });
    let event = stack.publish("event");
    assert_eq!(ids(&stack.wait_events(1)), [event]);
    assert_eq!(stack.pg.worker_pid("postgres"), Some(worker));
    // The new launcher looks after the worker of the old one.
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    wait_until("another worker", || {
        stack.pg.worker_pid("postgres").is_some_and(|pid| pid != worker)
    });
    assert_eq!(processes(&stack.pg, "outbox_relay worker"), 1);
    stack.publish("again");
    assert_eq!(types(&stack.wait_events(2)), ["event", "again"]);
}

/// From 17 on the wait events have names, and from 18 on a session can query the version of the library.
#[test]
fn pg_stat_activity_and_the_library_give_their_names_and_versions() {
    let stack = Stack::start();
    stack.pg.wait_worker("postgres");
    for (process, named) in [("worker", "OutboxRelayWorker"), ("launcher", "OutboxRelayLauncher")] {
        let expected = match env::postgres_major() {
            15 | 16 => "Extension",
            _ => named,
        };
        wait_eq("the wait event", Some(format!("Extension/{expected}")), || {
            stack.pg.one::<Option<String>>(&format!(
                "select max(wait_event_type || '/' || wait_event) from pg_stat_activity where backend_type = 'outbox_relay {process}'"
            ))
        });
    }
    if env::postgres_major() >= 18 {
        let loaded: String = stack.pg.one(
            "select module_name || ' ' || version from pg_get_loaded_modules() where file_name like 'outbox_relay%'",
        );
        assert_eq!(loaded, concat!("outbox_relay ", env!("CARGO_PKG_VERSION")));
    }
}

/// The worker waits for a lock to save what was sent, and then finds another extension's tables under the same names.
#[test]
fn what_was_not_saved_of_a_dropped_extension_is_not_saved_in_the_next() {
    let stack = Stack::with(QUICK);
    stack.publish("before");
    wait_drained(&stack.pg, "default");
    stack.publish("unsaved");
    stack.wait_events(2);
    let mut other = stack.pg.client();
    other
        .batch_execute("begin; drop extension outbox_relay cascade; create extension outbox_relay")
        .unwrap();
    let waits = "select count(*) from pg_locks where relation = 'outbox.cursors'::regclass and not granted";
    wait_eq("the worker waits to save", 1, || stack.pg.one::<i64>(waits));
    other.batch_execute("commit").unwrap();
    stack.point("default", &stack.redis);
    stack.publish("after");
    wait_drained(&stack.pg, "default");
    assert_eq!(
        stack.pg.one::<i64>("select published_total from outbox.backend_status"),
        1
    );
    assert!(!stack.pg.log().contains("ERROR"), "{}", stack.pg.log());
}

/// The same of what the worker has seen: consumer groups in Redis, and up to where events were delivered.
#[test]
fn what_was_seen_of_a_dropped_extension_is_not_written_in_the_next() {
    let old_groups = "select count(*) from outbox.consumer_groups where stream = 'old'";
    let old_ticks = "select count(*) from outbox.ticks t, pg_extension e where e.extname = 'outbox_relay' and t.reached_at > '-infinity'
            and not pg_visible_in_snapshot(e.xmin::text::xid8, t.snapshot)";
    for (table, old) in [("consumer_groups", old_groups), ("ticks", old_ticks)] {
        let stack = Stack::of(
            Postgres::with(QUICK).with(&[("outbox_relay.published_retention", "1min")]),
            Redis::start(),
        );
        stack.pg.exec("update outbox.backends set stream_name = 'old'");
        stack.publish("before");
        wait_until("it to be written", || {
            stack.pg.exec("select from outbox.consumers");
            stack.pg.one::<i64>(&format!("select count(*) from outbox.{table}")) > 0
        });
        stack.publish("more");
        let mut other = stack.pg.client();
        other
            .batch_execute("begin; drop extension outbox_relay cascade; create extension outbox_relay")
            .unwrap();
        let waits =
            format!("select count(*) from pg_locks where relation = 'outbox.{table}'::regclass and not granted");
        wait_eq("the worker waits to write", 1, || stack.pg.one::<i64>(&waits));
        other.batch_execute("commit").unwrap();
        stack.point("default", &stack.redis);
        stack.publish("after");
        stack.wait_events(1);
        assert_eq!(stack.pg.one::<i64>(old), 0, "{table}");
        assert!(!stack.pg.log().contains("ERROR"), "{}", stack.pg.log());
    }
}

/// Sessions keep prepared statements, plans and cursors while the extension is dropped and created again, also within
/// their own transactions.
#[test]
fn open_sessions_go_on_with_an_extension_that_is_created_again() {
    let stack = Stack::with(&[("max_prepared_transactions", "2")]);
    let mut client = stack.pg.client();
    let prepare = "prepare called as select outbox.publish_event('called', 's');
        prepare inserted as insert into outbox.events (event_type, source) values ('inserted', 's');
        prepare several as select outbox.publish_events('[{\"event_type\": \"several\", \"source\": \"s\"}]');
        prepare new as insert into outbox.events (event_type, source, event_id) values ('new', 's', gen_random_uuid())
            on conflict (event_id) do nothing returning event_id;
        prepare here as select count(*) from outbox.published_here(); prepare state as select state from outbox.status";
    let execute = "execute called; execute inserted; execute several; execute new; execute here; execute state;";
    let count = |stack: &Stack| stack.pg.one::<i64>("select count(*) from outbox.events");
    for mode in ["auto", "force_generic_plan", "force_custom_plan"] {
        client
            .batch_execute(&format!("deallocate all; set plan_cache_mode = {mode}; {prepare}"))
            .expect(mode);
        for _ in 0..6 {
            client.batch_execute(execute).expect(mode);
        }
        stack.pg.exec("drop extension outbox_relay");
        for name in ["called", "inserted", "several", "new", "here", "state"] {
            client.batch_execute(&format!("execute {name}")).expect_err(name);
        }
        stack.pg.exec("create extension outbox_relay");
        client.batch_execute(execute).expect(mode);
        client.batch_execute(&format!("discard plans; {execute}")).expect(mode);
        assert_eq!(count(&stack), 8, "{mode}");
    }
    let anew = "drop extension outbox_relay; create extension outbox_relay;";
    // What each of these leaves of the events that were published.
    for (statements, left) in [
        (format!("execute called; {anew} execute called; execute new; commit"), 2),
        (
            format!("savepoint s; {anew} execute called; rollback to s; execute inserted; commit"),
            3,
        ),
        (format!("{anew} execute called; rollback"), 3),
        ("execute called; drop extension outbox_relay; rollback".to_owned(), 3),
        (
            format!("{anew} execute called; prepare transaction 'anew'; commit prepared 'anew'"),
            1,
        ),
        (
            format!(
                "declare c cursor for select outbox.publish_event('c', 's') from generate_series(1, 5);
                 fetch 2 from c; {anew} fetch 2 from c; commit"
            ),
            2,
        ),
    ] {
        client.batch_execute("rollback").expect("an end");
        for statement in format!("begin; {statements}").split_inclusive(';') {
            client
                .batch_execute(statement)
                .unwrap_or_else(|error| panic!("{statements}: {statement}: {error:?}"));
        }
        assert_eq!(count(&stack), left, "{statements}");
    }
    stack.point("default", &stack.redis);
    wait_drained(&stack.pg, "default");
    assert!(!stack.pg.log().contains("terminated by signal"));
}
