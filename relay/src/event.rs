//! An event as it is read from the table and encoded, borrowed from wherever its row lies.

/// One event. Texts are UTF-8; `data` and `publisher_config` are JSON texts as Postgres rendered them.
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

/// Fields of an entry that `publisher_config` may not name.
pub const BUILT_IN_FIELDS: [&str; 5] = ["event_id", "event_type", "source", "timestamp", "cloud_event"];

/// Why a `publisher_config` is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("publisher_config must be a JSON object")]
    NotAnObject,
    #[error("publisher_config key \"{0}\" has a value that is not a string, number or boolean")]
    NotFlat(String),
    #[error("publisher_config must not name the built-in field \"{0}\"")]
    BuiltIn(String),
}

/// The further stream fields that a `publisher_config` stands for, in its order: strings as they are, numbers and
/// booleans as JSON writes them.
pub fn further_fields(publisher_config: &str) -> Result<Vec<(String, String)>, ConfigError> {
    // Numbers are kept as text: a float's digits are the publisher's, not ours.
    let object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(publisher_config).map_err(|_| ConfigError::NotAnObject)?;
    object
        .into_iter()
        .map(|(key, value)| {
            if BUILT_IN_FIELDS.contains(&key.as_str()) {
                return Err(ConfigError::BuiltIn(key));
            }
            match value {
                serde_json::Value::String(text) => Ok((key, text)),
                serde_json::Value::Number(number) => Ok((key, number.to_string())),
                serde_json::Value::Bool(flag) => Ok((key, flag.to_string())),
                _ => Err(ConfigError::NotFlat(key)),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn further_fields_keep_order_and_digits() {
        let fields = further_fields(r#"{"z": "a\nb", "n": 1.10, "big": 123456789012345678901234567890, "t": true}"#);
        let expected = [
            ("z", "a\nb"),
            ("n", "1.10"),
            ("big", "123456789012345678901234567890"),
            ("t", "true"),
        ];
        assert_eq!(fields.unwrap(), expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }

    #[test]
    fn refuses_what_is_not_flat() {
        assert_eq!(further_fields("[1]"), Err(ConfigError::NotAnObject));
        assert_eq!(further_fields("3"), Err(ConfigError::NotAnObject));
        for text in [r#"{"a": {}}"#, r#"{"a": [1]}"#, r#"{"a": null}"#] {
            assert_eq!(further_fields(text), Err(ConfigError::NotFlat("a".into())), "{text}");
        }
        let built_in = further_fields(r#"{"event_id": "x"}"#);
        assert_eq!(built_in, Err(ConfigError::BuiltIn("event_id".into())));
    }
}
