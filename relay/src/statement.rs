//! What the text of a statement tells about it.

/// Comments before a statement are read up to this length.
const LOOKED_INTO: usize = 4_096;

/// Whether this is, or may be, a COMMIT PREPARED. For most other texts the first letter decides.
pub fn is_commit_prepared(text: &[u8]) -> bool {
    let text = text.trim_ascii_start();
    match text.first() {
        Some(b'c' | b'C') => {
            text.get(..6).is_some_and(|word| word.eq_ignore_ascii_case(b"commit")) && holds_prepared(&text[6..])
        }
        // A comment may contain anything, and empty statements may come first.
        Some(b'/' | b'-' | b';') => holds_prepared(text),
        _ => false,
    }
}

fn holds_prepared(text: &[u8]) -> bool {
    const WORD: &[u8] = b"prepared";
    let text = &text[..text.len().min(LOOKED_INTO)];
    text.windows(WORD.len()).any(|part| part.eq_ignore_ascii_case(WORD))
}

#[cfg(test)]
mod tests {
    use super::is_commit_prepared;

    #[test]
    fn a_commit_prepared_is_recognised_by_its_first_words() {
        for text in [
            "commit prepared 'a'",
            "\n  COMMIT\tPrepared 'a';",
            "/* app:1 */ commit prepared 'a'",
            "-- why\ncommit /* this */ prepared 'a'",
        ] {
            assert!(is_commit_prepared(text.as_bytes()), "{text}");
        }
        for text in [
            "",
            "commit",
            "c",
            "select 'commit prepared'",
            "create table prepared ()",
            "rollback prepared 'a'",
            "/* app */ select 1",
        ] {
            assert!(!is_commit_prepared(text.as_bytes()), "{text}");
        }
    }
}
