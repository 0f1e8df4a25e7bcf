use super::*;
use crate::event::text::rfc3339;

fn arguments(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let (header, mut rest) = text.split_once("\r\n").unwrap();
    let count: usize = header.strip_prefix('*').unwrap().parse().unwrap();
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_once("\r\n").unwrap();
        let length: usize = length.strip_prefix('$').unwrap().parse().unwrap();
        found.push(after[..length].to_owned());
        rest = after[length..].strip_prefix("\r\n").unwrap();
    }
    assert_eq!(found.len(), count);
    found
}

fn encoded(event: &Event<'_>, max_len: i64) -> Vec<String> {
    encoded_by(Encoder::default(), event, max_len)
}

fn encoded_by(mut encoder: Encoder, event: &Event<'_>, max_len: i64) -> Vec<String> {
    let mut out = Vec::new();
    let target = Target {
        stream: "events",
        max_len,
    };
    encoder.append_xadd(&mut out, target, event).unwrap();
    arguments(&out)
}

#[test]
fn an_entry_has_all_fields() {
    let event = Event {
        event_id: *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef",
        created_at_us: 1_767_225_599_123_456,
        event_type: "user.\"created\"",
        source: "sërvice",
        subject: Some("user/1"),
        data: Some(r#"{"user_id": 123}"#),
        data_schema: Some("https://example.org/s"),
        publisher_config: Some(r#"{"priority": 3, "tenant": "a b"}"#),
        stream: None,
    };
    let id = "01234567-89ab-cdef-0123-456789abcdef";
    let time = "2025-12-31T23:59:59.123456+00:00";
    let cloud_event = format!(
        r#"{{"specversion": "1.0", "type": "user.\"created\"", "source": "sërvice", "id": "{id}", "time": "{time}", "subject": "user/1", "datacontenttype": "application/json", "dataschema": "https://example.org/s", "data": {{"user_id": 123}}}}"#
    );
    let expected: Vec<&str> = vec![
        "XADD",
        "events",
        "MAXLEN",
        "~",
        "10000",
        "*",
        "event_id",
        id,
        "event_type",
        "user.\"created\"",
        "source",
        "sërvice",
        "timestamp",
        time,
        "cloud_event",
        &cloud_event,
        "priority",
        "3",
        "tenant",
        "a b",
    ];
    assert_eq!(encoded(&event, 10_000), expected);
}

#[test]
fn empty_optional_fields_are_omitted() {
    let event = Event {
        event_type: "t",
        source: "s",
        subject: Some(""),
        data: Some(" null "),
        ..Event::default()
    };
    let found = encoded(&event, 0);
    assert_eq!(found[..3], ["XADD", "events", "*"]);
    let keys: Vec<String> = serde_json::from_str::<serde_json::Map<_, _>>(&found[12])
        .unwrap()
        .keys()
        .cloned()
        .collect();
    assert_eq!(keys, ["specversion", "type", "source", "id", "time", "datacontenttype"]);
}

#[test]
fn a_bad_publisher_config_leaves_the_buffer_alone() {
    let event = Event {
        publisher_config: Some("[]"),
        ..Event::default()
    };
    let mut out = b"before".to_vec();
    let target = Target {
        stream: "s",
        max_len: 0,
    };
    assert!(Encoder::default().append_xadd(&mut out, target, &event).is_err());
    assert_eq!(out, b"before");
}

fn whole() -> Event<'static> {
    Event {
        event_id: *b"\x01\x23\x45\x67\x89\xab\xcd\xef\x01\x23\x45\x67\x89\xab\xcd\xef",
        created_at_us: 1_767_225_599_123_456,
        event_type: "orders.update",
        source: "/shop",
        subject: Some("42"),
        data: Some(r#"{"total": 1.50}"#),
        data_schema: Some("https://example.org/s"),
        publisher_config: Some(r#"{"tenant": "b"}"#),
        stream: None,
    }
}

fn pairs(arguments: &[String]) -> Vec<(&str, &str)> {
    arguments[3..]
        .chunks(2)
        .map(|pair| (pair[0].as_str(), pair[1].as_str()))
        .collect()
}

#[test]
fn cloudevents_in_binary_mode() {
    let found = encoded_by(Encoder::new(Format::CloudEvents, Vec::new()), &whole(), 0);
    let expected = [
        ("ce_specversion", "1.0"),
        ("ce_id", "01234567-89ab-cdef-0123-456789abcdef"),
        ("ce_type", "orders.update"),
        ("ce_source", "/shop"),
        ("ce_time", "2025-12-31T23:59:59.123456+00:00"),
        ("ce_subject", "42"),
        ("ce_dataschema", "https://example.org/s"),
        ("content-type", "application/json"),
        ("data", r#"{"total": 1.50}"#),
        ("tenant", "b"),
    ];
    assert_eq!(pairs(&found), expected);
    let bare = Event {
        event_type: "t",
        source: "s",
        ..Event::default()
    };
    let found = encoded_by(Encoder::new(Format::CloudEvents, Vec::new()), &bare, 0);
    let names: Vec<&str> = pairs(&found).iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["ce_specversion", "ce_id", "ce_type", "ce_source", "ce_time"]);
}

/// Recovery looks for events in streams by the beginning of an entry's values.
#[test]
fn each_entry_identifies_its_event() {
    let name = (hyphenated(&whole().event_id), rfc3339(whole().created_at_us));
    for format in [Format::Structured, Format::Debezium] {
        let mut encoder = Encoder::new(format, Vec::new()).with_lsn();
        encoder.tell_lsn(u64::MAX);
        let found = encoded_by(encoder, &whole(), 0);
        let value = pairs(&found)
            .into_iter()
            .rfind(|(key, _)| format.own_fields(false).contains(key))
            .unwrap()
            .1;
        assert_eq!(name_in_json(&value.as_bytes()[..128]), Some(name), "{value}");
    }
    assert_eq!(name_in_json(br#"{"specversion": "1.0", "id": "short"#), None);
}

#[test]
fn structured_has_one_field() {
    let found = encoded_by(Encoder::new(Format::Structured, Vec::new()), &whole(), 0);
    let broadcaster = encoded(&whole(), 0);
    let [(name, cloud_event), further] = pairs(&found)[..] else {
        panic!("{found:?}")
    };
    assert_eq!((name, further), ("cloud_event", ("tenant", "b")));
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
    let sorted = |text: &str| {
        let mut members: Vec<_> = json(text).as_object().unwrap().clone().into_iter().collect();
        members.sort_by(|(a, _), (b, _)| a.cmp(b));
        members
    };
    assert_eq!(sorted(cloud_event), sorted(pairs(&broadcaster)[4].1));
}

#[test]
fn debezium_has_a_key_and_an_envelope() {
    let envelope = |event: &Event<'_>| {
        let found = encoded_by(Encoder::new(Format::Debezium, Vec::new()), event, 0);
        let fields = pairs(&found);
        assert_eq!((fields[0].0, fields[1].0), ("key", "value"));
        let value: serde_json::Value = serde_json::from_str(fields[1].1).unwrap();
        (fields[0].1.to_owned(), value)
    };
    let (key, value) = envelope(&whole());
    assert_eq!(key, "\"42\"");
    assert_eq!(
        (&value["op"], &value["before"]),
        (&"u".into(), &serde_json::Value::Null)
    );
    assert_eq!(value["after"].to_string(), r#"{"total":1.50}"#);
    assert_eq!(value["ts_ms"], 1_767_225_599_123_i64);
    let source = &value["source"];
    assert_eq!(
        (&source["connector"], &source["name"]),
        (&"outbox_relay".into(), &"/shop".into())
    );
    assert_eq!(source["event_id"], "01234567-89ab-cdef-0123-456789abcdef");
    let deleted = Event {
        event_type: "orders.delete",
        subject: None,
        ..whole()
    };
    let (key, value) = envelope(&deleted);
    assert_eq!(key, "\"01234567-89ab-cdef-0123-456789abcdef\"");
    assert_eq!((&value["op"], &value["after"]), (&"d".into(), &serde_json::Value::Null));
    assert_eq!(value["before"].to_string(), r#"{"total":1.50}"#);
}

#[test]
fn debezium_tells_the_old_and_the_new_row_apart() {
    let states = |event_type: &str, data: &str| {
        let event = Event {
            event_type,
            data: Some(data),
            ..whole()
        };
        let found = encoded_by(Encoder::new(Format::Debezium, Vec::new()), &event, 0);
        let value: serde_json::Value = serde_json::from_str(pairs(&found)[1].1).unwrap();
        ["before", "after", "op"].map(|name| value[name].to_string())
    };
    let (row, old_and_new) = (r#"{"a":1.50}"#, r#"{"old" : {"a": 1.0}, "new" : {"a": 1.50}}"#);
    assert_eq!(states("t.update", old_and_new), [r#"{"a":1.0}"#, row, "\"u\""]);
    assert_eq!(
        states("t.insert", r#"{"old": null, "new": {"a": 1.50}}"#),
        ["null", row, "\"c\""]
    );
    assert_eq!(
        states("t.delete", r#"{"old": {"a": 1.50}, "new": null}"#),
        [row, "null", "\"d\""]
    );
    // A publisher's own payload is left whole.
    let whole = r#"{"new":2,"old":1}"#;
    assert_eq!(states("price.raised", whole), ["null", whole, "\"c\""]);
    for data in [r#"{"old":1}"#, r#"{"old":1,"new":2,"by":3}"#, "[1,2]", "7"] {
        assert_eq!(states("t.update", data), ["null", data, "\"u\""]);
    }
}

#[test]
fn each_format_carries_the_last_position_that_was_set() {
    let told = |format: Format, position: u64| {
        let mut encoder = Encoder::new(format, Vec::new()).with_lsn();
        encoder.tell_lsn(7);
        encoder.tell_lsn(position);
        let found = encoded_by(encoder, &whole(), 0);
        let value = found.last().unwrap().clone();
        let name = found[found.len() - 2].clone();
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        match format {
            Format::Structured => json(pairs(&found)[0].1)["lsn"].to_string(),
            Format::Debezium => json(pairs(&found)[1].1)["source"]["lsn"].to_string(),
            _ => format!("{name}={value}"),
        }
    };
    assert_eq!(told(Format::Broadcaster, 0x16B_3748), "lsn=0/16B3748");
    assert_eq!(told(Format::CloudEvents, 0xA_0000_0010), "ce_lsn=A/10");
    assert_eq!(told(Format::Structured, 0x16B_3748), "\"0/16B3748\"");
    assert_eq!(told(Format::Debezium, 0x16B_3748), "23803720");
}

#[test]
fn each_format_has_a_place_for_binary_payloads() {
    let data = crate::event::binary::of_bytes(b"a\r\nb");
    let event = Event {
        data: Some(&data),
        ..whole()
    };
    let of = |format: Format| encoded_by(Encoder::new(format, Vec::new()), &event, 0);
    let found = of(Format::CloudEvents);
    assert_eq!(
        pairs(&found)[7..],
        [
            ("content-type", "application/octet-stream"),
            ("data", "a\r\nb"),
            ("tenant", "b")
        ]
    );
    for format in [Format::Broadcaster, Format::Structured] {
        let found = of(format);
        let (_, event) = pairs(&found)
            .into_iter()
            .find(|(name, _)| *name == "cloud_event")
            .unwrap();
        assert!(event.ends_with(r#""data_base64": "YQ0KYg=="}"#), "{event}");
        assert!(
            event.contains(r#""datacontenttype": "application/octet-stream""#),
            "{event}"
        );
    }
    let found = of(Format::Debezium);
    assert!(
        pairs(&found)[1]
            .1
            .contains(r#""before":null,"after":"YQ0KYg==","op":"u""#),
        "{found:?}"
    );
}

#[test]
fn static_fields_come_first_and_publishers_can_override_them() {
    let fixed = [("tenant", "a"), ("region", "eu")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let found = encoded_by(Encoder::new(Format::Structured, fixed.to_vec()), &whole(), 0);
    assert_eq!(pairs(&found)[1..], [("region", "eu"), ("tenant", "b")]);
}

#[test]
fn a_field_of_the_format_itself_is_refused() {
    for (_, format) in Format::WORDS {
        for name in format.own_fields(true) {
            let config = format!(r#"{{"{name}": 1}}"#);
            let event = Event {
                publisher_config: Some(&config),
                ..whole()
            };
            let mut out = Vec::new();
            let target = Target {
                stream: "s",
                max_len: 0,
            };
            let refused = Encoder::new(format, Vec::new())
                .with_lsn()
                .append_xadd(&mut out, target, &event);
            assert_eq!(refused, Err(ConfigError::BuiltIn((*name).to_owned())), "{format:?}");
        }
    }
}
