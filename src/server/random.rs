//! Random bytes. The result of each source is checked.

use crate::server::error::internal;
use pgrx::pg_sys;

/// Random bytes of the operating system, for secrets. Raises an ERROR if it provides none.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: fills the buffer that it is given.
    if !unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), N) } {
        internal("could not generate random values");
    }
    bytes
}

/// A random token, which names a claim.
pub(crate) fn token() -> String {
    bytes::<16>().iter().map(|b| format!("{b:02x}")).collect()
}
