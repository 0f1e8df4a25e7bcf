//! A tick as columns of a row: four columns, of which snapshot and next_xid are read and written as text.

use crate::tables::found_row::FoundRow;
use crate::tables::sql::Parameter;
use relay::reading::snapshot::{Snapshot, Tick};
use std::sync::Arc;

/// The names of the columns.
pub(super) struct TickColumns {
    snapshot: &'static str,
    next_xid: &'static str,
    low_seq: &'static str,
    high_seq: &'static str,
}

/// The columns of the ticks of a cursor.
pub(super) const FROM: TickColumns = TickColumns {
    snapshot: "from_snapshot",
    next_xid: "from_next_xid",
    low_seq: "from_low_seq",
    high_seq: "from_high_seq",
};
pub(super) const TO: TickColumns = TickColumns {
    snapshot: "to_snapshot",
    next_xid: "to_next_xid",
    low_seq: "to_low_seq",
    high_seq: "to_high_seq",
};
/// The columns in tables that hold one tick in a row.
const TICK: TickColumns = TickColumns {
    snapshot: "snapshot",
    next_xid: "next_xid",
    low_seq: "low_seq",
    high_seq: "high_seq",
};

impl TickColumns {
    /// The tick of a row.
    pub(super) fn read(&self, row: &FoundRow<'_>) -> Option<Arc<Tick>> {
        let snapshot: Snapshot = row.value::<String>(self.snapshot)?.parse().ok()?;
        Some(Arc::new(Tick {
            snapshot,
            next_xid: row.value::<String>(self.next_xid)?.parse().ok()?,
            low_seq: row.value(self.low_seq)?,
            high_seq: row.value(self.high_seq)?,
        }))
    }
}

/// The tick of a row in a table that holds one tick in a row. The statement selects [`SELECTED`].
pub(super) fn tick_of(row: &FoundRow<'_>) -> Option<Arc<Tick>> {
    TICK.read(row)
}

/// What a statement selects for [`tick_of`], from a table or a subquery `t`.
pub(super) const SELECTED: &str =
    "t.snapshot::text as snapshot, t.next_xid::text as next_xid, t.low_seq as low_seq, t.high_seq as high_seq";

/// The columns to write, and their values, which [`tick_parameters`] are for.
pub(super) const COLUMNS: &str = "snapshot, next_xid, low_seq, high_seq";
pub(super) const VALUES: &str = "$snapshot::pg_snapshot, $next_xid::xid8, $low_seq, $high_seq";

pub(super) fn tick_parameters<'a>(tick: &Tick) -> [Parameter<'a>; 4] {
    [
        ("snapshot", tick.snapshot.to_string().into()),
        ("next_xid", tick.next_xid.to_string().into()),
        ("low_seq", tick.low_seq.into()),
        ("high_seq", tick.high_seq.into()),
    ]
}
