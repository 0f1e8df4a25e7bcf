//! Foreign tables that are our tables on another server: who uses them has the rights of the role that they connect as.

use kit::{Postgres, Refused, Stack, env, wait_drained};
use postgres::Client;

/// A server whose schema `far` has foreign tables for all of ours, which connect as `publisher`, and a session of a
/// role that may use them.
fn start() -> (Stack, Postgres, Client) {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role publisher login; select outbox.grant_publisher('publisher', null, '{events,mine}')");
    let near = Postgres::with(&[]).start();
    near.exec(&format!(
        "create extension outbox_relay; create extension postgres_fdw; create role app login; create schema far;
         create server other foreign data wrapper postgres_fdw options (host '{}', dbname 'postgres', batch_size '40');
         create user mapping for public server other options (user 'publisher', password_required 'false');
         import foreign schema outbox from server other into far;
         create foreign table far.publishing (event_type text, source text, stream text, event_id uuid)
             server other options (schema_name 'outbox', table_name 'events');
         grant usage on schema far to app; grant all on all tables in schema far to app",
        stack.pg.host().display()
    ));
    let app = near.client_as("app", "postgres");
    (stack, near, app)
}

#[test]
fn foreign_tables_publish_within_the_rights_of_their_role() {
    if env::lacks(&["postgres_fdw"]) {
        return;
    }
    let (stack, _near, mut app) = start();
    // In batches of 40, by single rows, by COPY, and with what RETURNING may tell.
    app.batch_execute(
        "insert into far.publishing (event_type, source) select 't' || n, 's' from generate_series(1, 100) n",
    )
    .expect("published");
    let returned = app
        .query_one(
            "insert into far.publishing (event_type, source) values ('t101', 's') returning event_id::text, event_type",
            &[],
        )
        .expect("published");
    assert_eq!(returned.get::<_, &str>("event_type"), "t101");
    let mut copy = app
        .copy_in("copy far.publishing (event_type, source) from stdin")
        .expect("COPY");
    std::io::Write::write_all(&mut copy, b"t102\ts\nt103\ts\n").expect("sent");
    copy.finish().expect("published");
    app.batch_execute(
        "begin; insert into far.publishing (event_type, source) values ('never', 's'); rollback;
         begin; savepoint s; insert into far.publishing (event_type, source) values ('never', 's'); rollback to s;
         insert into far.publishing (event_type, source) values ('t104', 's'); commit",
    )
    .expect("published");
    let refused = [
        "insert into far.publishing (event_type, source, stream) values ('t', 's', 'of-others')",
        "insert into far.publishing (event_type, source, event_id) select 't', 's', EVENT from generate_series(1, 2)",
        "insert into far.events (event_type, source) values ('t', 's')",
        "insert into far.scheduled_events (event_type, source, scheduled_at) values ('t', 's', now())",
        "insert into far.cursors (backend_number) values (1)",
        "select from far.events",
        "select from far.backends",
        "select from far.backend_passwords",
        "select from far.status",
        "select from far.event_status",
        "update far.backends set host = 'evil'",
        "update far.events set event_type = 'x'",
        "delete from far.events",
        "truncate far.events",
        "select from far.publishing for update",
    ];
    for statement in refused {
        let sql = statement.replace("EVENT", &format!("'{}'", returned.get::<_, &str>("event_id")));
        let code = Refused::of(app.batch_execute(&sql)).code;
        assert!(code == "42501" || code == "23505" && sql != statement, "{sql}: {code}");
    }
    wait_drained(&stack.pg, "default");
    let expected: Vec<String> = (1..=104).map(|n| format!("t{n}")).collect();
    assert_eq!(kit::types(&stack.events()), expected);
}
