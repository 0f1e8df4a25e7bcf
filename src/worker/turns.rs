//! Times for backends that take turns.

use relay::time::Now;

#[derive(Default)]
pub(super) struct Turns {
    /// When to look for a permit, because a backend waits for its turn.
    pub(super) look_at: Option<Now>,
    pub(super) said_at: Option<Now>,
}
