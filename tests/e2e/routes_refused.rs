//! Invalid routes, and events that a route would send where they may not go; streams of routes by template.

use crate::routes::{publish, run, start, taken};
use kit::Refused;
use postgres::Client;

#[test]
fn streams_of_routes_and_of_their_backends_may_be_templates() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "update outbox.backends set stream_name = 'b.{source}', allowed_streams = '{b.*,x.*}' where name = 'b';
         insert into outbox.routes (event_type, backend, stream)
            values ('t', 'a', 'by.{subject|2}'), ('t', 'b', null), ('t', 'b', 'b.s'), ('t', 'b', 'x.{event_type}'), ('plain', 'a', '{{a}}')",
    );
    let mut ways = vec![
        "select outbox.publish_event('t', 's', subject => '4711')".to_owned(),
        "select outbox.publish_event('t', 's', subject => '4711', scheduled_at => '2100-01-01')".to_owned(),
        "insert into outbox.events (event_type, source, subject) values ('t', 's', '4711')".to_owned(),
        "insert into outbox.events (event_type, source, subject) values ('t', 's', '4711'), ('plain', 's', null)"
            .to_owned(),
    ];
    let part: i32 = pg.one("select outbox.stream_part('4711', 2)");
    let expected = [format!("t>a/by.{part}"), "t>b/b.s".to_owned(), "t>b/x.t".to_owned()];
    let plain = vec!["plain>a/{a}".to_owned()];
    assert_eq!(
        {
            run(&mut c, &ways.pop().expect("the last"));
            taken(&mut c)
        },
        [expected.to_vec(), plain].concat()
    );
    for way in ways {
        run(&mut c, &way);
        assert_eq!(taken(&mut c), expected, "{way}");
    }
    let number: i32 = pg.one("select min(number) from outbox.routes");
    let refused = Refused::of(c.execute("select outbox.publish_event('t', 's')", &[]));
    assert_eq!(
        refused,
        Refused::new(
            "22023",
            "event has no subject, which the stream of backend \"a\" is named after",
            &format!(
                "The stream of route {number} of outbox.routes is a template, and the event takes it because it names no backend."
            ),
            "Pass it, or name a stream."
        )
    );
    run(
        &mut c,
        "update outbox.routes set stream = 'y.{source}' where stream = 'x.{event_type}'",
    );
    let refused = Refused::of(c.execute("select outbox.publish_event('t', 's', subject => '1')", &[]));
    assert_eq!(refused.message, "backend \"b\" does not allow the stream \"y.s\"");
    for stream in ["{nope}", "a}", "{subject|0}"] {
        let sql = format!("insert into outbox.routes (backend, stream) values ('a', '{stream}')");
        let refused = Refused::of(c.execute(&sql, &[]));
        assert_eq!(refused.code, "23514");
        assert!(refused.message.starts_with("stream of the route has"), "{refused:?}");
        let sql = format!("update outbox.routes set stream = '{stream}'");
        assert_eq!(Refused::of(c.execute(&sql, &[])).code, "23514");
    }
}

#[test]
fn invalid_routes_are_refused() {
    let pg = start();
    let mut c = pg.client();
    for (columns, values, code) in [
        ("backend", "null", "23502"),
        ("backend", "'nowhere'", "23503"),
        ("event_type, backend", "'', 'a'", "23514"),
        ("source, backend", "'', 'a'", "23514"),
        ("stream, backend", "'', 'a'", "23514"),
        ("stream, backend", "'outbox_relay:guard', 'a'", "23514"),
        ("event_type, backend", "repeat('x', 256), 'a'", "23514"),
        ("number, backend", "1, 'a'", "428C9"),
    ] {
        let sql = format!("insert into outbox.routes ({columns}) values ({values})");
        assert_eq!(Refused::of(c.execute(&sql, &[])).code, code, "{sql}");
    }
    run(&mut c, "insert into outbox.routes values ('t', null, 'a', null)");
    let again = Refused::of(c.execute("insert into outbox.routes values ('t', null, 'a', null)", &[]));
    assert_eq!(again.code, "23505");
    run(
        &mut c,
        "insert into outbox.routes values ('t', null, 'a', null) on conflict do nothing",
    );
    assert_eq!(publish(&mut c, "t", "s"), ["t>a"]);
    // With thousands of backends, nobody means all of them.
    run(
        &mut c,
        "insert into outbox.backends (name) select 'many' || i from generate_series(1, 1001) i;
         insert into outbox.routes (event_type, backend) select 'many', 'many' || i from generate_series(1, 1001) i",
    );
    let refused = Refused::of(c.execute("select outbox.publish_event('many', 's')", &[]));
    assert_eq!(
        refused,
        Refused::new(
            "54000",
            "more than 1000 routes send the event to as many streams",
            "At most 1000 are allowed.",
            "Ask the administrator to narrow the patterns in outbox.routes."
        )
    );
    run(&mut c, "delete from outbox.routes where backend = 'many7'");
    assert_eq!(publish(&mut c, "many", "s").len(), 1000);
}

#[test]
fn each_destination_must_allow_the_event_to_its_publisher() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create role app login; select outbox.grant_publisher('app', '{a,c}', '{sa,events,x*}');
         update outbox.backends set allowed_streams = '{x*}' where name = 'a';
         update outbox.backends set format = 'debezium' where name = 'c';
         insert into outbox.routes (event_type, backend, stream)
            values ('fine', 'a', null), ('fine', 'a', 'x1'), ('fine', 'c', null), ('beyond', 'a', null), ('beyond', 'b', null),
                ('stream', 'a', 'y'), ('format', 'a', null), ('format', 'c', null), ('limit', 'a', null), ('limit', 'c', 'zzz')",
    );
    let number = |c: &mut Client, event_type: &str| -> i32 {
        let sql = "select max(number) from outbox.routes where event_type = $1";
        c.query_one(sql, &[&event_type]).expect("a route").get(0)
    };
    let mut app = pg.client_as("app", "postgres");
    run(&mut app, "select outbox.publish_event('fine', 's')");
    assert_eq!(taken(&mut c), ["fine>a", "fine>a/x1", "fine>c"]);
    let by = |number: i32| format!("It goes there by route {number} of outbox.routes, because it names no backend.");
    let more = "Ask the administrator to allow more with outbox.grant_publisher().";
    let cases = [
        (
            "beyond",
            "42501",
            "permission denied to publish to backend \"b\"",
            "The current role may publish to these backends: a, c.",
            more,
        ),
        (
            "stream",
            "42501",
            "backend \"a\" does not allow the stream \"y\"",
            "No pattern in the backend's allowed_streams matches.",
            "Ask the administrator to extend allowed_streams.",
        ),
        (
            "limit",
            "42501",
            "permission denied to publish to stream \"zzz\" of backend \"c\"",
            "The current role may publish to these streams of that backend: sa, events, x*.",
            more,
        ),
    ];
    for (event_type, code, message, detail, hint) in cases {
        let expected = Refused::new(
            code,
            message,
            &format!("{detail} {}", by(number(&mut c, event_type))),
            hint,
        );
        for way in [
            format!("select outbox.publish_event('{event_type}', 's')"),
            format!("select outbox.publish_events('[{{\"event_type\": \"{event_type}\", \"source\": \"s\"}}]')"),
            format!("insert into outbox.events (event_type, source) values ('{event_type}', 's')"),
            format!("select outbox.publish_event('{event_type}', 's', scheduled_at => '2100-01-01')"),
        ] {
            assert_eq!(Refused::of(app.execute(&way, &[])), expected, "{way}");
        }
    }
    // Each backend's format has its own fields.
    let sql = "select outbox.publish_event('format', 's', publisher_config => '{\"key\": 1}')";
    let refused = Refused::of(app.execute(sql, &[]));
    assert_eq!(refused.code, "22023");
    assert!(
        refused
            .detail
            .as_ref()
            .is_some_and(|detail| detail.contains(&by(number(&mut c, "format")))),
        "{refused:?}"
    );
    assert_eq!(taken(&mut c), [""; 0]);
    // A publisher needs no right on the routes, and has none.
    for sql in [
        "select * from outbox.routes",
        "insert into outbox.routes (backend) values ('a')",
        "delete from outbox.routes",
    ] {
        assert_eq!(Refused::of(app.execute(sql, &[])).code, "42501", "{sql}");
    }
    run(
        &mut c,
        "create role router login; grant usage on schema outbox to router; grant select, insert, update, delete on outbox.routes to router",
    );
    let mut router = pg.client_as("router", "postgres");
    run(
        &mut router,
        "insert into outbox.routes (event_type, backend) values ('r', 'a'); update outbox.routes set backend = 'b' where event_type = 'r'",
    );
    assert_eq!(publish(&mut c, "r", "s"), ["r>b"]);
}
