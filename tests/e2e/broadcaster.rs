//! Compares the streams of django-broadcaster 0.1.1 and of the relay for the same events: consumers must not notice the
//! change.
//!
//! `tests/django_broadcaster/recorded.json` holds what the real package wrote (`make record-broadcaster`).

use kit::{Entry, Stack};
use postgres::types::ToSql;
use serde_json::{Map, Value};
use uuid::Uuid;

const RECORDED: &str = include_str!("../django_broadcaster/recorded.json");

struct Recorded {
    event: Map<String, Value>,
    fields: Vec<(String, String)>,
}

impl Recorded {
    fn text(&self, key: &str) -> Option<&str> {
        self.event.get(key).map(|value| value.as_str().unwrap())
    }

    /// JSON as the publisher gave it, with its order of keys and its digits.
    fn json(&self, key: &str) -> Option<String> {
        self.event.get(key).map(Value::to_string)
    }

    fn id(&self) -> Uuid {
        self.text("event_id").unwrap().parse().unwrap()
    }
}

fn recorded() -> Vec<Recorded> {
    let all: Vec<Map<String, Value>> = serde_json::from_str(RECORDED).unwrap();
    let all: Vec<Recorded> = all
        .into_iter()
        .map(|mut one| Recorded {
            event: one["event"].as_object().unwrap().clone(),
            fields: serde_json::from_value(one.remove("fields").unwrap()).unwrap(),
        })
        .collect();
    assert!(all.len() >= 12, "only {} events were recorded", all.len());
    all
}

/// The fields in their order; JSON without the spaces and escapes that do not change its meaning, so that the order of
/// keys and the digits of numbers count at every depth.
fn comparable(fields: &[(String, String)]) -> Vec<(String, String)> {
    let parsed = |name: &str, value: &str| match name {
        "cloud_event" => serde_json::from_str::<Value>(value).unwrap().to_string(),
        _ => value.to_string(),
    };
    fields
        .iter()
        .map(|(name, value)| (name.clone(), parsed(name, value)))
        .collect()
}

#[test]
fn an_entry_is_field_for_field_that_of_django_broadcaster() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let recorded = recorded();
    for one in &recorded {
        let arguments: [&(dyn ToSql + Sync); 8] = [
            &one.id(),
            &one.text("created_at"),
            &one.text("event_type"),
            &one.text("source"),
            &one.json("data"),
            &one.text("subject"),
            &one.json("publisher_config"),
            &one.text("data_schema"),
        ];
        client
            .execute(
                "insert into outbox.events (event_id, created_at, event_type, source, data, subject, publisher_config, data_schema) \
                 values ($1, $2::text::timestamptz, $3, $4, $5::text::json, $6, $7::text::json, $8)",
                &arguments,
            )
            .unwrap();
    }
    let entries = stack.wait_events(recorded.len());
    assert_eq!(entries.len(), recorded.len());
    for (entry, one) in entries.iter().zip(&recorded) {
        assert_eq!(
            comparable(&entry.fields),
            comparable(&one.fields),
            "{:?}",
            one.text("event_type")
        );
    }
}

/// Numbers by their value, because jsonb writes large ones differently; and without the order of keys, which jsonb
/// changes.
fn meaning(value: &Value) -> Value {
    match value {
        Value::Number(number) => Value::String(format!("{:e}", number.as_f64().unwrap())),
        Value::Array(items) => items.iter().map(meaning).collect(),
        Value::Object(object) => {
            let mut sorted: Vec<_> = object
                .iter()
                .map(|(key, value)| (key.clone(), meaning(value)))
                .collect();
            sorted.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(sorted.into_iter().collect())
        }
        other => other.clone(),
    }
}

/// An entry without its time: the names of the fields in order up to `cloud_event`, further ones sorted.
fn entry_meaning(fields: &[(String, String)], id: &str) -> (Vec<(String, String)>, Vec<String>, Value) {
    let mut plain: Vec<(String, String)> = fields
        .iter()
        .filter(|(name, _)| name != "cloud_event" && name != "timestamp")
        .cloned()
        .collect();
    plain[3..].sort();
    assert_eq!(plain[0], ("event_id".to_string(), id.to_string()));
    let entry = Entry {
        id: String::new(),
        fields: fields.to_vec(),
    };
    let mut cloud_event: Map<String, Value> = serde_json::from_str(entry.field("cloud_event")).unwrap();
    let keys = cloud_event.keys().cloned().collect();
    let time = cloud_event.insert("time".to_string(), Value::Null);
    assert_eq!(time.as_ref().and_then(Value::as_str), entry.get("timestamp"));
    (plain, keys, meaning(&Value::Object(cloud_event)))
}

/// The same by publish_event with the package's own argument names and order, as its users call it after moving to the
/// relay.
#[test]
fn publish_event_means_the_same_as_the_packages() {
    let stack = Stack::start();
    let mut client = stack.pg.client();
    let recorded = recorded();
    for one in &recorded {
        let arguments: [&(dyn ToSql + Sync); 7] = [
            &one.text("event_type"),
            &one.text("source"),
            &one.json("data"),
            &one.text("subject").unwrap_or_default(),
            &one.json("publisher_config").unwrap_or_else(|| "{}".to_string()),
            &one.text("data_schema"),
            &one.id(),
        ];
        let sql = "select outbox.publish_event($1, $2, $3::text::jsonb, $4, null, null, 3, $5::text::jsonb, \
                   data_schema => $6, event_id => $7)";
        client.query_one(sql, &arguments).unwrap();
    }
    let entries = stack.wait_events(recorded.len());
    assert_eq!(entries.len(), recorded.len());
    for (entry, one) in entries.iter().zip(&recorded) {
        let id = one.id().to_string();
        assert_eq!(entry_meaning(&entry.fields, &id), entry_meaning(&one.fields, &id));
    }
}
