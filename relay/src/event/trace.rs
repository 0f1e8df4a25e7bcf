//! The trace context of an event: `traceparent` and `tracestate` of W3C Trace Context, level 1. It is stored in the
//! event's `publisher_config`, under these names.

pub const TRACEPARENT: &str = "traceparent";
pub const TRACESTATE: &str = "tracestate";

/// What is wrong with a `traceparent`, if anything. The format is `00-` 32 digits `-` 16 digits `-` 2 digits, in
/// lower-case hexadecimal. Later versions may append more.
pub fn fault_of_traceparent(text: &str) -> Option<&'static str> {
    let mut parts = text.splitn(5, '-');
    let mut part = |digits: usize| {
        let is_hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        parts.next().filter(|text| text.len() == digits && is_hex(text))
    };
    let (Some(version), Some(trace), Some(span), Some(_flags)) = (part(2), part(32), part(16), part(2)) else {
        return Some(
            "It must have a version, trace id, span id and flags, as in 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.",
        );
    };
    let is_zero = |id: &str| id.bytes().all(|b| b == b'0');
    if is_zero(trace) || is_zero(span) {
        return Some("An id that is all zeros is invalid.");
    }
    match (version, parts.next()) {
        ("ff", _) => Some("Version ff is invalid."),
        ("00", Some(_)) => Some("In version 00 nothing may follow the flags."),
        _ => None,
    }
}

/// What is wrong with a `tracestate`, if anything. The format is up to 32 members `key=value`, separated by commas.
pub fn fault_of_tracestate(text: &str) -> Option<&'static str> {
    const MOST_MEMBERS: usize = 32;
    const MOST_BYTES: usize = 512;
    if text.len() > MOST_BYTES {
        return Some("It is longer than 512 bytes.");
    }
    let members: Vec<&str> = text.split(',').map(|member| member.trim_matches([' ', '\t'])).collect();
    if members.len() > MOST_MEMBERS {
        return Some("It has more than 32 members.");
    }
    let is_key = |key: &str| {
        let is_valid = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'*' | b'/' | b'@');
        key.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
            && key.len() <= 256
            && key.bytes().all(is_valid)
    };
    let is_value = |value: &str| {
        let is_valid = |b: u8| matches!(b, b' '..=b'~') && b != b'=';
        !value.is_empty() && value.len() <= 256 && value.bytes().all(is_valid)
    };
    let is_member = |member: &&str| {
        let pair = member.split_once('=');
        member.is_empty() || pair.is_some_and(|(key, value)| is_key(key) && is_value(value))
    };
    match members.iter().all(is_member) {
        true => None,
        false => Some("A member is not of the form key=value, as in vendor=value,other=value."),
    }
}

/// A `publisher_config` with a trace context in front. A trace context in the config itself overrides it. A config that
/// is not an object is returned unchanged, and is refused later.
pub fn with_trace(config: Option<&[u8]>, traceparent: &str, tracestate: &str) -> Vec<u8> {
    let config = config.unwrap_or(b"{}");
    let Some(rest) = config.trim_ascii_start().strip_prefix(b"{") else {
        return config.to_vec();
    };
    let mut out = Vec::with_capacity(config.len() + traceparent.len() + tracestate.len() + 40);
    let mut before: &[u8] = b"{";
    for (name, value) in [(TRACEPARENT, traceparent), (TRACESTATE, tracestate)] {
        if value.is_empty() {
            continue;
        }
        out.extend_from_slice(before);
        serde_json::to_writer(&mut out, name).expect("writing a string to memory does not fail");
        out.extend_from_slice(b": ");
        serde_json::to_writer(&mut out, value).expect("writing a string to memory does not fail");
        before = b", ";
    }
    if !rest.trim_ascii_start().starts_with(b"}") {
        out.extend_from_slice(before);
    }
    out.extend_from_slice(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::further_fields;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn malformed_trace_contexts_have_a_fault() {
        assert_eq!(fault_of_traceparent(PARENT), None);
        assert_eq!(
            fault_of_traceparent(&format!("{}-more", PARENT.replacen("00", "01", 1))),
            None
        );
        for text in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n",
            "00-0af7651916cd43dd8448eb211c80319g-b7ad6b7169203331-01",
        ] {
            assert!(fault_of_traceparent(text).is_some(), "{text}");
        }
        for text in ["a=b", "vendor=v1,other@tenant=x/y", "", "a=b, c=d,"] {
            assert_eq!(fault_of_tracestate(text), None, "{text}");
        }
        let many = vec!["a=b"; 33].join(",");
        let long = format!("a={}", "x".repeat(600));
        for text in ["a", "A=b", "a=", "a=b\n", "a=ä", many.as_str(), long.as_str()] {
            assert!(fault_of_tracestate(text).is_some(), "{text}");
        }
    }

    #[test]
    fn a_trace_context_comes_first_and_publishers_can_override_it() {
        let fields = |config: Option<&str>, state: &str| {
            let text = String::from_utf8(with_trace(config.map(str::as_bytes), PARENT, state)).unwrap();
            further_fields(&text, &[]).unwrap()
        };
        let own = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(fields(None, ""), [own(TRACEPARENT, PARENT)]);
        assert_eq!(
            fields(Some(" { \"a\": 1}"), "x=\"y\""),
            [own(TRACEPARENT, PARENT), own(TRACESTATE, "x=\"y\""), own("a", "1")]
        );
        assert_eq!(fields(Some("{ }"), ""), [own(TRACEPARENT, PARENT)]);
        assert_eq!(
            fields(Some("{\"traceparent\": \"mine\"}"), ""),
            [own(TRACEPARENT, "mine")]
        );
        assert_eq!(with_trace(Some(b"[1]"), PARENT, ""), b"[1]");
    }
}
