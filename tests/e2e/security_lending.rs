//! What one role lets another do in its name, by views, rules, functions and changes of the role, is no more than it
//! may do itself.

use kit::{Refused, Stack};
use postgres::Client;

/// Roles `app`, which may publish, and `nobody`, which may not.
fn start(limits: &str) -> (Stack, Client, Client) {
    let stack = Stack::start();
    stack.pg.exec(&format!(
        "create role app login; create role nobody login; create schema lent authorization app;
         grant usage on schema lent to public;
         select outbox.grant_publisher('app'{limits})"
    ));
    let [app, nobody] = ["app", "nobody"].map(|role| stack.pg.client_as(role, "postgres"));
    (stack, app, nobody)
}

/// Whoever inserts through them needs no right of its own.
const VIEWS: &str = "
    create view lent.events as select event_type, source, backend, stream from outbox.events;
    create view lent.upon as select * from lent.events;
    create table lent.ruled (event_type text, stream text);
    create rule publish as on insert to lent.ruled do instead
        insert into outbox.events (event_type, source, stream) values (new.event_type, 's', new.stream);
    create function lent.publish(stream text) returns void language sql security definer set search_path = pg_catalog, pg_temp
        as $$ insert into outbox.events (event_type, source, stream) values ('t', 's', stream) $$;
    grant insert on lent.events, lent.upon, lent.ruled to nobody";

const WAYS: [&str; 4] = [
    "insert into lent.events (event_type, source, stream) values ('t', 's', 'S')",
    "insert into lent.upon (event_type, source, stream) values ('t', 's', 'S') on conflict do nothing",
    "with published as (insert into lent.events (event_type, source, stream) values ('t', 's', 'S')) select 1",
    "insert into lent.ruled values ('t', 'S')",
];

#[test]
fn views_and_rules_of_a_limited_publisher_lend_nothing() {
    let (stack, mut app, mut nobody) = start("");
    app.batch_execute(VIEWS).expect("its own");
    let ways: Vec<String> = WAYS.iter().map(|way| way.replace("'S'", "'of-others'")).collect();
    // A publisher without limits may lend its right.
    let prepared: Vec<_> = ways.iter().map(|way| nobody.prepare(way).expect(way)).collect();
    for way in &prepared {
        nobody.execute(way, &[]).expect("lent");
    }
    stack.redis.wait_entries("of-others", WAYS.len());
    stack.pg.exec("select outbox.grant_publisher('app', null, '{mine:*}')");
    let expected = Refused::new(
        "42501",
        "permission denied to publish through a view or rule of \"app\"",
        "That role may publish only to some backends and streams, and would lend its right without these limits.",
        "Let it make a function with SECURITY DEFINER instead: limits hold there.",
    );
    for (way, sql) in prepared.iter().zip(&ways) {
        assert_eq!(Refused::of(nobody.execute(way, &[])), expected, "{sql}, prepared");
        assert_eq!(Refused::of(nobody.execute(sql, &[])), expected, "{sql}");
    }
    // It keeps to its limits itself, as does its function.
    for sql in WAYS.map(|way| way.replace("'S'", "'mine:1'")) {
        app.batch_execute(&sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
    for sql in &ways {
        assert_eq!(Refused::of(app.batch_execute(sql)).code, "42501", "{sql}");
    }
    nobody.batch_execute("select lent.publish('mine:1')").expect("lent");
    assert_eq!(
        Refused::of(nobody.batch_execute("select lent.publish('of-others')")).code,
        "42501"
    );
    stack.redis.wait_entries("mine:1", WAYS.len() + 1);
    assert_eq!(stack.redis.xlen("of-others"), WAYS.len());
}

/// The rights are checked when a statement begins, with the role of then.
#[test]
fn a_role_that_is_changed_in_mid_statement_evades_no_limit() {
    let (stack, _app, _nobody) = start(", null, '{mine:*}'");
    stack.pg.exec(
        "create role outside login noinherit in role app; create role plain login; grant app to plain; alter role plain noinherit;
         select outbox.grant_publisher('plain')",
    );
    let statements = [
        "select outbox.publish_event('t', 's', stream => 'S') from (select set_config('role', 'none', true) offset 0) r",
        "select outbox.publish_event(set_config('role', 'none', true), 's', stream => 'S')",
        "select outbox.publish_events(jsonb_build_array(jsonb_build_object('event_type', set_config('role', 'none', true), 'source', 's', 'stream', 'S')))",
        "insert into outbox.events (event_type, source, stream) values (set_config('role', 'none', true), 's', 'S')",
        "insert into outbox.events (event_type, source, stream) select 't', 's', 'S' where set_config('role', 'none', true) is not null",
        "declare c cursor for select outbox.publish_event('t', 's', stream => 'S'); reset role; fetch all from c",
    ];
    for (user, is_allowed) in [("outside", false), ("plain", true)] {
        let mut client = stack.pg.client_as(user, "postgres");
        for statement in statements {
            let sql = statement.replace("'S'", "'of-others'");
            let outcome = client.batch_execute(&format!("begin; set local role app; {sql}; commit"));
            if is_allowed {
                outcome.unwrap_or_else(|error| panic!("{user}: {sql}: {error:?}"));
            } else {
                assert_eq!(Refused::of(outcome).code, "42501", "{user}: {sql}");
                client.batch_execute("rollback").expect("an end");
            }
        }
    }
    stack.redis.wait_entries("of-others", statements.len());
    assert_eq!(stack.redis.xlen("of-others"), statements.len());
}
