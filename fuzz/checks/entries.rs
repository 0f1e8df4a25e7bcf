//! Published events, and the entries that are made of them.

use super::taken;
use redis::Value;
use relay::event::format::{Encoder, Format, Target};
use relay::event::text::{hyphenated, rfc3339};
use relay::event::{ConfigError, Event, further_fields};
use relay::resp::bounds::Bounds;
use std::borrow::Cow;
use std::collections::BTreeSet;

/// Takes texts from the front of the input.
struct Texts<'a>(&'a [u8]);

impl<'a> Texts<'a> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn number(&mut self) -> i64 {
        (0..8).fold(0, |number, _| number << 8 | i64::from(self.byte()))
    }

    fn text(&mut self) -> Cow<'a, str> {
        let length = usize::from(self.byte()).min(self.0.len());
        let (text, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8_lossy(text)
    }

    fn maybe(&mut self) -> Option<Cow<'a, str>> {
        (self.byte() & 1 != 0).then(|| self.text())
    }

    /// The text itself if it is JSON, and a substitute otherwise.
    fn json(&mut self) -> Option<String> {
        let text = self.maybe()?;
        let is_json = serde_json::from_str::<serde_json::Value>(&text).is_ok();
        Some(if is_json {
            text.into_owned()
        } else {
            serde_json::json!({ text.as_ref(): [text] }).to_string()
        })
    }
}

/// An entry decodes to the arguments that it was made of, and its cloud_event is JSON with the same values.
pub(crate) fn encode(input: &[u8]) {
    let mut texts = Texts(input);
    let mut event_id = [0; 16];
    event_id.iter_mut().for_each(|byte| *byte = texts.byte());
    let (created_at_us, max_len) = (texts.number(), texts.number());
    let (stream, event_type, source) = (texts.text(), texts.text(), texts.text());
    let (subject, schema, data, config) = (texts.maybe(), texts.maybe(), texts.json(), texts.maybe());
    let event = Event {
        event_id,
        created_at_us,
        event_type: &event_type,
        source: &source,
        subject: subject.as_deref(),
        data: data.as_deref(),
        data_schema: schema.as_deref(),
        publisher_config: config.as_deref(),
        stream: None,
    };
    let built_in = Format::Broadcaster.own_fields(false);
    let further = config.as_deref().map(|config| further_fields(config, built_in));
    let mut bytes = b"before".to_vec();
    let mut encoder = Encoder::default();
    let target = Target {
        stream: &stream,
        max_len,
    };
    let written = encoder.append_xadd(&mut bytes, target, &event);
    let further = match further.transpose() {
        Err(refused) => {
            assert_eq!((written, bytes.as_slice()), (Err(refused), b"before".as_slice()));
            return;
        }
        Ok(further) => further.unwrap_or_default(),
    };
    assert_eq!(written, Ok(()));
    // Caching the last second changes nothing.
    let first = bytes.len();
    encoder.append_xadd(&mut bytes, target, &event).expect("as before");
    assert_eq!(bytes[b"before".len()..first], bytes[first..]);

    let id = String::from_utf8(hyphenated(&event_id).to_vec()).expect("hexadecimal digits");
    let time = String::from_utf8(rfc3339(created_at_us).to_vec()).expect("digits");
    let words = decoded(&bytes[b"before".len()..first]);
    let mut expected = vec!["XADD".to_owned(), stream.clone().into_owned()];
    if max_len > 0 {
        expected.extend(["MAXLEN".to_owned(), "~".to_owned(), max_len.to_string()]);
    }
    expected.push("*".to_owned());
    for (name, value) in [
        ("event_id", id.as_str()),
        ("event_type", &event_type),
        ("source", &source),
        ("timestamp", &time),
    ] {
        expected.extend([name.to_owned(), value.to_owned()]);
    }
    expected.push("cloud_event".to_owned());
    let at = expected.len();
    assert_eq!(words[..at], expected[..]);
    let pairs: Vec<String> = further.into_iter().flat_map(|(key, value)| [key, value]).collect();
    assert_eq!(words[at + 1..], pairs[..]);

    check_formats(target, &event);
    check_cloud_event(&words[at], &event, &id, &time);
}

/// In each format an entry has as many values as names.
fn check_formats(target: Target<'_>, event: &Event<'_>) {
    for (_, format) in Format::WORDS {
        let mut bytes = Vec::new();
        let fixed = vec![("static".to_owned(), "value".to_owned())];
        if Encoder::new(format, fixed)
            .append_xadd(&mut bytes, target, event)
            .is_ok()
        {
            let fields = decoded(&bytes).len() - 3 - if target.max_len > 0 { 3 } else { 0 };
            assert!(fields.is_multiple_of(2), "{format:?} has {fields} names and values");
        }
    }
}

/// It is JSON with the values of the event.
fn check_cloud_event(text: &str, event: &Event<'_>, id: &str, time: &str) {
    let cloud: serde_json::Value = serde_json::from_str(text).expect("cloud_event is JSON");
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    let mut object = serde_json::json!({ "specversion": "1.0", "type": event.event_type, "source": event.source, "id": id, "time": time,
        "datacontenttype": "application/json" });
    for (name, value) in [
        (
            "subject",
            event.subject.filter(|s| !s.is_empty()).map(|s| serde_json::json!(s)),
        ),
        (
            "dataschema",
            event
                .data_schema
                .filter(|s| !s.is_empty())
                .map(|s| serde_json::json!(s)),
        ),
        ("data", event.data.filter(|d| d.trim_ascii() != "null").map(json)),
    ] {
        value.into_iter().for_each(|value| object[name] = value);
    }
    // Whatever the order of the keys.
    let same = |a: &serde_json::Value, b: &serde_json::Value| a.as_object().map(sorted) == b.as_object().map(sorted);
    assert!(same(&cloud, &object), "{cloud} is not {object}");
}

fn sorted(object: &serde_json::Map<String, serde_json::Value>) -> Vec<(&String, &serde_json::Value)> {
    let mut pairs: Vec<_> = object.iter().collect();
    pairs.sort_by_key(|(key, _)| *key);
    pairs
}

/// The words of one command, by the parser of `redis` and by the relay's own decoder.
fn decoded(bytes: &[u8]) -> Vec<String> {
    let (found, garbage) = taken(bytes, &Bounds::ANY, std::iter::repeat(usize::MAX));
    assert!(
        !garbage && found == [bytes],
        "the decoder sees {} commands",
        found.len()
    );
    let Ok(Value::Array(words)) = redis::parse_redis_value(bytes) else {
        panic!("no array of words")
    };
    let text = |word| match word {
        Value::BulkString(bytes) => String::from_utf8(bytes).expect("UTF-8"),
        other => panic!("a word is {other:?}"),
    };
    words.into_iter().map(text).collect()
}

/// An accepted `publisher_config` gives each of its keys once, none of them built in, with the text of its value.
pub(crate) fn publish(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let parsed = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(&text);
    let built_in = Format::Broadcaster.own_fields(false);
    let fields = further_fields(&text, built_in);
    if matches!(fields, Err(ConfigError::OutOfRange(_) | ConfigError::TooManyDigits))
        || text.contains("serde_json")
        || text.contains("\\u")
    {
        // Such names, or names with escapes, are what the parser uses for its own numbers.
        return;
    }
    let Ok(fields) = fields else {
        let flat = |value: &serde_json::Value| value.is_string() || value.is_number() || value.is_boolean();
        let is_refused = |(key, value): (&String, &serde_json::Value)| built_in.contains(&key.as_str()) || !flat(value);
        assert!(
            parsed.is_err() || parsed.is_ok_and(|object| object.iter().any(is_refused)),
            "{text}"
        );
        return;
    };
    let object = parsed.expect("what was taken is an object");
    assert_eq!(fields.len(), object.len());
    let keys: BTreeSet<&str> = fields.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys.len(), fields.len(), "a key twice");
    for (key, value) in &fields {
        assert!(!built_in.contains(&key.as_str()));
        match &object[key] {
            serde_json::Value::String(text) => assert_eq!(value, text),
            serde_json::Value::Number(number) => {
                assert!(!value.contains(['e', 'E']), "{value}");
                assert_eq!(
                    value.parse::<f64>().map(f64::abs),
                    number.to_string().parse::<f64>().map(f64::abs)
                );
            }
            other => assert_eq!(*value, other.to_string()),
        }
    }
}
