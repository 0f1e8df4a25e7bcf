//! A backend of a cluster has one *lane* for each hash slot in use, each with a delivery, a sender, a guard and a
//! cursor of its own, as any other backend. Its *finder* reads all events of the backend, and makes the lane of a hash
//! slot when it finds the first event for it. If there are as many lanes as there may be, one that has nothing to do is
//! given up. When an event for its hash slot comes, that lane goes on where it stood.
//!
//! Invariant: no event of a hash slot without a lane lies behind the finder's position, unless the former lane has sent
//! it. So a new lane begins at the finder's position or at its own former one, and is saved before the finder goes on.

use crate::tables::backends::BackendRow;
use crate::tables::cursors;
use crate::tables::cursors::{Saved, Standing};
use crate::tables::{former_lanes, numbers, refused};
use crate::worker::backend::duty::Duty;
use crate::worker::backend::{Backend, Home, MOST_LANES};
use relay::delivery::former::GivesUp;
use relay::delivery::{Cursor, State};
use relay::event::Event;
use relay::failure::{Failure, Trouble};
use relay::reading::range::Position;
use relay::redis::hash_slot::hash_slot_of;
use relay::time::Now;
use std::time::Duration;

/// How long a finder rests while a lane cannot be made.
pub(crate) const LANE_PAUSE: Duration = Duration::from_millis(100);

impl Backend {
    /// Makes a lane for a hash slot that has none, at the finder's position, or takes up its former one. It must be
    /// saved in the same transaction.
    pub(crate) fn new_lane(&self, hash_slot: u16, at: Position, home: &Home) -> Self {
        let duty = self.duty.of_lane(hash_slot, home);
        let (cursor, standing) = match former_lanes::take(self.number, hash_slot) {
            None => {
                let cursor = Cursor {
                    position: at,
                    number: 0,
                };
                (cursor, Standing::default())
            }
            Some(former) => {
                let position = numbers::vouched(&former.cursor.position).goes_on_from(at);
                let number = former.cursor.number;
                (Cursor { position, number }, former.standing)
            }
        };
        let written_down = refused::highest_written_down(self.number);
        let mut lane = Self::standing_at(cursor, standing, self.number, duty, written_down);
        lane.delivery.begins_where(&self.delivery);
        lane.share_meter(self);
        lane
    }

    /// Saves a new lane in the transaction that makes it.
    pub(crate) fn save_new(&mut self) {
        let saved = Saved {
            position: self.delivery.acked(),
            batch_number: self.delivery.number(),
            standing: &self.books.standing,
            state: State::Idle,
            events_per_second: 0.0,
            next_attempt_us: None,
        };
        cursors::save_cursor(self.number, self.lane(), &saved);
    }

    /// Whether this lane can be given up now, or as soon as what is in flight is acknowledged.
    pub(crate) fn gives_up(&self, finder: &Self) -> GivesUp {
        let takes_over = self.is_told_to_take_over() || self.taking_over.is_owed;
        let is_busy = self.is_restored() || takes_over || !self.books.records.is_empty();
        match self.delivery.gives_up(finder.delivery.acked()) {
            _ if is_busy => GivesUp::NotYet,
            gives_up => gives_up,
        }
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

    /// Notes that no further lane can be made. Events of other hash slots wait. `may_last`: for how long that is no
    /// failure.
    pub(crate) fn no_lane_left(&mut self, hash_slot: u16, may_last: Duration, now: Now) {
        self.rests_until = now + LANE_PAUSE;
        let Duty::Find(finder) = &mut self.duty else { return };
        let since = *finder.lacks_lane_since.get_or_insert(now);
        if now >= since + may_last {
            let message = format!("an event belongs to hash slot {hash_slot}, but {MOST_LANES} others are in use");
            self.hold_off(Failure::of(Trouble::TooManySlots, message), LANE_PAUSE, now);
        }
    }

    /// The finder has passed the event that it had stopped at.
    pub(crate) fn goes_on(&mut self, now: Now) {
        if let Duty::Find(finder) = &mut self.duty {
            finder.lacks_lane_since = None;
        }
        if self.delivery.trouble().is_some() {
            self.delivery.forget_trouble();
            self.note_recovery(now);
        }
    }
}
