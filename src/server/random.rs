//! Random bytes. The result of each source is checked.

use crate::server::error::internal;

/// Random bytes of the operating system, for secrets. Raises an ERROR if it provides none. They come from a system
/// call: Postgres's own source may open a file, and a worker at its limit of descriptors has to go on.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if let Err(error) = getrandom::fill(&mut bytes) {
        internal(format!("could not generate random values: {error}"));
    }
    bytes
}

/// A random token, which names a claim.
pub(crate) fn token() -> String {
    bytes::<16>().iter().map(|b| format!("{b:02x}")).collect()
}
