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
/// A role that may change a column of a table, and read none, does not read the table's rows as events.
#[test]
fn published_here_shows_nothing_that_other_roles_have_published() {
    let (stack, mut app, mut nobody) = start("");
    stack
        .pg
        .exec("select outbox.grant_publisher('nobody'); create role team; grant team to nobody; select outbox.grant_publisher('team')");
    app.batch_execute(
        "create table lent.orders (id integer primary key, secret text, n integer);
         insert into lent.orders values (1, 'secret', 0);
         select outbox.attach_table('lent.orders');
         grant update (n) on lent.orders to nobody;
         create function lent.audit() returns void language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
         begin
             perform outbox.publish_event('audit', 'kit', '{\"secret\": 1}', subject => 'secret');
             perform outbox.publish_event('audit', 'kit', '{\"secret\": 1}', scheduled_at => now() + interval '1 day');
         end $$",
    )
    .expect("its own");
    let here = |client: &mut Client| -> Vec<String> {
        let rows = client.query("select event_type from outbox.published_here()", &[]);
        rows.expect("it may ask").iter().map(|row| row.get(0)).collect()
    };
    nobody
        .batch_execute(
            "begin; update lent.orders set n = 1; select lent.audit(); select outbox.publish_event('own', 'kit');
             set local role team; select outbox.publish_event('as team', 'kit'); reset role",
        )
        .expect("its rights");
    assert_eq!(here(&mut nobody), ["own", "as team"]);
    nobody.batch_execute("set local role team").expect("a member");
    assert_eq!(here(&mut nobody), ["as team"]);
    nobody.batch_execute("rollback").expect("an end");
    // A superuser sees all.
    let mut admin = stack.pg.client();
    admin
        .batch_execute("begin; update lent.orders set n = 1; select lent.audit()")
        .expect("a superuser");
    assert_eq!(
        here(&mut admin),
        ["lent.orders.update", "audit", "audit"].map(|t| t.trim_start_matches("lent."))
    );
}

/// Whose rights publish an event decides who sees it: also by a rule, by a function that publishes failed events again,
/// and in the other direction.
#[test]
fn published_here_shows_events_by_the_rights_that_published_them() {
    let (stack, mut app, mut nobody) = start("");
    stack.pg.exec(
        "select outbox.grant_publisher('nobody'); grant execute on function outbox.retry_failed(text, text, uuid) to nobody;
         insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, published_by, event_type, source, backend, data, attempts, last_error)
             select 1, '3', now(), gen_random_uuid(), b.number, 'app'::regrole, 'failed', 's', b.name, '{\"secret\": 1}', 1, 'e' from outbox.backends b",
    );
    app.batch_execute(
        "create table lent.ruled (secret text, n integer); insert into lent.ruled values ('secret', 0);
         create rule publish as on update to lent.ruled do also
             insert into outbox.events (event_type, source, data) values ('rule', 's', to_json(old));
         grant update (n) on lent.ruled to nobody;
         create table lent.attached (id integer); select outbox.attach_table('lent.attached', 'attached');
         grant insert on lent.attached to nobody;
         create function lent.here() returns text[] language sql security definer set search_path = pg_catalog, pg_temp
             as $$ select array_agg(event_type) from outbox.published_here() $$",
    )
    .expect("its own");
    let mut here = |statements: &str| -> Vec<String> {
        nobody
            .batch_execute(&format!("begin; {statements}"))
            .unwrap_or_else(|error| panic!("{statements}: {error:?}"));
        let rows = nobody.query("select event_type from outbox.published_here()", &[]);
        let shown = rows.expect("it may ask").iter().map(|row| row.get(0)).collect();
        nobody.batch_execute("rollback").expect("an end");
        shown
    };
    let own = "select outbox.publish_event('own', 's')";
    assert_eq!(here(&format!("{own}; update lent.ruled set n = 1")), ["own"]);
    assert_eq!(here(&format!("{own}; select outbox.retry_failed()")), ["own"]);
    // A savepoint that is rolled back, statements in one transaction, and numbers of further rows.
    assert_eq!(
        here(&format!(
            "{own}; savepoint s; insert into lent.attached values (1); {own}; rollback to s; {own}; insert into lent.attached values (2);
             insert into outbox.events (event_type, source) values ('inserted', 's')"
        )),
        ["own", "own", "inserted"]
    );
    // More changes between both than are noted one by one: nothing of others is shown.
    let shown = here(
        "do $$ begin for n in 1 .. 1500 loop
             perform outbox.publish_event('own', 's'); insert into lent.attached values (n);
         end loop; end $$",
    );
    assert!(
        shown.len() >= 900 && shown.iter().all(|kind| kind == "own"),
        "{}",
        shown.len()
    );
    // In the next transaction as before.
    assert_eq!(here(own), ["own"]);
    // The code of the table's owner, which runs in the transactions of others, sees nothing of theirs.
    let row = nobody.query_one(
        "select lent.here() from (select outbox.publish_event('own', 's') offset 0) p",
        &[],
    );
    assert_eq!(row.expect("it may call it").get::<_, Option<Vec<String>>>(0), None);
    nobody
        .batch_execute(&format!("begin; {own}; insert into lent.attached values (1)"))
        .expect("its rights");
    let row = nobody.query_one("select lent.here()", &[]).expect("it may call it");
    assert_eq!(row.get::<_, Vec<String>>(0), ["attached.insert"]);
    nobody.batch_execute("rollback").expect("an end");
}

/// A role's code that others run with the role's rights: superusers by REINDEX and ANALYZE of its table, all by its
/// functions. It learns no more than the role, which may not know of others' events.
#[test]
fn code_that_others_run_for_a_publisher_waits_for_no_event_of_others() {
    let (stack, mut app, _nobody) = start("");
    let others = stack.publish("of others");
    stack.wait_events(1);
    let mut own = |sql: &str| {
        app.batch_execute(sql)
            .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
    };
    own(&format!(
        "create function lent.spied(how text) returns boolean language plpgsql immutable security definer as $$
            begin
                perform outbox.publish_event(how || ' ' || outbox.wait_published('{others}', '300 ms'), 'spied');
                return true;
            end $$;
         create function lent.spied(number integer) returns boolean language sql immutable as $$ select lent.spied('indexed') $$;
         create table lent.bait (number integer); insert into lent.bait values (1);
         create index on lent.bait (lent.spied(number))"
    ));
    stack
        .pg
        .exec("reindex table lent.bait; analyze lent.bait; select lent.spied('called')");
    stack
        .pg
        .exec("create role monitor login in role pg_monitor; grant usage on schema lent to monitor");
    let mut monitor = stack.pg.client_as("monitor", "postgres");
    monitor
        .batch_execute("select lent.spied('called')")
        .expect("everybody's");
    let seen = "select string_agg(distinct event_type, ', ') from outbox.events where source = 'spied'";
    assert_eq!(stack.pg.one::<String>(seen), "called false, indexed false");
    // By themselves they may.
    let wait = format!("select outbox.wait_published('{others}')");
    assert!(stack.pg.one::<bool>(&wait));
    assert!(monitor.query_one(&wait, &[]).expect("a monitor").get::<_, bool>(0));
}
