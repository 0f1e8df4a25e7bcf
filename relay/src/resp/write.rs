//! Writes commands as the bytes that Redis reads. Source: RESP (Redis serialization protocol specification).

/// Appends one command.
pub(crate) fn append_command(out: &mut Vec<u8>, words: &[&[u8]]) {
    append_array_header(out, words.len());
    for word in words {
        append_bulk(out, word);
    }
}

pub(crate) fn append_array_header(out: &mut Vec<u8>, items: usize) {
    append_length(out, b'*', items);
}

pub(crate) fn append_bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    append_length(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// The bytes before a bulk string of this length. A line end must follow the string.
pub(crate) fn append_bulk_header(out: &mut Vec<u8>, length: usize) {
    append_length(out, b'$', length);
}

/// The words of one command that these functions have appended.
pub fn words(command: &[u8]) -> Vec<&[u8]> {
    let line = |bytes: &[u8]| bytes.iter().position(|byte| *byte == b'\r').unwrap_or(bytes.len());
    let after = |bytes: usize| command.get(bytes..).unwrap_or_default();
    let (mut words, mut at) = (Vec::new(), line(command) + 2);
    while let [b'$', rest @ ..] = after(at) {
        let digits = line(rest);
        let length = std::str::from_utf8(&rest[..digits])
            .ok()
            .and_then(|text| text.parse().ok());
        let begin = at + 1 + digits + 2;
        let end = begin + length.unwrap_or(0);
        words.push(command.get(begin..end).unwrap_or_default());
        at = end + 2;
    }
    words
}

/// Most lengths are short, and each entry has a dozen of them, so these are written in one piece.
fn append_length(out: &mut Vec<u8>, kind: u8, length: usize) {
    let digit = |value: usize| b'0' + (value % 10) as u8;
    match length {
        0..10 => out.extend_from_slice(&[kind, digit(length), b'\r', b'\n']),
        10..100 => out.extend_from_slice(&[kind, digit(length / 10), digit(length), b'\r', b'\n']),
        _ => {
            out.push(kind);
            out.extend_from_slice(itoa::Buffer::new().format(length).as_bytes());
            out.extend_from_slice(b"\r\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_a_command_are_those_that_were_appended() {
        let commands: [&[&[u8]]; 3] = [
            &[b"PING"],
            &[b"XADD", b"", b"*", b"$1\r\nx\r\n", "\u{fc}".as_bytes()],
            &[],
        ];
        for command in commands {
            let mut bytes = Vec::new();
            append_command(&mut bytes, command);
            assert_eq!(words(&bytes), command);
        }
        assert_eq!(words(b""), Vec::<&[u8]>::new());
    }

    #[test]
    fn a_length_has_all_its_digits() {
        for length in [0, 9, 10, 99, 100, 12_345] {
            let mut bytes = Vec::new();
            append_length(&mut bytes, b'$', length);
            assert_eq!(bytes, format!("${length}\r\n").as_bytes());
        }
    }
}
