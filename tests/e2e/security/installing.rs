//! Who installs the extension, and into which schema.

use super::{EVIL, assert_nothing_was_won, start};
use kit::{Postgres, Refused, wait_until};

#[test]
fn a_schema_that_was_there_before_is_not_moved_into() {
    let pg = Postgres::start();
    pg.exec(EVIL);
    pg.exec("grant create on database postgres to mallory");
    let mut mallory = pg.client_as("mallory", "postgres");
    mallory.batch_execute("create schema outbox").expect("its own schema");
    let mut admin = pg.client();
    let create = "create extension outbox_relay";
    let expected = Refused::new(
        "55000",
        "schema \"outbox\" exists, but is not empty or not owned by a superuser",
        "It belongs to \"mallory\".",
        "Drop or rename that schema: the extension creates its own.",
    );
    assert_eq!(Refused::of(admin.simple_query(create)), expected);
    // With operators and functions that its script might call by mistake.
    mallory
        .batch_execute(
            "create function outbox.equal(text, text) returns boolean language sql as $$select evil.run('=')$$;
            create operator outbox.= (leftarg = text, rightarg = text, function = outbox.equal);
            create function outbox.oid_equal(oid, oid) returns boolean language sql as $$select evil.run('oid =')$$;
            create operator outbox.= (leftarg = oid, rightarg = oid, function = outbox.oid_equal);
            create function outbox.pg_get_userbyid(oid) returns name language sql as $$select 'x'::name where evil.run('name')$$;
            create table outbox.events (seq bigint)",
        )
        .expect("its own schema");
    assert_eq!(Refused::of(admin.simple_query(create)), expected);
    pg.exec("alter schema outbox owner to postgres");
    assert_eq!(
        Refused::of(admin.simple_query(create)).detail.as_deref(),
        Some("It belongs to \"postgres\".")
    );
    assert_nothing_was_won(&pg, "nobody");
    pg.exec("drop schema outbox cascade; create schema outbox");
    admin.batch_execute(create).expect("an empty schema of a superuser");
    pg.exec("drop extension outbox_relay");
    pg.exec("drop schema if exists outbox; create extension outbox_relay");
}

#[test]
fn only_a_superuser_creates_the_extension() {
    let stack = start();
    stack.pg.exec("create database other owner mallory");
    let mut own = stack.pg.client_as("mallory", "other");
    assert_eq!(
        Refused::of(own.simple_query("create extension outbox_relay")).code,
        "42501"
    );
    stack.pg.exec_db("other", "create extension outbox_relay");
    // Also as the owner of the database.
    for sql in [
        "drop extension outbox_relay",
        "alter extension outbox_relay update",
        "alter extension outbox_relay drop table outbox.events",
        "alter schema outbox owner to mallory",
        "alter schema outbox rename to mine",
        "alter table outbox.events owner to mallory",
        "alter table outbox.events disable trigger all",
        "alter table outbox.events add column x text",
        "alter table outbox.events enable row level security",
        "alter table outbox.events replica identity full",
        "create policy p on outbox.events",
        "create rule r as on insert to outbox.events do nothing",
        "create index on outbox.events (seq)",
        "create trigger t after insert on outbox.events execute function evil.trigger()",
        "create statistics evil_stats on seq, xid from outbox.events",
        "alter function outbox.publish_events owner to mallory",
        "alter function outbox.set_backend_password security invoker",
        "create function outbox.mine() returns void language sql as ''",
        "create table outbox.mine ()",
        "alter sequence outbox.events_seq_seq cache 10",
        "reassign owned by postgres to mallory",
        "drop owned by postgres",
        "create event trigger e on ddl_command_end execute function evil.trigger()",
        "create publication p for table outbox.backend_passwords",
        "comment on table outbox.events is 'mine'",
        "do $$ begin lock table outbox.events; end $$",
        "analyze outbox.backend_passwords",
    ] {
        match own.simple_query(sql) {
            Err(error) => {
                let said = Refused::of::<()>(Err(error));
                assert!(
                    ["42501", "3F000", "42P01"].contains(&said.code.as_str()),
                    "{sql}: {said:?}"
                );
            }
            // ANALYZE reports that by a warning.
            Ok(_) => assert!(sql.starts_with("analyze"), "{sql}"),
        }
    }
    // A setting of the database does not give its worker another role.
    stack.pg.exec_db(
        "other",
        "alter database other set role = mallory; alter database other set search_path = evil, public",
    );
    stack.pg.exec_db(
        "other",
        &format!(
            "set role none; update outbox.backends set port = {}",
            stack.redis.port()
        ),
    );
    let worker = stack.pg.wait_worker("other");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    wait_until("another worker", || {
        stack.pg.worker_pid("other").is_some_and(|pid| pid != worker)
    });
    stack
        .pg
        .exec_db("other", "set role none; select outbox.publish_event('t', 's')");
    stack.wait_events(1);
    // Dropping a role removes its grants, and nothing else.
    stack.pg.exec("select outbox.grant_publisher('mallory')");
    stack.pg.exec("drop owned by mallory cascade");
    let mut mallory = stack.pg.client_as("mallory", "postgres");
    assert_eq!(
        Refused::of(mallory.simple_query("select outbox.publish_event('t', 's')")).code,
        "42501"
    );
    stack.publish("still there");
    stack.wait_events(2);
}
