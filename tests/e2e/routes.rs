//! Routes: an event that names no backend goes to each backend whose route matches, one row each under one id, in each
//! way to publish; the routes are plain rows.

use std::io::Write;

use kit::{Postgres, Refused, Stack, wait_drained, wait_until};
use postgres::Client;
use uuid::Uuid;

/// A server without a worker, with the backends `a`, `b` and `c`.
pub(crate) fn start() -> Postgres {
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")]).start();
    pg.extension();
    pg.exec("insert into outbox.backends (name, stream_name) values ('a', 'sa'), ('b', 'sb'), ('c', null)");
    pg
}

#[track_caller]
pub(crate) fn run(client: &mut Client, sql: &str) {
    client
        .batch_execute(sql)
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

/// The existing rows in order, as `type>backend/stream`; deletes them.
#[track_caller]
pub(crate) fn taken(client: &mut Client) -> Vec<String> {
    let sql = "select e.event_type || '>' || e.backend || coalesce('/' || e.stream, '')
        from (select event_type, backend, stream, seq from outbox.events
            union all select event_type, backend, stream, seq from outbox.scheduled_events) e order by e.seq";
    let rows = client.query(sql, &[]).expect("rows");
    run(client, "delete from outbox.events; delete from outbox.scheduled_events");
    rows.iter().map(|row| row.get(0)).collect()
}

pub(crate) fn publish(client: &mut Client, event_type: &str, source: &str) -> Vec<String> {
    let sql = "select outbox.publish_event($1, $2)";
    client.execute(sql, &[&event_type, &source]).expect("published");
    taken(client)
}

#[test]
fn an_event_goes_to_each_backend_whose_route_matches_under_one_id() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    run(
        &mut client,
        "insert into outbox.backends (name, stream_name) values ('a', 'sa'), ('b', 'sb')",
    );
    for backend in ["a", "b"] {
        stack.point(backend, &stack.redis);
    }
    run(
        &mut client,
        "insert into outbox.routes (event_type, source, backend, stream)
            values ('order.*', null, 'a', null), ('*', 'shop', 'b', 'audit'), ('user.*', '*', 'default', null)",
    );
    let id: Uuid = client
        .query_one(
            "select outbox.publish_event('order.paid', 'shop', '{\"n\": 1}', 'o-1')",
            &[],
        )
        .expect("published")
        .get(0);
    let waited = client
        .query_one("select outbox.wait_published($1)", &[&id])
        .expect("waited");
    assert!(waited.get::<_, bool>(0));
    for stream in ["sa", "audit"] {
        let entries = stack.redis.entries(stream);
        assert_eq!(entries.len(), 1, "{stream}");
        assert_eq!(entries[0].field("event_id"), id.to_string());
        assert_eq!(entries[0].field("event_type"), "order.paid");
    }
    assert_eq!(stack.events().len(), 0, "the default backend has no route for it");
    let rows = client
        .query(
            "select s.backend, s.stream, s.status, s.subject from outbox.event_status s where s.event_id = $1 order by s.backend",
            &[&id],
        )
        .expect("status");
    let rows: Vec<(String, String, String, String)> =
        rows.iter().map(|r| (r.get(0), r.get(1), r.get(2), r.get(3))).collect();
    let row = |backend: &str, stream: &str| (backend.into(), stream.into(), "published".into(), "o-1".into());
    assert_eq!(rows, [row("a", "sa"), row("b", "audit")]);
    let branches: Vec<i16> = client
        .query(
            "select branch from outbox.events where event_id = $1 order by seq",
            &[&id],
        )
        .expect("rows")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(branches, [0, 1]);
}

#[test]
fn routes_match_by_pattern_and_lead_to_each_stream_once() {
    let pg = start();
    let mut c = pg.client();
    assert_eq!(publish(&mut c, "order.paid", "shop"), ["order.paid>default"]);
    let routes = |c: &mut Client, rows: &str| {
        run(
            c,
            &format!(
                "delete from outbox.routes; insert into outbox.routes (event_type, source, backend, stream) values {rows}"
            ),
        );
    };
    routes(&mut c, "('order.*', 'shop-?', 'a', null)");
    assert_eq!(publish(&mut c, "order.paid", "shop-1"), ["order.paid>a"]);
    assert_eq!(publish(&mut c, "order.", "shop-é"), ["order.>a"]);
    for (event_type, source) in [
        ("order.paid", "shop-12"),
        ("orders.paid", "shop-1"),
        ("Order.paid", "shop-1"),
    ] {
        assert_eq!(publish(&mut c, event_type, source), [format!("{event_type}>default")]);
    }
    // In the order of their numbers; NULL matches everything.
    routes(
        &mut c,
        "(null, null, 'b', null), (null, 'nobody', 'default', null), (null, null, 'a', null)",
    );
    assert_eq!(publish(&mut c, "t", "s"), ["t>b", "t>a"]);
    // One row for each stream of a backend, under any of its names.
    routes(
        &mut c,
        "('t', null, 'a', null), ('*', null, 'a', 'sa'), (null, 's', 'a', null), ('t', null, 'a', 'other'), (null, null, 'c', 'events'), (null, null, 'c', null)",
    );
    assert_eq!(publish(&mut c, "t", "s"), ["t>a", "t>a/other", "t>c/events"]);
    // A route's stream takes precedence over the event's, and that over the backend's.
    routes(
        &mut c,
        "(null, null, 'a', 'mine'), (null, null, 'b', null), (null, null, 'a', null)",
    );
    run(&mut c, "select outbox.publish_event('t', 's', stream => 'named')");
    assert_eq!(taken(&mut c), ["t>a/mine", "t>b/named", "t>a/named"]);
    // An event that names a backend goes there.
    run(
        &mut c,
        "select outbox.publish_event('t', 's', backend => 'c'); select outbox.publish_event('u', 's', backend => '')",
    );
    assert_eq!(taken(&mut c), ["t>c", "u>a/mine", "u>b", "u>a"]);
    // Routes take precedence over the default backend, whoever sets it.
    run(&mut c, "set outbox_relay.default_backend = 'c'");
    assert_eq!(publish(&mut c, "t", "s"), ["t>a/mine", "t>b", "t>a"]);
    run(&mut c, "truncate outbox.routes");
    assert_eq!(publish(&mut c, "t", "s"), ["t>c"]);
    // A default backend that does not exist is no error then.
    run(&mut c, "set outbox_relay.default_backend = 'nowhere'");
    routes(&mut c, "('t', null, 'a', null)");
    assert_eq!(publish(&mut c, "t", "s"), ["t>a"]);
    let refused = Refused::of(c.execute("select outbox.publish_event('u', 's')", &[]));
    assert_eq!(refused.code, "42704");
}

#[test]
fn every_way_to_publish_uses_the_same_routes() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table source (id uuid default gen_random_uuid(), aggregatetype text, aggregateid text, type text, payload jsonb);
         select outbox.bridge_debezium('source', event_source => 's');
         create table attached (id int primary key);
         select outbox.attach_table('attached', event_type => 't', source => 's', operations => 'insert');
         create table attached_many (id int primary key);
         select outbox.attach_table('attached_many', event_type => 't', source => 's', operations => 'update', payload => 'both');
         insert into attached_many values (1);
         create function standard() returns void begin atomic
             insert into outbox.events (event_type, source, event_id) values ('t', 's', gen_random_uuid()) on conflict (event_id) do nothing; end;
         create table asked (id int);
         create rule ask as on insert to asked do also insert into outbox.events (event_type, source) values ('t', 's');
         insert into outbox.routes (event_type, backend, stream) values ('t*', 'a', null), ('t*', 'b', 'x'), ('t*', 'a', 'y')",
    );
    for way in [
        "select outbox.publish_event('t', 's')",
        "select outbox.publish_event('t', 's', '{}'::text, event_id => gen_random_uuid()::text)",
        "select outbox.publish_event('t', 's', scheduled_at => '2100-01-01')",
        "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\"}]')",
        "select outbox.publish_events('[{\"event_type\": \"t\", \"source\": \"s\", \"scheduled_at\": \"2100-01-01\"}]')",
        "insert into outbox.events (event_type, source) values ('t', 's')",
        "insert into outbox.events (event_type, source, backend) select 't', 's', ''",
        "insert into outbox.events (event_type, source, branch) values ('t', 's', 3)",
        "insert into outbox.events (event_type, source) values ('t', 's') on conflict do nothing",
        "insert into outbox.events (event_type, source, event_id) values ('t', 's', gen_random_uuid()) on conflict (event_id) do nothing",
        "explain analyze insert into outbox.events (event_type, source, event_id) values ('t', 's', gen_random_uuid()) on conflict (event_id) do nothing",
        "with e as (insert into outbox.events (event_type, source, event_id) values ('t', 's', gen_random_uuid()) on conflict (event_id) do nothing returning event_id) select * from e",
        "prepare p as insert into outbox.events (event_type, source, event_id) values ($1, 's', gen_random_uuid()) on conflict (event_id) do nothing; execute p('t'); deallocate p",
        "merge into outbox.events using (values (1)) v (n) on false when not matched then insert (event_type, source) values ('t', 's')",
        "do $$ begin insert into outbox.events (event_type, source, event_id) values ('t', 's', gen_random_uuid()) on conflict (event_id) do nothing; end $$",
        "select standard()",
        "insert into asked values (1)",
        "insert into outbox.scheduled_events (event_type, source, scheduled_at) values ('t', 's', '2100-01-01')",
        "insert into source (aggregatetype, aggregateid, type, payload) values ('order', '1', 't', '{}')",
        "insert into attached values ((random() * 1000000)::int)",
    ] {
        run(&mut c, way);
        assert_eq!(
            taken(&mut c).join(" ").replace(".insert", ""),
            "t>a t>b/x t>a/y",
            "{way}"
        );
    }
    run(&mut c, "update attached_many set id = 1");
    assert_eq!(taken(&mut c).len(), 3);
    let mut rows = c
        .copy_in("copy outbox.events (event_type, source) from stdin")
        .expect("COPY");
    rows.write_all(b"t\ts\nother\ts\nt2\ts\n").expect("sent");
    rows.finish().expect("copied");
    assert_eq!(
        taken(&mut c),
        ["t>a", "t>b/x", "t>a/y", "other>default", "t2>a", "t2>b/x", "t2>a/y"]
    );
    // RETURNING shows the row that the statement has inserted.
    let returned = c
        .query(
            "insert into outbox.events (event_type, source) values ('t', 's'), ('t', 's') returning event_id",
            &[],
        )
        .expect("inserted");
    assert_eq!(returned.len(), 2);
    let ids: i64 = c
        .query_one("select count(distinct event_id) from outbox.events", &[])
        .expect("rows")
        .get(0);
    assert_eq!((ids, taken(&mut c).len()), (2, 6));
    run(&mut c, "begin; select outbox.publish_event('t', 's')");
    let here = c
        .query("select backend, stream from outbox.published_here()", &[])
        .expect("rows");
    let here: Vec<(String, String)> = here.iter().map(|row| (row.get(0), row.get(1))).collect();
    let pair = |backend: &str, stream: &str| (backend.to_owned(), stream.to_owned());
    assert_eq!(here, [pair("a", "sa"), pair("b", "x"), pair("a", "y")]);
    run(&mut c, "rollback");
    assert_eq!(taken(&mut c), [""; 0]);
}

#[test]
fn rows_of_a_statement_stand_in_each_stream_in_its_order() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "insert into outbox.routes (event_type, backend) values ('both', 'a'), ('both', 'b'), ('b', 'b')",
    );
    let payload = "jsonb_build_object('n', i)";
    run(
        &mut c,
        &format!("insert into outbox.events (event_type, source, data)
            select case i % 3 when 0 then 'b' when 1 then 'both' else 'other' end, 's', {payload} from generate_series(1, 999) i"),
    );
    for (backend, count) in [("a", 333), ("b", 666), ("default", 333)] {
        let rows = c
            .query(
                "select (data::jsonb ->> 'n')::int from outbox.events where backend = $1 order by seq",
                &[&backend],
            )
            .expect("rows");
        let numbers: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
        assert_eq!(numbers.len(), count, "{backend}");
        assert!(numbers.is_sorted(), "{backend}: {numbers:?}");
    }
    // Also if the expressions of a row publish to one of these streams before all rows of the previous event are
    // inserted.
    run(
        &mut c,
        "delete from outbox.events;
         create function also(i int) returns int language plpgsql as $$ begin
             perform outbox.publish_event('direct', 's', jsonb_build_object('n', 2 * i), backend => 'b');
             return i; end $$;
         insert into outbox.events (event_type, source, data)
            select 'both', 's', jsonb_build_object('n', 2 * also(i) + 1) from generate_series(1, 20) i",
    );
    let rows = c
        .query(
            "select (data::jsonb ->> 'n')::int from outbox.events where backend = 'b' order by seq",
            &[],
        )
        .expect("rows");
    let numbers: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(numbers, (2..=41).collect::<Vec<i32>>());
    // A large payload is in the TOAST table, and each row has its own copy.
    run(
        &mut c,
        "delete from outbox.events;
         insert into outbox.events (event_type, source, data)
            select 'both', 's', to_jsonb(string_agg(md5(i::text), '')) from generate_series(1, 10000) i",
    );
    let sizes: Vec<i32> = c
        .query("select length(data::text) from outbox.events order by seq", &[])
        .expect("rows")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert_eq!(sizes, [320_002, 320_002]);
}

#[test]
fn a_change_of_the_routes_is_known_at_once() {
    let pg = start();
    let (mut c, mut other) = (pg.client(), pg.client());
    assert_eq!(publish(&mut other, "t", "s"), ["t>default"]);
    // In its own transaction, and in no other before the commit.
    run(&mut c, "begin; insert into outbox.routes (backend) values ('a')");
    run(&mut c, "select outbox.publish_event('own', 's')");
    run(&mut other, "select outbox.publish_event('other', 's')");
    run(&mut c, "commit");
    assert_eq!(taken(&mut other), ["own>a", "other>default"]);
    assert_eq!(publish(&mut other, "t", "s"), ["t>a"]);
    // In a transaction with an older snapshot.
    run(
        &mut other,
        "begin isolation level repeatable read; select count(*) from outbox.backends",
    );
    run(&mut c, "insert into outbox.routes (backend) values ('b')");
    run(&mut other, "select outbox.publish_event('t', 's'); commit");
    assert_eq!(taken(&mut other), ["t>a", "t>b"]);
    run(
        &mut c,
        "begin; savepoint s; delete from outbox.routes; select outbox.publish_event('1', 's'); rollback to s;
         select outbox.publish_event('2', 's'); update outbox.routes set enabled = false where backend = 'a';
         select outbox.publish_event('3', 's'); commit",
    );
    assert_eq!(taken(&mut c), ["2>a", "2>b", "3>b"]);
    assert_eq!(publish(&mut other, "t", "s"), ["t>b"]);
    // A renamed backend keeps its routes.
    run(&mut c, "update outbox.backends set name = 'new b' where name = 'b'");
    assert_eq!(publish(&mut other, "t", "s"), ["t>new b"]);
    let refused = Refused::of(c.execute("delete from outbox.backends where name = 'new b'", &[]));
    assert_eq!(
        refused,
        Refused::new(
            "55006",
            "backend \"new b\" has routes",
            "Rows of outbox.routes name it.",
            "Delete them first: DELETE FROM outbox.routes WHERE backend = 'new b';"
        )
    );
    run(
        &mut c,
        "delete from outbox.routes where backend = 'new b'; delete from outbox.backends where name = 'new b'",
    );
    run(
        &mut c,
        "set session_replication_role = replica; delete from outbox.routes; reset session_replication_role",
    );
    assert_eq!(publish(&mut other, "t", "s"), ["t>default"]);
}

#[test]
fn a_paused_backend_delays_no_other_route() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    run(
        &mut client,
        "insert into outbox.backends (name, stream_name, enabled) values ('a', 'sa', false);
         insert into outbox.routes (backend) values ('default'), ('a')",
    );
    stack.point("a", &stack.redis);
    let id = stack.publish("t");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    assert_eq!(stack.redis.entries("sa").len(), 0);
    let waited: bool = stack.pg.one(&format!("select outbox.wait_published('{id}', '200 ms')"));
    assert!(!waited, "one of its rows waits");
    run(&mut client, "update outbox.backends set enabled = true");
    wait_until("the other row", || stack.redis.entries("sa").len() == 1);
    assert!(stack.pg.one::<bool>(&format!("select outbox.wait_published('{id}')")));
}

#[test]
fn health_and_metrics_tell_of_routes() {
    let pg = start();
    let mut c = pg.client();
    let health = |c: &mut Client, sql: &str| -> (String, String, Option<String>) {
        run(c, sql);
        let row = c
            .query_one(
                "select status, detail, hint from outbox.health() where \"check\" = 'routes'",
                &[],
            )
            .expect("a row");
        (row.get(0), row.get(1), row.get(2))
    };
    let (status, detail, hint) = health(&mut c, "select");
    assert_eq!((status.as_str(), hint), ("ok", None));
    assert!(detail.starts_with("There are none"), "{detail}");
    let ok = health(
        &mut c,
        "insert into outbox.routes (event_type, backend) values ('t', 'a'), ('t', 'b')",
    );
    assert_eq!(ok, ("ok".to_owned(), "2 routes are in use.".to_owned(), None));
    let value: f64 = pg.one("select value from outbox.metrics where name = 'outbox_relay_routes'");
    assert!((value - 2.0).abs() < f64::EPSILON);
    for (change, words, cure) in [
        ("update outbox.backends set enabled = false where name = 'b'", "which is paused", "SET enabled = true WHERE name = 'b'"),
        ("update outbox.routes set event_type = 'order%' where backend = 'a'", "where it has no special meaning", "The wildcards are * and ?"),
        ("update outbox.routes set source = ' s' where backend = 'a'", "ends with a space", "btrim"),
        (
            "update outbox.routes set stream = 'x' where backend = 'a'; update outbox.backends set allowed_streams = '{y}' where name = 'a'",
            "does not allow: events that match it are refused",
            "Extend allowed_streams",
        ),
        (
            "insert into outbox.cursors (backend_number, from_snapshot, from_next_xid, from_low_seq, from_high_seq, saved_at, state)
                select number, '3:3:', '3', 0, 0, now(), 'misconfigured' from outbox.backends where name = 'a'",
            "which is misconfigured",
            "See the check \"backend a\"",
        ),
    ] {
        let (status, detail, hint) = health(&mut c, change);
        assert_eq!(status, "warn", "{change}");
        assert!(detail.contains(words), "{change}: {detail}");
        assert!(hint.as_deref().is_some_and(|hint| hint.contains(cure)), "{change}: {hint:?}");
    }
    let (status, ..) = health(&mut c, "update outbox.routes set enabled = false");
    assert_eq!(status, "ok");
}
