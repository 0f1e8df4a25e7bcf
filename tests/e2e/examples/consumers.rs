//! Each event has its effect once in the examples that consume.

use std::time::Duration;

use kit::{Entry, process, types, wait_eq, wait_until, xreadgroup};

use super::{Project, Shop};
use crate::documents::Running;

fn effects(shop: &Shop, group: &str) -> i64 {
    shop.one(&format!("select count(*) from effects where consumer = '{group}'"))
}

fn pending(shop: &Shop, group: &str) -> i64 {
    let reply = shop.redis.call(&["XPENDING", "events", group]);
    let summary: Vec<redis::Value> = redis::from_redis_value(reply).expect("an array");
    redis::from_redis_value(summary[0].clone()).expect("a number")
}

/// Each event has its effect once: events that were there before, that a dead worker left, that come twice, and that
/// failed at first.
fn consumes(name: &str, group: &str) {
    let shop = Shop::open();
    let Some(project) = Project::prepare(&shop, name) else {
        return;
    };
    shop.publish("order.placed", 5);
    let first = shop.redis.wait_entries("events", 5);
    shop.redis.call(&["XGROUP", "CREATE", "events", group, "0"]);
    shop.redis.call(&xreadgroup(group, "dead", &["COUNT", "2"], "events"));
    // Handling an event of this type fails until the constraint is dropped.
    shop.pg.exec_db(
        "app",
        "alter table effects add constraint fails check (event_type <> 'order.broken')",
    );
    let mut command = project.command(&shop, &format!("exec {}", project.run));
    command.env("MIN_IDLE_MS", "200");
    let mut running = Running(command.spawn().expect("the consumer starts"));
    wait_until("effects of what was there", || {
        assert_eq!(running.0.try_wait().expect("its state"), None, "it has ended");
        effects(&shop, group) == 5
    });
    // The same event again, and new ones, one of which fails.
    let mut again = vec!["XADD", "events", "*"];
    again.extend(
        first[0]
            .fields
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]),
    );
    shop.redis.call(&again);
    shop.publish("order.broken", 1);
    shop.publish("order.paid", 4);
    wait_until("effects of all but the broken one", || effects(&shop, group) >= 9);
    wait_eq("what is not acknowledged", 1, || pending(&shop, group));
    shop.pg.exec_db("app", "alter table effects drop constraint fails");
    wait_until("effects of all", || effects(&shop, group) >= 10);
    wait_eq("what is not acknowledged", 0, || pending(&shop, group));
    assert_eq!(shop.redis.xlen("events"), 11);
    let of_types = "select string_agg(event_type || ' ' || count, ', ' order by event_type)
        from (select event_type, count(*) from effects group by event_type) as of_type";
    assert_eq!(
        shop.one::<String>(of_types),
        "order.broken 1, order.paid 4, order.placed 5"
    );
    process::signal(
        i32::try_from(running.0.id()).expect("a pid"),
        nix::sys::signal::Signal::SIGTERM,
    );
    let ended = process::wait_exit(&mut running.0, Duration::from_secs(20)).expect("it ends when it is asked to");
    assert!(ended.success(), "{ended}");
}

#[test]
fn redis_py_consumes() {
    consumes("redis-py", "billing");
}

#[test]
#[ignore = "make test-examples"]
fn redis_py_sets_aside_an_event_that_always_fails() {
    let shop = Shop::open();
    let Some(project) = Project::prepare(&shop, "redis-py") else {
        return;
    };
    shop.pg.exec_db(
        "app",
        "alter table effects add constraint fails check (event_type <> 'order.broken')",
    );
    shop.publish("order.broken", 1);
    shop.publish("order.paid", 1);
    let mut command = project.command(&shop, &format!("exec {}", project.run));
    command.env("MIN_IDLE_MS", "1").env("MOST_DELIVERIES", "3");
    let _running = Running(command.spawn().expect("the consumer starts"));
    let aside = shop.redis.wait_entries("events:billing:dead", 1);
    assert_eq!(types(&aside), ["order.broken"]);
    wait_eq("what is not acknowledged", 0, || pending(&shop, "billing"));
    assert_eq!(effects(&shop, "billing"), 1);
}

#[test]
#[ignore = "make test-examples"]
fn node_redis_consumes() {
    consumes("node-redis", "shipping");
}

#[test]
#[ignore = "make test-examples"]
fn faststream_consumes() {
    consumes("faststream", "search");
}

/// Events with all attributes, and with only the required ones.
/// `bytes`: how it prints the payload of three bytes, 0, 255 and a quote.
fn reads(name: &str, time: fn(&str) -> String, bytes: &str) {
    let shop = Shop::open();
    let Some(project) = Project::prepare(&shop, name) else {
        return;
    };
    let schema = "data_schema => 'https://example.com/order.json'";
    let sql = format!(
        "select outbox.publish_event('order.placed', '/shop/eu', '{{\"name\": \"Zoë\"}}', subject => 'order/1', {schema});
        select outbox.publish_event('order.closed', 'shop');
        select outbox.publish_event('order.scanned', 'shop', data_bytes => '\\x00ff22')"
    );
    shop.pg.exec_db("app", &sql);
    let entries = shop.redis.wait_entries("events", 3);
    let said = project.output(project.command(&shop, &project.run));
    let lines: Vec<&str> = said.lines().collect();
    let begins = |entry: &Entry| {
        let (event_type, id) = (entry.field("event_type"), entry.field("event_id"));
        format!(
            "{event_type} {id} {} {}",
            entry.field("source"),
            time(entry.field("timestamp"))
        )
    };
    assert_eq!(lines.len(), 3, "{said}");
    assert!(lines[2].ends_with(bytes), "{said}");
    assert!(lines[0].starts_with(&begins(&entries[0])), "{said}");
    assert!(lines[0].contains("order/1") && lines[0].contains("Zoë"), "{said}");
    assert!(lines[1].starts_with(&begins(&entries[1])), "{said}");
}

#[test]
#[ignore = "make test-examples"]
fn cloudevents_python_reads_what_we_write() {
    reads("cloudevents-python", str::to_owned, "b'\\x00\\xff\"'");
}

#[test]
#[ignore = "make test-examples"]
fn cloudevents_js_reads_what_we_write() {
    // Times in JavaScript have milliseconds.
    reads(
        "cloudevents-js",
        |time| format!("{}Z", &time[..23]),
        "{\"0\":0,\"1\":255,\"2\":34}",
    );
}

#[test]
#[ignore = "make test-examples"]
fn opentelemetry_traces_from_publisher_to_consumer() {
    let shop = Shop::open();
    let Some(project) = Project::prepare(&shop, "opentelemetry") else {
        return;
    };
    let said = project.output(project.command(&shop, &project.run));
    let of = |who: &str| said.lines().find_map(|line| line.strip_prefix(who)).map(str::to_owned);
    let (publisher, consumer) = (of("publisher "), of("consumer "));
    assert!(publisher.is_some() && publisher == consumer, "{said}");
}
