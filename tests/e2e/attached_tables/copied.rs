//! Rows and triggers that come from a dump or by replication.

use super::{event, heads, run, start, taken};
use kit::Refused;
use serde_json::json;

#[test]
fn a_dump_brings_attached_tables_and_publishes_nothing_while_it_is_restored() {
    let pg = start();
    pg.exec("create database restored");
    pg.exec("create schema \"S\"; create table \"S\".t (id int primary key, a text); insert into \"S\".t values (1, 'x'); select outbox.attach_table('\"S\".t', payload => 'both', condition => 'id > 0')");
    pg.restore("restored", &pg.pg_dump("postgres"));
    let mut c = pg.client_db("restored");
    assert_eq!(heads(&mut c), Vec::<String>::new());
    run(
        &mut c,
        "insert into \"S\".t values (2, 'y'), (-2, 'n'); update \"S\".t set a = 'z' where id = 1",
    );
    assert_eq!(
        taken(&mut c),
        [
            event("t.insert", "2", json!({"old": null, "new": {"id": 2, "a": "y"}})),
            event(
                "t.update",
                "1",
                json!({"old": {"id": 1, "a": "x"}, "new": {"id": 1, "a": "z"}})
            ),
        ]
    );
    let definition: String = pg.one_db("restored", "select definition from outbox.attached_tables");
    assert!(definition.contains("\"payload\": \"both\""), "{definition}");
    // DROP EXTENSION is refused while a table is attached.
    assert_eq!(
        Refused::of(c.batch_execute("drop extension outbox_relay")).code,
        "2BP01"
    );
    run(
        &mut c,
        "drop extension outbox_relay cascade; insert into \"S\".t values (3, 'w')",
    );
}

/// Rows that arrive from another server are published by that server.
#[test]
fn rows_that_replication_brings_are_not_published_again() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (id int primary key); select outbox.attach_table('t'); set session_replication_role = replica; insert into t values (1); reset session_replication_role",
    );
    assert_eq!(heads(&mut c), Vec::<String>::new());
}
