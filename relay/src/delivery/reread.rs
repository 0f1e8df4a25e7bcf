//! Rows that are read again after a healing, while events wait that belong behind them.

use crate::reading::range::Position;
use crate::reading::snapshot::Tick;
use std::sync::Arc;

/// While rows are read again that may belong before events that wait, those are not tried: first such rows must wait with them.
pub(super) struct Reread {
    /// A tick that does not see them all.
    pub(super) stale: Option<Arc<Tick>>,
    /// None has a higher number.
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
