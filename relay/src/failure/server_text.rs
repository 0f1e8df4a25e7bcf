//! Texts of a server that are shown to users: on one line, cut to length, without secrets and invisible characters.

use std::borrow::Cow;
use std::cell::RefCell;

thread_local! {
    static SECRETS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// From now on, no failure of this thread, which serves one connection, shows `secret`. Some servers and proxies repeat
/// what was sent to them.
pub fn hide(secret: &str) {
    /// Shorter secrets could be parts of common words.
    const SHORTEST: usize = 4;
    if secret.len() >= SHORTEST {
        SECRETS.with_borrow_mut(|secrets| secrets.extend([secret.to_owned(), cleaned(secret)]));
    }
}

/// A server's text on one line, without secrets and invisible characters, cut to 200 characters.
pub fn shown(text: &str) -> String {
    const LIMIT: usize = 200;
    // Secrets are hidden before the text is cut, because otherwise the beginning of a secret could remain, and again
    // after it was cleaned, in case the server has cleaned the secret too.
    let text = cleaned(&hidden(text.trim()));
    let text = hidden(text.trim());
    let mut out: String = text.chars().take(LIMIT).collect();
    if text.chars().nth(LIMIT).is_some() {
        out.push_str("...");
    }
    out
}

/// The text up to the first secret in it.
fn hidden(text: &str) -> Cow<'_, str> {
    let first = SECRETS.with_borrow(|secrets| secrets.iter().filter_map(|secret| text.find(secret)).min());
    match first {
        Some(at) => format!("{}(the rest is omitted: it contains the password)", &text[..at]).into(),
        None => text.into(),
    }
}

/// The text on one line, without invisible characters.
pub fn cleaned(text: &str) -> String {
    text.chars().map(|c| if is_unseen(c) { ' ' } else { c }).collect()
}

/// Control characters, and Unicode characters without width that change direction, join, separate or tag.
fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_text_is_cut_and_cleaned() {
        let text = shown(&format!("a\r\nb\0{}", "x".repeat(500)));
        assert!(text.starts_with("a  b xxx") && text.ends_with("..."));
        assert_eq!(text.chars().count(), 203);
    }

    #[test]
    fn invisible_characters_are_not_shown() {
        let text = "a\u{1b}[31mb\u{202e}c\u{2066}d\u{200b}e\u{feff}f\u{2028}g\u{9b}h\u{7}i\tj\u{e0041}k";
        assert_eq!(shown(text), "a [31mb c d e f g h i j k");
        assert_eq!(shown("zażółć 日本 é ok"), "zażółć 日本 é ok");
    }

    #[test]
    fn a_secret_is_not_shown_wherever_it_occurs() {
        let secret = "qz qz\rqzqz";
        hide(secret);
        let rest = "(the rest is omitted: it contains the password)";
        for (text, expected) in [
            (
                format!("ERR you said {secret}, {secret}"),
                format!("ERR you said {rest}"),
            ),
            ("ERR you said qz qz qzqz".to_owned(), format!("ERR you said {rest}")),
            (format!("{secret} is wrong"), rest.to_owned()),
            ("ERR qz qz".to_owned(), "ERR qz qz".to_owned()),
        ] {
            assert_eq!(shown(&text), expected);
        }
        for before in 150..220 {
            let message = shown(&format!("{}{secret}", "x".repeat(before)));
            assert!(!message.contains('q'), "{before}: {message}");
        }
    }
}
