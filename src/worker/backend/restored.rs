//! The state of a backend's restored events. What it does about them: `comparing.rs`.

use crate::tables::backends::BackendRow;
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Restored {
    /// Restores that a lane has compared.
    pub(super) compared: Vec<i64>,
    /// The highest id of the transactions that brought these events.
    pub(super) last_compared: u64,
    /// More events were restored meanwhile: nothing is read beyond `compared_to` until they are compared too.
    pub(super) waits: bool,
    /// The tick that is being compared, and the one that was compared last.
    pub(super) comparing_to: Option<Arc<Tick>>,
    pub(super) compared_to: Option<Arc<Tick>>,
    /// The next comparison is not before this time.
    pub(super) compares_at: Now,
}

impl Restored {
    /// Whether a row names restores that must be compared.
    pub(super) fn has_new(&self, row: &BackendRow) -> bool {
        row.restores.iter().any(|restore| !self.compared.contains(restore))
    }

    pub(super) fn let_go(&mut self) {
        self.waits = false;
    }
}
