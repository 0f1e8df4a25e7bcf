//! Binary payloads. In the table, such a payload is a JSON string as well: its base64, after whitespace that no other
//! encoder writes before a string. So rows need no further column for it, code that copies or erases a payload need not
//! know about it, and it looks like a string where JSON is shown.
//!
//! Source: RFC 4648, section 4, with padding, as `data_base64` in CloudEvents' JSON format.

/// The mark, with the string's opening quote.
const MARK: &str = "\r\t\r\"";
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/// The value of bytes that are not base64 digits.
const NONE: u8 = 64;

/// The payload for some bytes, as a row stores it.
pub fn of_bytes(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(MARK.len() + bytes.len().div_ceil(3) * 4 + 1);
    text.push_str(MARK);
    for piece in bytes.chunks(3) {
        let at = |index: usize| u32::from(piece.get(index).copied().unwrap_or_default());
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for place in 0..4 {
            let digit = ALPHABET[(bits >> (18 - 6 * place) & 63) as usize];
            text.push(if place <= piece.len() { char::from(digit) } else { '=' });
        }
    }
    text.push('"');
    text
}

/// The payload for a base64 text; `None`: it is not base64.
pub fn of_base64(base64: &str) -> Option<String> {
    is_base64(base64).then(|| format!("{MARK}{base64}\""))
}

/// Whether a row's payload is marked as binary. If it is marked but is not base64, it is sent as JSON.
pub fn is_marked(data: &[u8]) -> bool {
    data.starts_with(MARK.as_bytes())
}

/// The base64 of a row's payload, if that is binary.
pub(super) fn base64_of(data: &str) -> Option<&str> {
    let base64 = data.strip_prefix(MARK)?.strip_suffix('"')?;
    is_base64(base64).then_some(base64)
}

/// How many bytes a base64 text encodes.
pub(super) fn decoded_len(base64: &str) -> usize {
    base64.len() / 4 * 3 - padding(base64)
}

/// Appends the decoded bytes.
pub(super) fn decode(out: &mut Vec<u8>, base64: &str) {
    let end = out.len() + decoded_len(base64);
    for piece in base64.as_bytes().chunks(4) {
        let bits = piece
            .iter()
            .fold(0, |bits, digit| bits << 6 | u32::from(value_of(*digit)) & 63);
        out.extend_from_slice(&bits.to_be_bytes()[1..]);
    }
    out.truncate(end);
}

fn is_base64(text: &str) -> bool {
    let padding = padding(text);
    let digits = text.as_bytes().split_at(text.len() - padding).0;
    // Unused bits must be zero. Otherwise two texts would encode the same bytes.
    let left_over = match padding {
        0 => 0,
        1 => 0b11,
        _ => 0b1111,
    };
    let ends_well = digits.last().is_none_or(|last| value_of(*last) & left_over == 0);
    text.len().is_multiple_of(4) && ends_well && digits.iter().all(|digit| value_of(*digit) != NONE)
}

fn padding(base64: &str) -> usize {
    base64.bytes().rev().take(2).take_while(|digit| *digit == b'=').count()
}

fn value_of(digit: u8) -> u8 {
    match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => NONE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The test vectors of RFC 4648, section 10.
    #[test]
    fn bytes_are_encoded_as_base64_and_decoded() {
        for (bytes, base64) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(of_bytes(bytes.as_bytes()), format!("\r\t\r\"{base64}\""));
            assert_eq!(of_base64(base64), Some(of_bytes(bytes.as_bytes())));
        }
        let all: Vec<u8> = (0..=255).collect();
        for length in 0..=all.len() {
            let data = of_bytes(&all[..length]);
            let base64 = base64_of(&data).unwrap();
            let mut back = Vec::new();
            decode(&mut back, base64);
            assert_eq!((back.as_slice(), decoded_len(base64)), (&all[..length], length));
            assert!(serde_json::from_str::<String>(&data).is_ok_and(|text| text == base64));
        }
    }

    #[test]
    fn a_payload_that_is_not_base64_is_not_binary() {
        for text in [
            "Zg", "Zg=", "Zg===", "Z===", "====", "Zh==", "Zm9=", "Zm9v\n", "Zm 9", "Zm9-", "Zm9_", "=m9v", "Zg==Zg==",
        ] {
            assert_eq!(of_base64(text), None, "{text}");
            assert_eq!(base64_of(&format!("{MARK}{text}\"")), None, "{text}");
        }
        for data in ["\"Zg==\"", " \"Zg==\"", "\r\t\r{}", "\r\t\r\"", "", "null"] {
            assert_eq!(base64_of(data), None, "{data:?}");
        }
    }
}
