//! Times for backends that take turns.

use relay::time::Now;

#[derive(Default)]
pub(super) struct Turns {
    /// A backend waits for its turn: when to look for a permit.
    pub(super) look_at: Option<Now>,
    pub(super) said_at: Option<Now>,
}
