//! A backend of a cluster has one *lane* for each hash slot in use, each with a delivery, a sender, a guard and a
//! cursor of its own, as any other backend. Its *finder* reads all events of the backend, and makes the lane of a hash
//! slot when it finds the first event for it.
//!
//! Invariant: no event of a hash slot without a lane lies behind the finder's position. So a new lane begins at the
//! finder's position, and is saved before the finder goes on.

use crate::tables::backends::BackendRow;
use crate::tables::cursors;
use crate::tables::cursors::{Saved, Standing};
use crate::tables::refused;
use crate::worker::backend::duty::Duty;
use crate::worker::backend::{Backend, Home, MOST_LANES};
use relay::delivery::{Cursor, State};
use relay::event::Event;
use relay::failure::{Failure, Trouble};
use relay::reading::range::Position;
use relay::redis::hash_slot::hash_slot_of;
use relay::time::Now;
use std::time::Duration;

impl Backend {
    /// Makes a lane for a hash slot that has none, at the finder's position. It must be saved in the same transaction.
    pub(crate) fn new_lane(&self, hash_slot: u16, at: Position, home: &Home) -> Self {
        let cursor = Cursor {
            position: at,
            number: 0,
        };
        let duty = self.duty.of_lane(hash_slot, home);
        let written_down = refused::highest_written_down(self.number);
        let mut lane = Self::standing_at(cursor, Standing::default(), self.number, duty, written_down);
        lane.delivery.begins_where(&self.delivery);
        lane.share_meter(self);
        lane
    }

    /// Saves a new lane, at the position of its finder, in the transaction that makes it.
    pub(crate) fn save_new(&mut self) {
        let saved = Saved {
            position: self.delivery.acked(),
            batch_number: 0,
            standing: &self.books.standing,
            state: State::Idle,
            events_per_second: 0.0,
            next_attempt_us: None,
        };
        cursors::save_cursor(self.number, self.lane(), &saved);
    }

    pub(crate) fn is_finder(&self) -> bool {
        matches!(self.duty, Duty::Find(_))
    }

    /// Whether it delivers the events of a stream.
    pub(crate) fn serves(&self, stream: &str) -> bool {
        self.lane()
            .is_none_or(|hash_slot| hash_slot_of(stream.as_bytes()) == hash_slot)
    }

    /// The hash slot of an event.
    pub(crate) fn hash_slot_of(&self, event: &Event<'_>) -> u16 {
        hash_slot_of(event.stream.unwrap_or(self.stream()).as_bytes())
    }

    /// Whether its new row makes it a finder.
    pub(super) fn becomes_finder(&self, row: &BackendRow) -> bool {
        row.is_cluster() && self.lane().is_none() && self.reads_for_redis()
    }

    /// Notes that no further lane can be made. Events of other hash slots wait.
    pub(crate) fn no_lane_left(&mut self, hash_slot: u16, wait: Duration, now: Now) {
        let message = format!("an event belongs to hash slot {hash_slot}, but {MOST_LANES} others are in use");
        self.rests_until = now + wait;
        self.hold_off(Failure::of(Trouble::TooManySlots, message), wait, now);
    }

    /// The finder has passed the event that it had stopped at.
    pub(crate) fn goes_on(&mut self, now: Now) {
        if self.delivery.trouble().is_some() {
            self.delivery.forget_trouble();
            self.note_recovery(now);
        }
    }
}
