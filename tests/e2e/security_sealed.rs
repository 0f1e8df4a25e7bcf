//! A stored password is sealed: readers of its table cannot use it, and readers of the key have no table.

use kit::owners::{WATCHFUL, wait_caught_up};
use kit::{Mode, Postgres, QUICK, Redis, Refused, Stack, env, types, wait_drained, wait_trouble, wait_until};

const SECRET: &str = "Xq7-zK9.wQ2y";
const SET: &str = "select outbox.set_backend_password('default', 'Xq7-zK9.wQ2y')";
const LOGICAL: &[(&str, &str)] = &[("wal_level", "logical")];
const KEY: &str = "select umoptions[1] from pg_user_mapping";

fn start(settings: &[(&str, &str)]) -> Stack {
    Stack::of(
        Postgres::with(QUICK).with(settings),
        Redis::with(&["--requirepass", SECRET]),
    )
}

/// By a plugin that decodes all tables, and by a publication of all tables.
#[test]
fn logical_decoding_shows_no_password() {
    if env::lacks(&["test_decoding"]) {
        return;
    }
    let stack = start(LOGICAL);
    stack.pg.exec("create publication everything for all tables");
    stack.pg.exec("select pg_create_logical_replication_slot('plain', 'test_decoding'), pg_create_logical_replication_slot('published', 'pgoutput')");
    stack
        .pg
        .exec(&format!("{SET}; {SET}; update outbox.backends set max_len = 10"));
    stack.publish("t");
    wait_drained(&stack.pg, "default");
    stack
        .pg
        .exec(&format!("{SET}; select outbox.set_backend_password('default', null)"));
    let key: String = stack.pg.one(KEY);
    let key = key.strip_prefix("key=").expect("the key");
    assert_eq!(key.len(), 64);
    for sql in [
        "select string_agg(data, ' ') from pg_logical_slot_peek_changes('plain', null, null)",
        "select string_agg(encode(data, 'escape'), ' ') from pg_logical_slot_peek_binary_changes('published', null, null,
            'proto_version', '1', 'publication_names', 'everything')",
    ] {
        let decoded: String = stack.pg.one(sql);
        assert!(decoded.contains("backend_passwords"), "{sql} decodes nothing of it");
        // As text, and as bytea is shown.
        let hex: String = SECRET.bytes().map(|byte| format!("{byte:02x}")).collect();
        for text in [SECRET, &hex, key] {
            assert!(!decoded.contains(text), "{text} is in what {sql} says");
        }
    }
}

#[test]
fn no_role_sees_both_the_key_and_a_sealed_password() {
    let stack = start(&[]);
    stack.pg.exec(&format!(
        "{SET}; create role reader login in role pg_read_all_data, pg_monitor; create role nobody login"
    ));
    stack.publish("t");
    assert_eq!(types(&stack.wait_events(1)), ["t"]);
    let mut reader = stack.pg.client_as("reader", "postgres");
    let mut nobody = stack.pg.client_as("nobody", "postgres");
    assert_eq!(
        reader
            .query("table outbox.backend_passwords", &[])
            .expect("no right is missing")
            .len(),
        0
    );
    assert_eq!(Refused::of(nobody.simple_query("table pg_user_mapping")).code, "42501");
    for sql in [
        "select count(*) from pg_user_mappings where umoptions is not null",
        "select count(*) from information_schema.user_mapping_options where option_value is not null",
        "select count(*) from pg_foreign_server where srvoptions is not null",
    ] {
        assert_eq!(
            nobody.query_one(sql, &[]).expect("a catalog").get::<_, i64>(0),
            0,
            "{sql}"
        );
    }
    for sql in [
        "select outbox.seal_password(1, 'x')",
        "create user mapping for nobody server outbox_relay",
        "alter user mapping for public server outbox_relay options (set key '00')",
        "drop user mapping for public server outbox_relay",
    ] {
        assert_eq!(Refused::of(nobody.simple_query(sql)).code, "42501", "{sql}");
    }
    // It is dumped with the extension, and not without it.
    let dump = stack.pg.pg_dump("postgres");
    let key: String = stack.pg.one(KEY);
    assert!(!dump.contains(&key[4..]) && !dump.contains("USER MAPPING") && !dump.contains(SECRET));
    // The files that pg_upgrade copies.
    let upgrade = stack.pg.run("pg_dump", &["--binary-upgrade", "--schema-only"], "");
    assert!(upgrade.stdout.contains(&key[4..]), "{}", upgrade.stderr);
    let drop = "drop user mapping for public server outbox_relay";
    assert_eq!(Refused::of(stack.pg.client().simple_query(drop)).code, "2BP01");
    stack.pg.exec("drop extension outbox_relay");
    assert_eq!(stack.pg.one::<i64>("select count(*) from pg_user_mapping"), 0);
    stack.pg.extension();
    stack.pg.exec(SET);
    assert_ne!(stack.pg.one::<String>(KEY), key);
}

#[test]
fn a_password_without_its_key_must_be_set_again() {
    let stack = start(&[]);
    stack.pg.exec(SET);
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    let other = "0123456789abcdef".repeat(4);
    stack.pg.exec(&format!(
        "alter user mapping for public server outbox_relay options (set key '{other}')"
    ));
    // After the commit: no message reports it.
    stack.pg.exec("select outbox.wake()");
    wait_trouble(&stack.pg, "default", "misconfigured", "it was sealed with another key");
    stack.pg.wait_log("HINT:  The key is an option of a user mapping");
    stack.publish("two");
    stack.pg.exec(SET);
    stack.redis.wait_entries("events", 2);
    // The sealed password of one backend is invalid for another.
    stack.pg.exec(
        "insert into outbox.backends (name, host, port) select 'other', host, port from outbox.backends;
        insert into outbox.backend_passwords select b.number, p.password, p.destination from outbox.backend_passwords p, outbox.backends b
            where b.name = 'other'; select outbox.publish_event('t', 's', backend => 'other')",
    );
    wait_trouble(&stack.pg, "other", "misconfigured", "it was sealed with another key");
}

/// The key is replicated by streaming, also to a standby that existed before the key, and is in a base backup.
#[test]
fn a_standby_has_the_key() {
    let mut stack = Stack::of(
        Postgres::with(WATCHFUL).with(QUICK),
        Redis::with(&["--requirepass", SECRET]),
    );
    let standby = stack.pg.standby().start();
    stack.pg.exec(SET);
    stack.publish("one");
    wait_drained(&stack.pg, "default");
    wait_caught_up(&stack.pg, &standby);
    stack.pg.stop(Mode::Fast);
    standby.promote();
    standby.exec("select outbox.publish_event('two', 's')");
    wait_until("the entry", || stack.redis.xlen("events") == 2);
    assert_eq!(types(&stack.redis.entries("events")), ["one", "two"]);
}
