//! Commands as the bytes that Redis reads. Source: RESP (Redis serialization protocol specification).

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

fn append_length(out: &mut Vec<u8>, kind: u8, length: usize) {
    out.push(kind);
    out.extend_from_slice(itoa::Buffer::new().format(length).as_bytes());
    out.extend_from_slice(b"\r\n");
}
