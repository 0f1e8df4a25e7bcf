//! When backends that take turns are looked at.

use relay::time::Now;

#[derive(Default)]
pub(super) struct Turns {
    /// Somebody waits: then there is a look.
    pub(super) look_at: Option<Now>,
    pub(super) said_at: Option<Now>,
}
