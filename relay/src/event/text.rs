//! Event ids and times as text. Hand-written, because they are on the path of every event.

/// The two hexadecimal digits of each byte.
const HEX: [[u8; 2]; 256] = {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut pairs = [[0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [DIGITS[byte >> 4], DIGITS[byte & 15]];
        byte += 1;
    }
    pairs
};

/// A UUID in its 36-character text form.
pub fn hyphenated(uuid: &[u8; 16]) -> [u8; 36] {
    const PLACES: [usize; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];
    let mut text = [b'-'; 36];
    for (byte, at) in uuid.iter().zip(PLACES) {
        [text[at], text[at + 1]] = HEX[usize::from(*byte)];
    }
    text
}

/// The UUID of such a text.
pub fn unhyphenated(text: &[u8; 36]) -> Option<[u8; 16]> {
    let mut digits = text
        .iter()
        .filter(|byte| **byte != b'-')
        .map(|byte| (*byte as char).to_digit(16));
    let mut uuid = [0; 16];
    for byte in &mut uuid {
        *byte = (digits.next()?? << 4 | digits.next()??) as u8;
    }
    (hyphenated(&uuid).eq_ignore_ascii_case(text)).then_some(uuid)
}

/// `2026-01-31T23:59:59.123456+00:00`, from microseconds since 1970. Years outside 0 to 9999 are clamped, so that the
/// format holds. This is hand-written because a date library's formatter costs more than the rest of the entry. The
/// calendar is the proleptic Gregorian one, counted in 400-year eras that begin in March.
pub fn rfc3339(us: i64) -> [u8; 32] {
    const DAY_US: i64 = 86_400_000_000;
    const YEAR_0: i64 = -719_528;
    const YEAR_9999_END: i64 = 2_932_896;
    let day = us.div_euclid(DAY_US).clamp(YEAR_0, YEAR_9999_END);
    let in_day = us.rem_euclid(DAY_US);

    let since_march_0 = day + 719_468;
    let era = since_march_0.div_euclid(146_097);
    let day_of_era = since_march_0.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + i64::from(month <= 2);

    let mut text = *b"0000-00-00T00:00:00.000000+00:00";
    let mut put = |at: usize, width: usize, value: i64| put_digits(&mut text[at..at + width], value as u32);
    let second = in_day / 1_000_000;
    put(0, 4, year);
    put(5, 2, month);
    put(8, 2, day_of_month);
    put(11, 2, second / 3_600);
    put(14, 2, second / 60 % 60);
    put(17, 2, second % 60);
    put(20, 6, in_day % 1_000_000);
    text
}

pub(crate) fn put_digits(text: &mut [u8], mut value: u32) {
    for digit in text.iter_mut().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
    }
}
