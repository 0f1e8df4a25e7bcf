//! How far a backend is with events of dumps. What it does about them: `comparing.rs`.

use crate::tables::backends::BackendRow;
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Restored {
    /// Restores whose events a lane has compared.
    pub(super) compared: Vec<i64>,
    /// No transaction with a higher id has brought any of these.
    pub(super) last_compared: u64,
    /// More events were restored meanwhile: nothing is read beyond `compared_to` until they are compared too.
    pub(super) holds: bool,
    /// The tick up to which the streams are being looked through, and the one up to which they were.
    pub(super) comparing_to: Option<Arc<Tick>>,
    pub(super) compared_to: Option<Arc<Tick>>,
    /// Events are compared again not before this.
    pub(super) compares_at: Now,
}

impl Restored {
    /// Whether a row tells of events that are to be compared.
    pub(super) fn has_new(&self, row: &BackendRow) -> bool {
        row.restores.iter().any(|restore| !self.compared.contains(restore))
    }

    pub(super) fn let_go(&mut self) {
        self.holds = false;
    }
}
