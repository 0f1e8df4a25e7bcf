//! The trace context of an application is sent with the events that it publishes: `outbox_relay.traceparent` and
//! `.tracestate`.

use kit::{Entry, Refused, Stack};
use serde_json::Value;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn traceparent_of(entry: &Entry) -> (Option<&str>, Value) {
    let event: Value = serde_json::from_str(entry.field("cloud_event")).unwrap();
    (entry.get("traceparent"), event["traceparent"].clone())
}

#[test]
fn events_carry_the_trace_context_by_every_way_to_publish() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role app login; select outbox.grant_publisher('app')");
    let mut app = stack.pg.client_as("app", "postgres");
    app.batch_execute(&format!(
        "begin;
        set local outbox_relay.traceparent = '{PARENT}';
        set local outbox_relay.tracestate = 'vendor=1';
        select outbox.publish_event('function', 's');
        select outbox.publish_event('config', 's', publisher_config => '{{\"tenant\": \"a\"}}');
        select outbox.publish_events('[{{\"event_type\": \"array\", \"source\": \"s\"}}]');
        insert into outbox.events (event_type, source) values ('insert', 's');
        insert into outbox.events (event_type, source, publisher_config) values ('null', 's', 'null');
        select outbox.publish_event('later', 's', scheduled_at => now() + interval '0.2 s');
        commit;
        select outbox.publish_event('outside', 's', scheduled_at => now() + interval '0.6 s');"
    ))
    .unwrap();
    let entries = stack.wait_events(7);
    for entry in &entries[..6] {
        assert_eq!(traceparent_of(entry), (Some(PARENT), PARENT.into()), "{entry:?}");
        assert_eq!(entry.field("tracestate"), "vendor=1");
    }
    assert_eq!(entries[1].field("tenant"), "a");
    assert_eq!(traceparent_of(&entries[6]), (None, Value::Null));
}

#[test]
fn a_trace_context_from_the_publisher_takes_precedence() {
    let stack = Stack::start();
    let mine = PARENT.replace("-01", "-00");
    stack.pg.exec(&format!(
        "set outbox_relay.traceparent = '{PARENT}';
        select outbox.publish_event('t', 's', publisher_config => '{{\"traceparent\": \"{mine}\"}}')"
    ));
    let entries = stack.wait_events(1);
    assert_eq!(traceparent_of(&entries[0]), (Some(mine.as_str()), mine.as_str().into()));
}

#[test]
fn the_trace_context_is_an_attribute_in_binary_mode() {
    let stack = Stack::start();
    stack.pg.exec("update outbox.backends set format = 'cloudevents'");
    stack.pg.exec(&format!(
        "set outbox_relay.traceparent = '{PARENT}'; select outbox.publish_event('t', 's')"
    ));
    let entries = stack.wait_events(1);
    assert_eq!(entries[0].field("ce_traceparent"), PARENT);
    assert_eq!(entries[0].get("traceparent"), None);
}

#[test]
fn malformed_values_are_refused() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    for (setting, value) in [
        ("traceparent", "garbage"),
        ("traceparent", "00-00000000000000000000000000000000-b7ad6b7169203331-01"),
        ("tracestate", "no pair"),
    ] {
        let refused = Refused::of(client.batch_execute(&format!("set outbox_relay.{setting} = '{value}'")));
        assert_eq!(refused.code, "22023", "{value}");
        assert!(refused.detail.is_some(), "{refused:?}");
    }
    client.batch_execute("set outbox_relay.traceparent = ''").unwrap();
}
