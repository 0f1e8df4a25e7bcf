//! An event as it is read from the table and encoded, borrowed from its row.

pub mod binary;
mod clock;
mod decimal;
pub mod doubts;
pub mod format;
pub mod routes;
pub mod stream_name;
pub mod text;
pub mod trace;
pub mod wanted;

use crate::failure::memory;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::collections::HashMap;
use std::fmt;

/// One event. Texts are UTF-8; `data` and `publisher_config` are JSON texts as Postgres rendered them; see [`binary`]
/// for binary payloads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Event<'a> {
    pub event_id: [u8; 16],
    /// Microseconds since 1970-01-01 UTC.
    pub created_at_us: i64,
    pub event_type: &'a str,
    pub source: &'a str,
    pub subject: Option<&'a str>,
    pub data: Option<&'a str>,
    pub data_schema: Option<&'a str>,
    /// A flat JSON object: further fields of the entry.
    pub publisher_config: Option<&'a str>,
    /// `None`: the backend's own stream.
    pub stream: Option<&'a str>,
}

/// Why a `publisher_config` is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("publisher_config must be a JSON object")]
    NotAnObject,
    /// A string that holds an object.
    #[error("publisher_config must be a JSON object")]
    EncodedTwice,
    #[error("publisher_config key \"{0}\" has a value that is not a string, number or boolean")]
    NotFlat(String),
    #[error("publisher_config must not name the built-in field \"{0}\"")]
    BuiltIn(String),
    #[error("publisher_config key \"{0}\" has a number that is out of range")]
    OutOfRange(String),
    #[error("publisher_config has numbers of too many digits")]
    TooManyDigits,
    /// It may be in order, but cannot be read now.
    #[error(transparent)]
    NoMemory(#[from] memory::NoMemory),
}

/// Why an event can be no entry of its stream.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoEntry {
    /// Somebody has changed the stream in the row since it was checked.
    #[error("stream \"{0}\" is the key of a guard")]
    Reserved(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The fields of an object take up to this many times its size, if they are many and short.
const GROWTH: usize = 48;
/// For a smaller object, nobody looks whether there is memory.
const LARGE: usize = 64 * 1024;

/// By how many bytes numbers with exponents may become longer, in total.
const MOST_ADDED: usize = 1024 * 1024;

/// The further stream fields in a `publisher_config`, in its order: strings unchanged, numbers as jsonb shows them, and
/// booleans as JSON writes them. `built_in`: field names that it must not use.
pub fn further_fields(publisher_config: &str, built_in: &[&str]) -> Result<Vec<(String, String)>, ConfigError> {
    if publisher_config.len() > LARGE {
        memory::expect(publisher_config.len().saturating_mul(GROWTH))?;
    }
    let Members(members) = serde_json::from_str(publisher_config).map_err(|_| not_an_object(publisher_config))?;
    let mut fields: Vec<(String, String)> = Vec::with_capacity(members.len());
    let mut room = publisher_config.len() + MOST_ADDED;
    for (key, value) in members {
        if built_in.contains(&key.as_str()) {
            return Err(ConfigError::BuiltIn(key));
        }
        // The type is judged by the text, because the parser would take an object with a certain key for a number.
        let value = value.get();
        let text = match value.as_bytes() {
            [b'"', ..] => serde_json::from_str(value).map_err(|_| ConfigError::NotAnObject)?,
            [b't' | b'f', ..] => value.to_owned(),
            [b'-' | b'0'..=b'9', ..] => match decimal::plain(value) {
                Some(text) => text.into_owned(),
                None => return Err(ConfigError::OutOfRange(key)),
            },
            _ => return Err(ConfigError::NotFlat(key)),
        };
        room = match room.checked_sub(text.len()) {
            Some(room) => room,
            None => return Err(ConfigError::TooManyDigits),
        };
        fields.push((key, text));
    }
    Ok(fields)
}

fn not_an_object(publisher_config: &str) -> ConfigError {
    match doubts::holds_json(publisher_config) {
        true => ConfigError::EncodedTwice,
        false => ConfigError::NotAnObject,
    }
}

/// The members of a JSON object. A repeated key is kept at its first place with its last value.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members: Vec<(String, &'de RawValue)> = Vec::new();
                let mut places: HashMap<String, usize> = HashMap::new();
                while let Some((key, value)) = map.next_entry::<String, &RawValue>()? {
                    match places.get(&key) {
                        Some(place) => members[*place].1 = value,
                        None => {
                            places.insert(key.clone(), members.len());
                            members.push((key, value));
                        }
                    }
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn further_fields_keep_order_and_digits() {
        let fields = further_fields(
            r#"{"z": "a\nb", "n": 1.10, "big": 123456789012345678901234567890, "t": true}"#,
            &[],
        );
        let expected = [
            ("z", "a\nb"),
            ("n", "1.10"),
            ("big", "123456789012345678901234567890"),
            ("t", "true"),
        ];
        assert_eq!(fields.unwrap(), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }

    #[test]
    fn the_total_length_of_numbers_is_limited() {
        let many = |count: usize| {
            let numbers: Vec<String> = (0..count).map(|n| format!(r#""{n}": 1e131071"#)).collect();
            further_fields(&format!("{{{}}}", numbers.join(", ")), &[])
        };
        assert_eq!(many(8).map(|fields| fields.len()), Ok(8));
        assert_eq!(many(60_000), Err(ConfigError::TooManyDigits));
        assert_eq!(
            further_fields(r#"{"a": 1e999999}"#, &[]),
            Err(ConfigError::OutOfRange("a".into()))
        );
    }

    #[test]
    fn a_repeated_key_has_its_last_value() {
        let fields = further_fields(r#"{"a": {}, "b": 2, "a": "last"}"#, &[]);
        assert_eq!(fields, Ok(vec![("a".into(), "last".into()), ("b".into(), "2".into())]));
    }

    #[test]
    fn nested_values_are_refused() {
        assert_eq!(further_fields("[1]", &[]), Err(ConfigError::NotAnObject));
        assert_eq!(further_fields("3", &[]), Err(ConfigError::NotAnObject));
        assert_eq!(further_fields(r#""{\"a\": 1}""#, &[]), Err(ConfigError::EncodedTwice));
        for text in [r#"{"a": {}}"#, r#"{"a": [1]}"#, r#"{"a": null}"#] {
            assert_eq!(
                further_fields(text, &[]),
                Err(ConfigError::NotFlat("a".into())),
                "{text}"
            );
        }
        // Keys by which the JSON parser marks its own numbers.
        for name in [
            "$serde_json::private::Number",
            "$serde_json::private::RawValue",
            "\\u0024serde_json::private::Number",
        ] {
            let text = format!(r#"{{"a": {{"{name}": "1"}}}}"#);
            assert_eq!(
                further_fields(&text, &[]),
                Err(ConfigError::NotFlat("a".into())),
                "{text}"
            );
            let text = format!(r#"{{"{name}": "1"}}"#);
            let key = name.replace("\\u0024", "$");
            assert_eq!(further_fields(&text, &[]), Ok(vec![(key, "1".into())]), "{text}");
        }
        let built_in = further_fields(r#"{"event_id": "x"}"#, &["event_id"]);
        assert_eq!(built_in, Err(ConfigError::BuiltIn("event_id".into())));
    }
}
