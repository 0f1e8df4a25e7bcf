//! What a finder has found.

use relay::reading::range::Position;

/// A row whose hash slot has no lane.
pub(super) struct Found {
    /// The index of the finder.
    pub(super) finder: usize,
    pub(super) hash_slot: u16,
    /// The position before that row.
    pub(super) at: Position,
}
