//! From an event to the bytes of its XADD, in RESP, appended to a buffer that is used again.
//!
//! Format `broadcaster`: field for field what django-broadcaster 0.1.1 writes (`backends.py`, `models.py`): `event_id`,
//! `event_type`, `source`, `timestamp`, `cloud_event`, then the keys of `publisher_config`. Sources: RESP (Redis
//! serialization protocol specification), CloudEvents 1.0 JSON format.

use crate::event::text::{hyphenated, put_digits, rfc3339};
use crate::event::{ConfigError, Event, further_fields};
use crate::resp::write::{append_array_header, append_bulk};

/// Where an entry goes: the stream's name and its approximate length (0: unlimited).
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    pub stream: &'a str,
    pub max_len: i64,
}

/// Writes entries.
#[derive(Default)]
pub struct Encoder {
    /// Working space.
    scratch: Vec<u8>,
    clock: Clock,
}

impl Encoder {
    /// Appends one XADD command. On an error nothing is appended.
    pub fn append_xadd(&mut self, out: &mut Vec<u8>, target: Target<'_>, event: &Event<'_>) -> Result<(), ConfigError> {
        let further = event
            .publisher_config
            .map(further_fields)
            .transpose()?
            .unwrap_or_default();
        let trims = target.max_len > 0;
        let arguments = 3 + if trims { 3 } else { 0 } + 2 * (5 + further.len());
        let event_id = hyphenated(&event.event_id);
        let timestamp = self.clock.rfc3339(event.created_at_us);
        self.scratch.clear();
        append_cloud_event(&mut self.scratch, event, &event_id, &timestamp);

        // Most bytes are the same in each entry. They are written in as few pieces as the values between them allow.
        append_array_header(out, arguments);
        out.extend_from_slice(b"$4\r\nXADD\r\n");
        append_bulk(out, target.stream.as_bytes());
        if trims {
            out.extend_from_slice(b"$6\r\nMAXLEN\r\n$1\r\n~\r\n");
            append_bulk(out, itoa::Buffer::new().format(target.max_len).as_bytes());
        }
        out.extend_from_slice(b"$1\r\n*\r\n$8\r\nevent_id\r\n$36\r\n");
        out.extend_from_slice(&event_id);
        out.extend_from_slice(b"\r\n$10\r\nevent_type\r\n");
        append_bulk(out, event.event_type.as_bytes());
        out.extend_from_slice(b"$6\r\nsource\r\n");
        append_bulk(out, event.source.as_bytes());
        out.extend_from_slice(b"$9\r\ntimestamp\r\n$32\r\n");
        out.extend_from_slice(&timestamp);
        out.extend_from_slice(b"\r\n$11\r\ncloud_event\r\n");
        append_bulk(out, &self.scratch);
        for (key, value) in &further {
            append_bulk(out, key.as_bytes());
            append_bulk(out, value.as_bytes());
        }
        Ok(())
    }
}

/// Remembers the second of the last timestamp: neighbours differ only in the fraction.
struct Clock {
    second: i64,
    text: [u8; 32],
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            second: 0,
            text: rfc3339(0),
        }
    }
}

impl Clock {
    fn rfc3339(&mut self, us: i64) -> [u8; 32] {
        let second = us.div_euclid(1_000_000);
        if second != self.second {
            (self.second, self.text) = (second, rfc3339(us));
        }
        put_digits(&mut self.text[20..26], us.rem_euclid(1_000_000) as u32);
        self.text
    }
}

/// The CloudEvents 1.0 JSON object, with the spacing that both Python's `json.dumps` and Postgres's jsonb use.
/// Optional attributes are left out when empty; so is `data` when it is JSON null.
fn append_cloud_event(out: &mut Vec<u8>, event: &Event<'_>, event_id: &[u8; 36], timestamp: &[u8]) {
    out.extend_from_slice(br#"{"specversion": "1.0", "type": "#);
    append_json_string(out, event.event_type);
    out.extend_from_slice(br#", "source": "#);
    append_json_string(out, event.source);
    out.extend_from_slice(br#", "id": ""#);
    out.extend_from_slice(event_id);
    out.extend_from_slice(br#"", "time": ""#);
    out.extend_from_slice(timestamp);
    out.push(b'"');
    if let Some(subject) = event.subject.filter(|s| !s.is_empty()) {
        out.extend_from_slice(br#", "subject": "#);
        append_json_string(out, subject);
    }
    out.extend_from_slice(br#", "datacontenttype": "application/json""#);
    if let Some(schema) = event.data_schema.filter(|s| !s.is_empty()) {
        out.extend_from_slice(br#", "dataschema": "#);
        append_json_string(out, schema);
    }
    if let Some(data) = event.data.filter(|d| d.trim_ascii() != "null") {
        out.extend_from_slice(br#", "data": "#);
        out.extend_from_slice(data.as_bytes());
    }
    out.push(b'}');
}

fn append_json_string(out: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(out, text).expect("writing a string to memory does not fail");
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut out = Vec::new();
        let target = Target {
            stream: "events",
            max_len,
        };
        Encoder::default().append_xadd(&mut out, target, event).unwrap();
        arguments(&out)
    }

    #[test]
    fn a_whole_entry() {
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
    fn leaves_out_what_is_empty() {
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

    #[test]
    fn dates() {
        for (us, text) in [
            (0, "1970-01-01T00:00:00.000000+00:00"),
            (-1, "1969-12-31T23:59:59.999999+00:00"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000+00:00"),
            (4_107_542_400_000_001, "2100-03-01T00:00:00.000001+00:00"),
            (i64::MAX, "9999-12-31T04:00:54.775807+00:00"),
        ] {
            assert_eq!(std::str::from_utf8(&rfc3339(us)).unwrap(), text);
        }
    }

    #[test]
    fn a_clock_says_what_each_moment_says() {
        let mut clock = Clock::default();
        for us in [
            7,
            -1,
            -1_000_000,
            999_999,
            1_767_225_599_999_999,
            1_767_225_599_000_000,
            i64::MAX,
            i64::MAX - 1,
        ] {
            assert_eq!(clock.rfc3339(us), rfc3339(us), "{us}");
        }
    }
}
