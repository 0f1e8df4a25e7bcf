//! Writes a JSON number as Postgres's jsonb does: without an exponent. So a number is sent with the same digits whether
//! it came as json or as jsonb.

use std::borrow::Cow;

/// How many digits Postgres's numeric can have before the decimal point.
const MOST_DIGITS: usize = 131_072;
const MOST_PLACES: usize = 16_383;
const MOST_EXPONENT: i64 = i32::MAX as i64 / 2;

/// `text` must be a JSON number. `None`: numeric cannot represent it.
pub(super) fn plain(text: &str) -> Option<Cow<'_, str>> {
    let is_plain = !text.starts_with("-0") && !text.contains(['e', 'E']);
    if is_plain && text.len() <= MOST_PLACES {
        return Some(text.into());
    }
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text),
    };
    let (mantissa, exponent) = match rest.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (
            mantissa,
            exponent.parse().ok().filter(|e: &i64| e.abs() < MOST_EXPONENT)?,
        ),
        None => (rest, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = [whole, fraction].concat();
    let first = digits.bytes().position(|digit| digit != b'0');
    // The position of the decimal point, counted from the first digit that is written.
    let point = whole.len() as i64 + exponent;
    let places = (digits.len() as i64 - point).max(0);
    if places > MOST_PLACES as i64 || first.is_some_and(|first| point - first as i64 > MOST_DIGITS as i64) {
        return None;
    }
    let digit_at = |place: i64| {
        let digit = usize::try_from(place)
            .ok()
            .and_then(|place| digits.as_bytes().get(place));
        char::from(digit.copied().unwrap_or(b'0'))
    };
    let mut plain = String::new();
    match first {
        Some(first) => {
            plain.push_str(sign);
            plain.extend((first as i64..point).map(digit_at));
            if point <= first as i64 {
                plain.push('0');
            }
        }
        None => plain.push('0'),
    }
    if places > 0 {
        plain.push('.');
        plain.extend((point..point + places).map(digit_at));
    }
    Some(plain.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each second text is the result of `select '<first>'::jsonb`.
    #[test]
    fn numbers_are_shown_as_jsonb_shows_them() {
        for (text, shown) in [
            ("0", "0"),
            ("-0", "0"),
            ("-0.0", "0.0"),
            ("-0.50", "-0.50"),
            ("1.10", "1.10"),
            ("123456789012345678901234567890.5", "123456789012345678901234567890.5"),
            ("1e2", "100"),
            ("1E+2", "100"),
            ("-1.5e1", "-15"),
            ("1.50e1", "15.0"),
            ("1.0e1", "10"),
            ("12.345e-1", "1.2345"),
            ("1e-5", "0.00001"),
            ("0.05e1", "0.5"),
            ("0.05e2", "5"),
            ("0.005e1", "0.05"),
            ("0.005e4", "50"),
            ("-0.005e4", "-50"),
            ("0e5", "0"),
            ("0.0e5", "0"),
            ("0e-3", "0.000"),
            ("0.00e1", "0.0"),
            ("100e-2", "1.00"),
            ("1000e-2", "10.00"),
        ] {
            assert_eq!(plain(text).as_deref(), Some(shown), "{text}");
        }
        assert_eq!(
            plain("1e400").as_deref(),
            Some(format!("1{}", "0".repeat(400)).as_str())
        );
        assert_eq!(plain("1e131071").map(|text| text.len()), Some(131_072));
        assert_eq!(plain("1e-16383").map(|text| text.len()), Some(16_385));
        assert_eq!(plain(&"9".repeat(20_000)).map(|text| text.len()), Some(20_000));
        for text in [
            "1e131072",
            "1e-16384",
            "1e2147483648",
            "1e-99999999999",
            "1e99999999999999999999",
        ] {
            assert_eq!(plain(text), None, "{text}");
        }
        assert_eq!(plain(&"9".repeat(131_073)), None);
    }
}
