//! Guards that somebody else has written, or a Redis that lies: no impossible value is believed, and other backends are
//! not affected.

use kit::liar;
use kit::{
    Bystander, Guard, Liar, Lie, Postgres, QUICK, Redis, Stack, standing, types, wait_drained, wait_eq, wait_trouble,
    wait_until,
};

/// Two backends, each with a Redis: `default`, and `other`, which is not attacked.
struct Two {
    stack: Stack,
    other: Redis,
    /// Events of the backend `other`.
    sent: usize,
}

impl Two {
    fn start() -> Self {
        let stack = Stack::of(Postgres::with(QUICK), Redis::start());
        let other = Redis::start();
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port) values ('other', '127.0.0.1', {})",
            other.port()
        ));
        Two { stack, other, sent: 0 }
    }

    /// The other backend and its publishers notice nothing.
    fn assert_others_go_on(&mut self, when: &str) {
        self.stack
            .pg
            .exec("select outbox.publish_event('t', 'kit', backend => 'other')");
        self.sent += 1;
        wait_eq(when, self.sent, || self.other.xlen("events"));
        wait_drained(&self.stack.pg, "other");
        assert_eq!(standing(&self.stack.pg, "other").state, "idle", "{when}");
    }

    fn hset(&self, fields: &[(&str, &str)]) {
        let key = self.stack.guard_key();
        let words: Vec<&str> = ["HSET", &key]
            .into_iter()
            .chain(fields.iter().flat_map(|(field, value)| [*field, *value]))
            .collect();
        self.stack.redis.call(&words);
    }
}

/// Positions after everything that this server has written, each in one of their parts.
fn beyond(pg: &Postgres) -> Vec<(&'static str, String)> {
    let next: i64 = pg.one("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint");
    // Others publish meanwhile.
    let far = next + 1_000_000;
    let last = i64::MAX - 1;
    let low = format!("3:{next}:/{next}/1/1");
    vec![
        ("position", format!("{far}:{far}:/{far}/1/1")),
        ("position", format!("3:{next}:/{far}/1/1")),
        ("position", format!("3:{next}:/{next}/1/{last}")),
        ("position", format!("3:{next}:/{next}/{last}/{last}")),
        ("position", format!("3:{next}:/{next}/{}/{0}", i64::MAX)),
        ("position", format!("{low}>{far}:{far}:/{far}/1/1@1")),
        ("position", format!("{low}>3:{next}:/{next}/1/1@{last}")),
        ("position", format!("{low}>3:{next}:/{next}/1/1@-1")),
        (
            "position",
            "9223372036854775807:9223372036854775807:/9223372036854775807/1/1".to_owned(),
        ),
        (
            "position",
            "18446744073709551615:18446744073709551615:/1/1/1".to_owned(),
        ),
        ("position", format!("3:{next}:5,5/{next}/1/1")),
        ("position", format!("3:{next}:/{next}/7/1")),
        ("position", "x".repeat(100_000)),
        ("previous", format!("{far}:{far}:/{far}/1/1")),
        ("previous", format!("3:{next}:/{next}/{last}/{last}")),
        ("number", i64::MAX.to_string()),
        ("number", u64::MAX.to_string()),
        ("number", (1u64 << 62).to_string()),
        ("interval_ms", u64::MAX.to_string()),
        ("interval_ms", "0".to_owned()),
        // A worker that waits for that owner would look a thousand times a second.
        ("interval_ms", "1".to_owned()),
        ("wal", (i64::MAX - 1).to_string()),
        ("wal", u64::MAX.to_string()),
        ("beat", u64::MAX.to_string()),
        ("total", i64::MAX.to_string()),
        ("total", (i64::MAX / 2 - 1).to_string()),
        ("total", "-7".to_owned()),
        ("again", i64::MAX.to_string()),
        ("again", "-1".to_owned()),
        ("again", "1,".repeat(20_000)),
        ("incarnation", "i".repeat(1_000)),
        ("place", "p".repeat(10_000)),
        ("token", "t\u{1b}[2J".to_owned()),
    ]
}

#[test]
fn an_impossible_field_is_named_with_its_key_and_not_believed() {
    let mut two = Two::start();
    two.stack.publish("first");
    let mut expected = vec!["first".to_owned()];
    two.stack.wait_events(1);
    wait_drained(&two.stack.pg, "default");
    let key = two.stack.guard_key();
    let bystander = Bystander::start(&two.stack);
    for (n, (field, value)) in beyond(&two.stack.pg).into_iter().enumerate() {
        let what = format!("{field} {}", value.chars().take(60).collect::<String>());
        let honest = two.stack.guard();
        let published = standing(&two.stack.pg, "default").published;
        two.hset(&[(field, &value)]);
        let event = format!("t{n}");
        two.stack.publish(&event);
        expected.push(event);
        let found = wait_trouble(&two.stack.pg, "default", "misconfigured", &key);
        let error = found.last_error.clone().unwrap_or_default();
        assert!(error.contains(field) && !error.contains('\u{1b}'), "{what}: {error}");
        assert_eq!(
            (found.pending, found.published, found.failed),
            (1, published, 0),
            "{what}: {found:?}"
        );
        two.assert_others_go_on(&what);
        // Corrected by hand, and by deleting it, in turn.
        match n % 2 {
            0 => {
                let fields: Vec<(&str, &str)> = honest.0.iter().map(|(f, v)| (f.as_str(), v.as_str())).collect();
                two.hset(&fields);
            }
            _ => {
                two.stack.redis.call(&["DEL", &key]);
            }
        }
        assert_eq!(types(&two.stack.wait_events(expected.len())), expected, "{what}");
        wait_drained(&two.stack.pg, "default");
        let found = standing(&two.stack.pg, "default");
        assert_eq!(found.published, expected.len() as i64, "{what}");
    }
    bystander.stop(&two.stack).assert_harmless("forged guards");
}

/// Larger than any guard: no field of it is used.
#[test]
fn a_guard_that_is_too_large_is_named() {
    let mut two = Two::start();
    two.stack.publish("first");
    two.stack.wait_events(1);
    let key = two.stack.guard_key();
    for (field, value) in [("place", "p".repeat(3_000_000)), ("more", "m".repeat(2_000_000))] {
        two.hset(&[(field, &value)]);
        two.stack.publish(field);
        let found = wait_trouble(&two.stack.pg, "default", "misconfigured", "the guard is too large");
        assert!(found.last_error.is_some_and(|e| e.contains(&key)));
        two.assert_others_go_on(field);
        two.stack.redis.call(&["DEL", &key]);
        wait_drained(&two.stack.pg, "default");
    }
    assert_eq!(types(&two.stack.wait_events(3)), ["first", "place", "more"]);
}

/// The state that is saved after a guard of an earlier run was believed limits the numbers of all later events.
#[test]
fn numbers_of_a_forged_guard_of_an_earlier_run_stop_no_publisher() {
    let mut two = Two::start();
    two.stack.publish("first");
    two.stack.wait_events(1);
    wait_drained(&two.stack.pg, "default");
    let key = two.stack.guard_key();
    for n in 0..2 {
        // Ahead of the saved cursor, or it would not be believed.
        for _ in 0..3 {
            two.stack.pg.exec("select pg_current_xact_id()");
        }
        let next: i64 = two
            .stack
            .pg
            .one("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint");
        two.stack.pg.stop(kit::Mode::Fast);
        let guard = two.stack.redis.guard(&key).expect("a guard");
        let position = guard.field("position");
        let last = i64::MAX - 1;
        let forged = match n {
            0 => format!("{next}:{next}:/{next}/{last}/{last}"),
            _ => format!("{position}>{next}:{next}:/{next}/0/{last}@{last}"),
        };
        let number = (guard.number("number") + 1).to_string();
        let words = ["HSET", &key, "position", &forged, "number", &number];
        two.stack.redis.call(&words);
        two.stack.pg.start_again();
        // The state that is saved when the guard was believed; a start or a crash begins with it.
        let saved = format!("select batch_number >= {number} from outbox.cursors where backend_number = 1");
        wait_until("the guard to be taken in", || two.stack.pg.one::<bool>(&saved));
        let highest: i64 = two
            .stack
            .pg
            .one("select max(greatest(from_low_seq, from_high_seq, to_high_seq, last_seq)) from outbox.cursors");
        assert!(highest < 100_000, "{highest}");
        two.assert_others_go_on(&forged);
        two.stack.publish(&format!("t{n}"));
        let entries = two.stack.wait_events(2 + n);
        assert_eq!(types(&entries).last().copied(), Some(format!("t{n}").as_str()));
        wait_drained(&two.stack.pg, "default");
    }
}

/// The fields of a guard, some of them changed, as HGETALL returns them.
fn reply(fields: &[(String, String)], changed: &[(&str, String)]) -> Vec<u8> {
    let mut reply = format!("*{}\r\n", 2 * fields.len());
    for (field, value) in fields {
        let value = changed.iter().find(|(f, _)| f == field).map_or(value, |(_, v)| v);
        reply += &format!("${}\r\n{field}\r\n${}\r\n{value}\r\n", field.len(), value.len());
    }
    reply.into_bytes()
}

/// Every number in it was assigned by this server, but for other events. Rows after the position are found by their
/// transactions.
#[test]
fn a_plausible_position_hides_no_event_that_came_after_it() {
    let (stack, liar) = liar::trusted();
    let key = stack.guard_key();
    let guard = liar.hash(&key);
    let field = |name: &str| guard.iter().find(|(f, _)| f == name).expect("a field").1.clone();
    // Ahead of the saved cursor, or it would not be believed.
    for _ in 0..3 {
        stack.pg.exec("select pg_current_xact_id()");
    }
    let snapshot: String = stack
        .pg
        .one("select pg_current_snapshot()::text || '/' || pg_snapshot_xmax(pg_current_snapshot())");
    // The worker cannot connect while five more are published.
    liar.lie(|words| (words[0] == "WATCH" || words[0] == "EXEC").then_some(Lie::Refuse));
    for n in 1..=5 {
        stack.publish(&format!("t{n}"));
    }
    wait_trouble(&stack.pg, "default", "backoff", "");
    let highest: i64 = stack.pg.one("select max(seq) from outbox.events");
    let number: u64 = field("number").parse().expect("a number");
    let forged = [
        ("position", format!("{snapshot}/{highest}/{highest}")),
        ("previous", format!("{snapshot}/{highest}/{highest}")),
        ("number", (number + 1).to_string()),
    ];
    let lie = reply(&guard, &forged);
    liar.lie(move |words| (words[0] == "HGETALL").then(|| Lie::Say(lie.clone())));
    // A worker that has sent all batches of this run itself knows that it did not send this one.
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "position");
    assert!(found.last_error.is_some_and(|e| e.contains(&key)));
    assert_eq!(liar.entries("events"), 1);
    let worker = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    wait_eq("the other five", 6, || liar.entries("events"));
    wait_drained(&stack.pg, "default");
    assert_eq!(standing(&stack.pg, "default").published, 6);
}

/// The number of a guard's last batch.
fn number_of(guard: &[(String, String)]) -> u64 {
    let (_, number) = guard.iter().find(|(field, _)| field == "number").expect("a field");
    number.parse().expect("a number")
}

/// A worker knows which batches it has sent: Redis cannot make pending events look published by claiming that other
/// batches were appended.
#[test]
fn a_batch_that_was_never_sent_is_not_taken_for_appended() {
    let (stack, liar) = liar::trusted();
    let key = stack.guard_key();
    let guard = liar.hash(&key);
    let number = number_of(&guard);
    liar.lie(|words| (words[0] == "WATCH" || words[0] == "EXEC").then_some(Lie::Refuse));
    // One transaction is one batch.
    stack
        .pg
        .exec("select outbox.publish_event('t' || n, 'kit') from generate_series(1, 5) n");
    wait_trouble(&stack.pg, "default", "backoff", "");
    // All events that exist now.
    let position: String = stack.pg.one(
        "select pg_current_snapshot()::text || '/' || pg_snapshot_xmax(pg_current_snapshot()) || '/' || max(seq) || '/' || max(seq)
        from outbox.events",
    );
    for (ahead, field) in [(1, "position"), (2, "number"), (1_000, "number")] {
        let forged = [
            ("position", position.clone()),
            ("previous", position.clone()),
            ("number", (number + ahead).to_string()),
        ];
        let lie = reply(&guard, &forged);
        liar.lie(move |words| (words[0] == "HGETALL").then(|| Lie::Say(lie.clone())));
        let found = wait_trouble(
            &stack.pg,
            "default",
            "misconfigured",
            &format!("in {field} that this server has never written: {key}"),
        );
        assert_eq!((found.pending, found.published), (5, 1), "{field}");
    }
    liar.lie(|_| None);
    wait_eq("the other five", 6, || liar.entries("events"));
    wait_drained(&stack.pg, "default");
}

/// A worker that believed that the last batch had all retained events would look for all of them.
#[test]
fn a_last_batch_of_all_that_is_retained_is_not_believed() {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let liar = Liar::honest();
    stack.point_at("default", "127.0.0.1", liar.port());
    stack
        .pg
        .exec("select outbox.publish_event('t', 'kit') from generate_series(1, 12000)");
    wait_eq("all events", 12_000, || liar.entries("events"));
    wait_drained(&stack.pg, "default");
    let key = stack.guard_key();
    let guard = liar.hash(&key);
    let number = number_of(&guard);
    let lie = reply(
        &guard,
        &[
            ("previous", "3:3:/3/0/0".to_owned()),
            ("number", (number + 1).to_string()),
        ],
    );
    let asked = lie.clone();
    liar.lie(move |words| match words[0].as_str() {
        "HGETALL" => Some(Lie::Say(asked.clone())),
        "EXEC" => Some(Lie::Close),
        _ => None,
    });
    let worker = stack.pg.wait_worker("postgres");
    stack.pg.exec(&format!("select pg_terminate_backend({worker})"));
    stack.publish("last");
    let found = wait_trouble(&stack.pg, "default", "misconfigured", "previous");
    assert!(found.last_error.is_some_and(|e| e.contains(&key)));
    assert_eq!(liar.asked("XREVRANGE"), 0);
    liar.lie(|_| None);
    wait_until("the last event", || liar.entries("events") >= 12_001);
    wait_drained(&stack.pg, "default");
}

/// A worker whose cursors were deleted by hand knows neither how often it claimed nor how much it has sent: the guard
/// tells.
#[test]
fn a_server_without_its_cursors_goes_on_from_its_guard() {
    let mut stack = Stack::of(Postgres::with(QUICK), Redis::start());
    for event in ["a", "b", "c"] {
        stack.publish(event);
        stack.redis.call(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]);
    }
    stack.wait_events(3);
    wait_drained(&stack.pg, "default");
    let before: Guard = stack.guard();
    stack.pg.set("outbox_relay.enabled", "off");
    wait_until("the worker to leave", || stack.pg.worker_pid("postgres").is_none());
    stack.pg.exec("delete from outbox.cursors");
    stack.pg.set("outbox_relay.enabled", "on");
    stack.publish("d");
    assert_eq!(types(&stack.wait_events(4)), ["a", "b", "c", "d"]);
    wait_drained(&stack.pg, "default");
    assert!(stack.guard().number("number") > before.number("number"));
    assert_eq!(stack.redis.xlen("events"), 4);
    stack.pg.stop(kit::Mode::Fast);
}

/// A Redis that has the guard of one backend shows it for others, which are new, with a total near the largest number.
#[test]
fn forged_totals_of_new_backends_hide_no_view() {
    let (stack, liar) = liar::trusted();
    let guard = liar.hash(&stack.guard_key());
    let lie = reply(&guard, &[("total", (i64::MAX / 2 - 1).to_string())]);
    let ours = stack.guard_key();
    liar.lie(move |words| (words[0] == "HGETALL" && words[1] != ours).then(|| Lie::Say(lie.clone())));
    for n in 1..=3 {
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port) values ('new{n}', '127.0.0.1', {});
             select outbox.publish_event('t', 'kit', backend => 'new{n}')",
            liar.port()
        ));
    }
    for n in 1..=3 {
        let found = wait_trouble(
            &stack.pg,
            &format!("new{n}"),
            "misconfigured",
            "in total that this server",
        );
        assert_eq!((found.pending, found.published), (1, 0), "{found:?}");
    }
    let published: i64 = stack.pg.one("select published_total from outbox.status");
    assert_eq!(published, 1);
    liar.lie(|_| None);
    (1..=3).for_each(|n| wait_drained(&stack.pg, &format!("new{n}")));
}
