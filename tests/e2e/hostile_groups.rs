//! Servers that tell anything about consumer groups: it is bounded, and hides nothing of other backends.

use std::time::Duration;

use kit::{Bystander, Liar, Lie, Postgres, QUICK, Redis, Stack, standing, wait_eq, wait_trouble, wait_until};

fn bulk(text: &str) -> String {
    format!("${}\r\n{text}\r\n", text.len())
}

/// The reply to XINFO GROUPS.
fn groups(names: impl Iterator<Item = String>, pending: i64, lag: i64) -> String {
    let [name, consumers, waiting, last, behind] =
        ["name", "consumers", "pending", "last-delivered-id", "lag"].map(bulk);
    let row = |group: String| {
        let (group, id) = (bulk(&group), bulk("1-0"));
        format!("*10\r\n{name}{group}{consumers}:1\r\n{waiting}:{pending}\r\n{last}{id}{behind}:{lag}\r\n")
    };
    let rows: Vec<String> = names.map(row).collect();
    format!("*{}\r\n{}", rows.len(), rows.concat())
}

/// Each stream has a hundred groups, which have other names each time: all of them would have to be saved.
#[test]
fn groups_of_ever_other_names_hold_up_nobody() {
    let stack = Stack::start();
    let liar = Liar::honest();
    let mut count = 0;
    liar.lie(
        move |words| match (words[0].as_str(), words.get(1).map(String::as_str)) {
            ("XINFO", Some("GROUPS")) => {
                count += 1;
                let names = (0..100).map(|n| format!("{:0120}", count * 100 + n));
                Some(Lie::Say(groups(names, 5, 7).into_bytes()))
            }
            ("XPENDING", _) => Lie::say("*4\r\n:5\r\n$3\r\n1-0\r\n$3\r\n1-1\r\n*-1\r\n"),
            ("XLEN", _) => Lie::say(":9999\r\n"),
            ("EVAL", Some(script)) if script.contains("XTRIM") => Lie::say(":0\r\n"),
            ("EVAL", _) => Lie::say("+1-0\r\n"),
            _ => None,
        },
    );
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port, trim, max_len) values ('liar', '127.0.0.1', {}, 'read', 1000000)",
        liar.port()
    ));
    let bystander = Bystander::start(&stack);
    let streams = || -> i64 {
        stack
            .pg
            .one("select count(distinct stream) from outbox.consumer_groups")
    };
    wait_until("all streams to be asked about", || {
        stack.pg.exec(
            "select outbox.publish_event('t', 'kit', backend => 'liar', stream => 's' || n) from generate_series(1, 60) n",
        );
        std::thread::sleep(Duration::from_millis(500));
        streams() >= 60
    });
    bystander.stop(&stack).assert_undisturbed("groups");
    // A transaction saves the answers of one survey.
    let most: i64 = stack
        .pg
        .one("select max(n) from (select count(*) as n from outbox.consumer_groups group by xmin::text) s");
    println!("at most {most} groups at once");
    assert!(most <= 2_000, "{most}");
}

/// Each answer is in time, and there are a hundred: a backend that must know them before it sends is not idle.
#[test]
fn a_backend_that_waits_for_a_slow_survey_says_so() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let liar = Liar::honest();
    liar.lie(
        move |words| match (words[0].as_str(), words.get(1).map(String::as_str)) {
            ("XINFO", Some("GROUPS")) => {
                let names = (0..100).map(|n| n.to_string());
                Some(Lie::Say(groups(names, 5, 7).into_bytes()))
            }
            ("XPENDING", _) => Some(Lie::Late {
                bytes: b"*4\r\n:5\r\n$3\r\n1-0\r\n$3\r\n1-1\r\n*-1\r\n".to_vec(),
                after: Duration::from_millis(100),
            }),
            ("XLEN", _) => Lie::say(":1\r\n"),
            ("EVAL", _) => Lie::say("+1-0\r\n"),
            _ => None,
        },
    );
    stack.pg.exec(&format!(
        "update outbox.backends set port = {}, trim = 'read', max_len = 1000",
        liar.port()
    ));
    stack.publish("t");
    let found = wait_trouble(&stack.pg, "default", "backoff", "has not told of consumer groups");
    assert_eq!((found.pending, found.published), (1, 0), "{found:?}");
    let accepted = liar.accepted();
    wait_eq("the event", 1, || liar.entries("events"));
    assert_eq!(liar.accepted(), accepted, "it was not cut off");
    wait_eq("the state", "idle".to_owned(), || standing(&stack.pg, "default").state);
}

/// Everything works but this: a backend that must know its groups before it sends is not idle.
#[test]
fn a_backend_that_waits_for_a_survey_that_fails_says_so() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let liar = Liar::start(|words| (words[0] == "XLEN").then_some(Lie::Close));
    stack.pg.exec(&format!(
        "update outbox.backends set port = {}, trim = 'read', max_len = 1000",
        liar.port()
    ));
    stack.publish("t");
    let found = wait_trouble(&stack.pg, "default", "backoff", "closed the connection");
    assert_eq!((found.pending, found.published), (1, 0), "{found:?}");
}

/// Sums of what one server says must not hide what others say.
#[test]
fn impossible_counts_hide_no_check_of_other_backends() {
    let stack = Stack::start();
    let liar = Liar::honest();
    liar.lie(
        move |words| match (words[0].as_str(), words.get(1).map(String::as_str)) {
            ("XINFO", Some("GROUPS")) => {
                let names = ["g".to_owned()].into_iter();
                Some(Lie::Say(groups(names, i64::MAX, i64::MAX).into_bytes()))
            }
            ("XPENDING", _) => Lie::say(format!(
                "*4\r\n:{}\r\n{}{}*-1\r\n",
                i64::MAX,
                bulk("18446744073709551615-1"),
                bulk("18446744073709551615-18446744073709551615")
            )),
            ("XLEN", _) => Lie::say(format!(":{}\r\n", i64::MAX)),
            _ => None,
        },
    );
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, host, port) values ('liar', '127.0.0.1', {});
         update outbox.backends set max_len = 10;
         select outbox.publish_event('t', 'kit', backend => 'liar')",
        liar.port()
    ));
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit') from generate_series(1, 10)");
    stack.wait_events(10);
    stack.redis.call(&["XGROUP", "CREATE", "events", "slow", "0"]);
    let said = || -> String {
        stack
            .pg
            .one(r#"select string_agg("check" || ' ' || status || ' ' || detail, E'\n') from outbox.health()"#)
    };
    wait_until("both warnings", || {
        let said = said();
        assert!(!said.contains("cannot be looked at"), "{said}");
        ["\"g\"", "\"slow\""]
            .iter()
            .all(|group| said.contains(&format!("The group {group} has not acknowledged")))
    });
}
