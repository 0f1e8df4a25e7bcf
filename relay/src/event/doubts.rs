//! Signs that an event is probably not what its publisher meant.

use serde::Deserialize;
use serde::de::IgnoredAny;
use std::borrow::Cow;

/// Whether a JSON text is a string that contains a JSON object or array: it was encoded twice.
pub fn holds_json(text: &str) -> bool {
    #[derive(Deserialize)]
    #[serde(transparent)]
    struct JsonString<'a>(#[serde(borrow)] Cow<'a, str>);

    let Some(quoted) = text.trim_ascii_start().strip_prefix('"') else {
        return false;
    };
    // Most strings are plain words, which need not be read to their end.
    let begins = |text: &str| text.trim_ascii_start().starts_with(['{', '[']);
    if !begins(quoted) && !quoted.starts_with('\\') {
        return false;
    }
    let content = serde_json::from_str::<JsonString<'_>>(text);
    content.is_ok_and(|text| begins(&text.0) && serde_json::from_str::<IgnoredAny>(&text.0).is_ok())
}

/// Whether a text is a URI-reference (RFC 3986), as CloudEvents requires for `source`.
pub fn is_uri_reference(text: &[u8]) -> bool {
    let path_end = text
        .iter()
        .position(|b| matches!(b, b'/' | b'?' | b'#'))
        .unwrap_or(text.len());
    // A colon before any path, query or fragment ends the scheme.
    let rest = match text[..path_end].iter().position(|b| *b == b':') {
        Some(colon) if is_scheme(&text[..colon]) => &text[colon + 1..],
        Some(_) => return false,
        None => text,
    };
    let (authority, rest) = match rest.strip_prefix(b"//") {
        Some(after) => {
            let end = after.iter().position(|b| matches!(b, b'/' | b'?' | b'#'));
            after.split_at(end.unwrap_or(after.len()))
        }
        None => (&[][..], rest),
    };
    let hashes = rest.iter().filter(|b| **b == b'#').count();
    hashes <= 1 && is_written(authority, b"[]:@") && is_written(rest, b":@/?#")
}

fn is_scheme(text: &[u8]) -> bool {
    text.first().is_some_and(u8::is_ascii_alphabetic)
        && text
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.'))
}

/// Whether a text has only unreserved characters, sub-delimiters, percent-encoded bytes, and `more`.
fn is_written(text: &[u8], more: &[u8]) -> bool {
    text.iter().enumerate().all(|(index, byte)| match byte {
        b'%' => text
            .get(index + 1..index + 3)
            .is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit)),
        b'-' | b'.' | b'_' | b'~' | b'!' | b'$' | b'&' | b'\'' | b'(' | b')' | b'*' | b'+' | b',' | b';' | b'=' => true,
        byte => byte.is_ascii_alphanumeric() || more.contains(byte),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_that_hold_json() {
        for text in [
            r#""{\"a\": 1}""#,
            r#"" {} ""#,
            r#""[1]""#,
            r#""\n{\"a\": {}}""#,
            "\n\"{}\"",
        ] {
            assert!(holds_json(text), "{text}");
        }
        for text in [
            r#""{""#,
            r#""{a}""#,
            r#""1""#,
            r#""text""#,
            r#""""#,
            "{\"a\": \"{}\"}",
            "1",
            r#""\"{}\"""#,
            r#""\ud800""#,
        ] {
            assert!(!holds_json(text), "{text}");
        }
    }

    #[test]
    fn uri_references() {
        for text in [
            "user-service",
            "/shop/orders",
            "https://example.org/a?b=c#d",
            "urn:uuid:6e8bc430-9c3a-11d9",
            "mailto:cncf@example.com",
            "a%20b",
            "//host/path",
            "http://[::1]:80/",
            "",
            "?q",
            "#f",
            "./a:b",
            "a/b:c",
            "shop@2",
            "cloudevents+x://h",
        ] {
            assert!(is_uri_reference(text.as_bytes()), "{text}");
        }
        for text in [
            "user service",
            " ",
            "é",
            "a\nb",
            "a\\b",
            "\"a\"",
            "<a>",
            "a|b",
            "a%2",
            "a%zz",
            "a#b#c",
            "1a:b",
            ":a",
            "a^b",
            "{shop}",
            "a[0]",
            "x/[1]",
        ] {
            assert!(!is_uri_reference(text.as_bytes()), "{text}");
        }
    }
}
