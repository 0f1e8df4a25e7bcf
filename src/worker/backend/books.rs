//! What has to be saved of a backend, and when: its cursor, its counters, and refused events. How it is saved:
//! `saving.rs`.

use crate::tables::cursors::Standing;
use relay::delivery::refusal::Record;
use relay::redis::destination::Address;
use relay::time::Now;
use std::time::Duration;

/// A cursor that moved over delivered events is saved when nothing more was delivered for this long,
const SAVE_WHEN_QUIET: Duration = Duration::from_millis(250);
/// and at the latest after this long. Each save makes the WAL writer flush, which commits at the same moment wait for.
const SAVE_AFTER: Duration = Duration::from_secs(1);
/// A cursor that only moved over events of other backends is saved after this long.
const SAVE_IDLE_AFTER: Duration = Duration::from_secs(30);

/// What has to be saved of a backend, and since when it differs from what is saved.
pub(crate) struct Books {
    /// Records that must be written down before the cursor is saved.
    pub records: Vec<Record>,
    /// A pass has written something down that is not durable yet. It must be durable before a later batch is sent.
    pub is_unflushed: bool,
    pub standing: Standing,
    /// How many of the events that the delivery has counted are already in `standing`.
    pub(super) counted: u64,
    /// Since when the cursor on disk is behind what was delivered, and behind what was read.
    pub(super) dirty_since: Option<Now>,
    pub(super) stale_since: Option<Now>,
    /// When something was last acknowledged.
    pub(super) moved_at: Now,
    pub(super) saved_at: Now,
    pub(super) saved_total: i64,
    /// The high bound of the saved cursor: a restart would continue there.
    pub(super) saved_high_seq: i64,
    /// What a save has written, as long as its transaction has not committed.
    pub(super) pending_save: Option<(Standing, u64)>,
}

impl Books {
    pub(crate) fn of(standing: Standing, saved_high_seq: i64) -> Self {
        Self {
            records: Vec::new(),
            is_unflushed: false,
            saved_total: standing.accepted_total,
            standing,
            counted: 0,
            dirty_since: None,
            stale_since: None,
            moved_at: Now::ZERO,
            saved_at: Now::ZERO,
            saved_high_seq,
            pending_save: None,
        }
    }

    /// Notes that something has changed that the views show.
    pub(crate) fn change(&mut self, now: Now) {
        self.dirty_since.get_or_insert(now);
    }

    /// Notes that something may have changed since the last save, so that it is saved soon.
    pub(crate) fn change_since_saved(&mut self) {
        self.dirty_since.get_or_insert(self.saved_at);
    }

    /// Notes that something was acknowledged.
    pub(crate) fn move_on(&mut self, now: Now) {
        self.change(now);
        self.moved_at = now;
    }

    /// Notes that the reader has passed events of other backends.
    pub(crate) fn fall_behind(&mut self, now: Now) {
        self.stale_since.get_or_insert(now);
    }

    /// Notes the node that the sender is about to connect to.
    pub(crate) fn note_address(&mut self, address: &Address, now: Now) {
        let shown = Some(address.to_string());
        if self.standing.address != shown {
            self.standing.address = shown;
            self.change(now);
        }
    }

    /// The total of accepted events; `counted`: those of this delivery.
    pub(crate) fn total(&self, counted: u64) -> i64 {
        self.standing.accepted_total + (counted - self.counted) as i64
    }

    pub(crate) fn moved_at(&self) -> Now {
        self.moved_at
    }

    pub(crate) fn saved_high_seq(&self) -> i64 {
        self.saved_high_seq
    }

    /// When the cursor is to be saved.
    pub(crate) fn save_at(&self) -> Option<Now> {
        let dirty = self
            .dirty_since
            .map(|since| (since + SAVE_AFTER).min(self.moved_at + SAVE_WHEN_QUIET));
        let stale = self.stale_since.map(|since| since + SAVE_IDLE_AFTER);
        dirty.into_iter().chain(stale).min()
    }

    pub(crate) fn is_unsaved(&self) -> bool {
        self.dirty_since.is_some() || self.stale_since.is_some() || !self.records.is_empty()
    }
}
