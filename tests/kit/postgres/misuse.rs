//! What Postgres says of an extension that misuses it, if only in its log: without a look there, a test would pass.

/// An assertion that failed, and what a transaction had not given back: below 17, and from 17 on. Memory that was
/// written past its end; only a Postgres with assertions looks.
const WORDS: [&str; 4] = [
    "TRAP: ",
    " leak: ",
    "resource was not closed: ",
    "problem in alloc set ",
];

/// The lines of a server's log that tell of it.
pub(super) fn lines(log: &str) -> Vec<&str> {
    let tells = |line: &&str| WORDS.iter().any(|word| line.contains(word));
    log.lines().filter(tells).collect()
}
