//! Rows that are read again after a healing, while events wait that belong behind them.

use crate::reading::range::Position;
use crate::reading::snapshot::Tick;
use std::sync::Arc;

/// Waiting events are not tried while rows are read again that may belong before them: these rows must be parked first.
pub(super) struct Reread {
    /// A tick that does not see all of these rows.
    pub(super) stale: Option<Arc<Tick>>,
    /// No row has a higher number.
    pub(super) upto: i64,
}

impl Reread {
    pub(super) fn is_done(&self, acked: &Position) -> bool {
        let is_stale = self
            .stale
            .as_ref()
            .is_some_and(|stale| Arc::ptr_eq(acked.newest(), stale));
        !is_stale && acked.under_way.as_ref().is_none_or(|u| u.last_seq >= self.upto)
    }
}
