//! Payloads that are bytes. In the table such a payload is a JSON string too: its base64, behind whitespace that nobody
//! else begins a string with. So rows get no column for it, what copies or erases a payload need not know of it, and it
//! reads as a string where JSON is shown.
//!
//! Source: RFC 4648, section 4, with padding, as `data_base64` of CloudEvents' JSON format.

/// What marks it, with the string's quote.
const MARK: &str = "\r\t\r\"";
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
/// Of bytes that stand for nothing.
const NONE: u8 = 64;

/// The payload of some bytes, as a row has it.
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

/// The payload of what is base64 already; `None`: it is not.
pub fn of_base64(base64: &str) -> Option<String> {
    is_base64(base64).then(|| format!("{MARK}{base64}\""))
}

/// Whether a row's payload says that it is bytes. If it is wrong about that, it is sent as the JSON that it is.
pub fn is_marked(data: &[u8]) -> bool {
    data.starts_with(MARK.as_bytes())
}

/// The base64 of a row's payload, if that is bytes.
pub(super) fn base64_of(data: &str) -> Option<&str> {
    let base64 = data.strip_prefix(MARK)?.strip_suffix('"')?;
    is_base64(base64).then_some(base64)
}

/// How many bytes a base64 stands for.
pub(super) fn decoded_len(base64: &str) -> usize {
    base64.len() / 4 * 3 - padding(base64)
}

/// Appends these bytes.
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
    // Bits that are left over are zero, or two texts would stand for the same bytes.
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
    fn bytes_are_base64_and_back() {
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
    fn what_is_not_base64_is_no_bytes() {
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
