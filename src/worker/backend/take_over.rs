//! What a backend knows of orders to take over. What it does about them: `taking_over.rs`.

use crate::tables::former_lanes;

pub(super) struct TakingOver {
    /// The order that this lane has carried out, and other lanes may not have. Of a finder: the order that was noted
    /// for former lanes.
    pub(super) done: Option<i64>,
    /// This lane has to carry out an order from before it went on. Of a finder: former lanes may have to.
    pub(super) is_owed: bool,
}

impl TakingOver {
    pub(super) fn of(number: i32, lane: Option<u16>) -> Self {
        Self {
            done: None,
            is_owed: lane.is_none_or(|hash_slot| former_lanes::owes_take_over(number, hash_slot)),
        }
    }
}
