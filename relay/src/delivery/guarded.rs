//! The parts of a delivery that depend on a guard (exactly_once): numbers of batches, its position after a claim, and
//! batches that are appended completely or not at all.

use crate::delivery::flight::{Contents, Flight};
use crate::delivery::flight::{Refusal, WINDOW_BATCHES};
use crate::delivery::refusal::Record;
use crate::delivery::reread::Reread;
use crate::delivery::state::ConnectionState;
use crate::delivery::{Cursor, Delivery, Guarantee};
use crate::failure::Failure;
use crate::guard::Mark;
use crate::guard::epoch::LAST_NUMBER;
use crate::guard::epoch::epoch_of;
use crate::guard::epoch::floor_of;
use crate::reading::range::Position;
use crate::time::Now;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// At most this many batches whose replies were never read are remembered.
const MOST_IN_DOUBT: usize = 1_000;

impl Delivery {
    /// The last batch that is known to be appended; 0: none.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Called when the `epoch`th claim of this backend is about to be made. Its batches get numbers that no batch has
    /// had. So numbers tell which guard is newer, whatever state Redis may come back with.
    pub fn begin_epoch(&mut self, epoch: u64) {
        self.floor = floor_of(epoch);
    }

    /// It has gone back to where a guard stands, to begin anew under the claim that is about to be made. Redis may come
    /// back with any guard that was written before: with what it had lost, or as it was after an earlier loss. Which of
    /// those holds what lies before this position, numbers do not tell. So each of them is older than this, and is
    /// taken for a loss.
    pub fn stands_at_claim(&mut self) {
        self.number = self.number.max(self.floor);
    }

    /// The next batch's number, with nothing in flight.
    pub fn next_number(&self) -> u64 {
        (self.number.max(self.floor) + 1).min(LAST_NUMBER)
    }

    /// Called for a claim that starts anew, as if an empty batch had been sent.
    pub fn begins_anew(&mut self) {
        let begun = (self.next_number(), self.acked.clone());
        self.doubt(begun);
    }

    /// Redis may append batches in flight even if their replies never arrive.
    pub(super) fn doubt_flights(&mut self) {
        if self.guarantee != Guarantee::ExactlyOnce || self.in_doubt.is_none() || self.flights.is_empty() {
            return;
        }
        let first = self.next_number();
        let mut position = self.acked.clone();
        for index in 0..self.flights.len() {
            if let Contents::Rows { end } = &self.flights[index].contents {
                position = end.clone();
            }
            self.doubt((first + index as u64, position.clone()));
        }
    }

    fn doubt(&mut self, batch: (u64, Position)) {
        let Some(doubted) = &mut self.in_doubt else { return };
        doubted.push(batch);
        // This takes hundreds of connections whose replies were never read.
        if doubted.len() > MOST_IN_DOUBT {
            self.in_doubt = None;
        }
    }

    /// Whether a guard of this run of the server that is ahead of what is known may name this batch as the last one.
    /// The error names the impossible field.
    pub fn may_have_sent(&self, number: u64, position: &Position) -> Result<(), &'static str> {
        let Some(doubted) = &self.in_doubt else {
            return Ok(());
        };
        let sent = || doubted.iter().filter(|(sent, _)| *sent == number);
        let text = position.to_string();
        match sent().any(|(_, position)| position.to_string() == text) {
            true => Ok(()),
            false if sent().next().is_none() => Err("number"),
            false => Err("position"),
        }
    }

    /// Whether the numbers of this claim are used up: the next batches need another claim.
    pub fn has_used_up_numbers(&self) -> bool {
        let last = self.next_number() + WINDOW_BATCHES as u64;
        self.guarantee == Guarantee::ExactlyOnce
            && self.connection == ConnectionState::Up
            && self.floor > 0
            && epoch_of(last) > epoch_of(self.floor)
    }

    /// The batch number that is written down with waiting events that were accepted. A Redis whose guard has a lower
    /// number may not have them. After a claim it is at least the claim's own number: they were found in Redis in its
    /// state at this claim, not in that of an earlier claim that was lost.
    pub fn accepted_in(&self) -> u64 {
        self.number.max(self.floor)
    }

    /// The guard says that batches up to `cursor`, whose replies were never read, are appended. `accepted`: the events
    /// accepted since the start, including these.
    pub fn adopt(&mut self, cursor: Cursor, accepted: u64) {
        self.stand_at(cursor);
        self.accepted = accepted;
    }

    /// Redis has lost what came after `cursor`, so it is read again. Rows up to `reread_to` may be written down.
    pub fn heal(&mut self, cursor: Cursor, reread_to: i64) {
        self.stand_at(cursor);
        self.set_reread_to(reread_to);
        self.ahead.clear();
    }

    fn stand_at(&mut self, cursor: Cursor) {
        let moves = !Arc::ptr_eq(self.acked.newest(), cursor.position.newest());
        if cursor.number < self.number {
            // Redis may come back with batches that were known and then lost.
            self.in_doubt = None;
        }
        self.acked = cursor.position;
        self.number = cursor.number;
        if let Some(reread) = self.reread.as_mut().filter(|_| moves) {
            reread.stale = Some(self.acked.newest().clone());
        }
        self.rewind();
    }

    /// These rows need not be sent, because they are already in their streams. Rows that were found there earlier may
    /// be gone.
    pub fn pass_over(&mut self, seqs: impl IntoIterator<Item = i64>) {
        self.ahead.find(seqs);
    }

    /// Rows up to this number may be written down as refused, failed, or accepted out of turn.
    pub fn set_reread_to(&mut self, seq: i64) {
        self.reread_to = self.reread_to.max(seq);
        if seq > 0 {
            self.reread = Some(Reread {
                stale: Some(self.acked.newest().clone()),
                upto: self.reread_to,
            });
        }
    }

    /// A lane begins at its finder's position; rows before it may be written down. If the finder has already passed
    /// them, the tick that it is going to sees all of them, so nothing beyond that tick is waited for.
    pub fn begins_where(&mut self, finder: &Self) {
        let here = self.acked.under_way.is_none().then(|| self.acked.newest().clone());
        if let Some(reread) = &mut self.reread {
            let stale = finder.reread.as_ref().and_then(|reread| reread.stale.clone());
            reread.stale = stale.or(here);
        }
    }

    /// Whether waiting events must wait for rows that are read again.
    pub(super) fn is_rereading(&self) -> bool {
        self.guarantee == Guarantee::ExactlyOnce && self.reread.is_some()
    }

    /// Whether to look up if a row is written down.
    pub fn may_be_written_down(&self, seq: i64) -> bool {
        seq <= self.reread_to
    }

    /// The guard's values after the next batch. `end`: where its rows end; `None` for a batch of waiting events.
    pub fn mark<'a>(&'a self, end: Option<&'a Position>) -> Mark<'a> {
        let before = self.flights.iter().rev().find_map(|flight| match &flight.contents {
            Contents::Rows { end } => Some(end),
            Contents::Waiting { .. } => None,
        });
        let previous = before.unwrap_or(&self.acked);
        Mark {
            number: (self.next_number() + self.flights.len() as u64).min(LAST_NUMBER),
            position: end.unwrap_or(previous),
            previous,
            compares: self.ahead.has_found(),
        }
    }

    /// Events in flight.
    pub fn in_flight(&self) -> usize {
        self.flights.iter().map(|flight| flight.entries.len()).sum()
    }

    /// The guard cannot be claimed now. The next attempt is after `retry_after`; zero: as after any failure.
    pub fn hold_off(&mut self, failure: Failure, retry_after: Duration, now: Now, random: f64) {
        let retry_at = self.failed(failure, now, random);
        self.go_down(if retry_after > Duration::ZERO {
            now + retry_after
        } else {
            retry_at
        });
    }

    /// The batch is appended, but waits for replicas.
    pub fn waits_for_replicas(&mut self, failure: Failure) {
        self.trouble = Some(failure);
    }

    /// With exactly_once, waiting events are sent alone: the guard describes only one batch, and what became of it must
    /// be written down before the next.
    pub(super) fn retries_alone(&self) -> bool {
        self.guarantee == Guarantee::ExactlyOnce
            && self
                .flights
                .iter()
                .any(|f| matches!(f.contents, Contents::Waiting { .. }))
    }

    /// A batch was appended completely, except refused events.
    pub(super) fn appended(&mut self, flight: Flight, refused: Vec<Refusal>, now: Now, random: f64) -> Vec<Record> {
        self.number = self.next_number();
        // Its number is higher than those of all other claims.
        let known = self.number;
        self.in_doubt
            .get_or_insert_default()
            .retain(|(number, _)| *number > known);
        self.attempts.succeeded();
        self.trouble = None;
        // The guard tells only for the last batch which of its events were refused or which waiting ones were accepted.
        let stops = !refused.is_empty() || matches!(flight.contents, Contents::Waiting { .. });
        self.window_batches = match refused.is_empty() {
            true => (self.window_batches * 2).min(WINDOW_BATCHES),
            false => 1,
        };
        let count = flight.entries.len();
        let records = self.land(flight, count, refused, now, random);
        if stops {
            self.stop();
        } else {
            self.ack_what_was_read();
        }
        records
    }

    /// Nothing of the oldest batch was appended, because these events of it were refused (exactly_once).
    pub fn aborted(&mut self, refused: Vec<Refusal>, now: Now, random: f64) -> Vec<Record> {
        let Some(flight) = self.flights.pop_front() else {
            return Vec::new();
        };
        self.window_batches = 1;
        let again = matches!(flight.contents, Contents::Waiting { .. });
        if let Some(last) = flight.entries.last().filter(|_| !again) {
            // Other events of this batch may belong before those that were refused.
            let stale = self.acked.under_way.is_none().then(|| self.acked.newest().clone());
            let upto = last.seq.max(self.reread.as_ref().map_or(0, |reread| reread.upto));
            let stale = self.reread.take().map_or(stale, |reread| reread.stale);
            self.reread = Some(Reread { stale, upto });
        }
        let mut records = Vec::new();
        let mut innocent: BTreeSet<_> = flight.retried().into_iter().collect();
        for (index, failure) in refused {
            let Some(entry) = flight.entries.get(index) else {
                continue;
            };
            innocent.remove(&entry.stream);
            records.push(self.refused(entry, again, &failure, now, random));
            if !again {
                self.ahead.insert(entry.seq);
            }
        }
        for stream in flight.retried() {
            self.streams.end_retry(&stream);
            self.streams.waits_again(&stream);
        }
        innocent.into_iter().for_each(|stream| self.streams.is_innocent(stream));
        self.stop();
        records
    }

    fn stop(&mut self) {
        self.rewind();
        self.connection = ConnectionState::Stopped;
    }

    /// Whether [`Self::resume`] is due when all records are written down.
    pub fn is_stopped(&self) -> bool {
        self.connection == ConnectionState::Stopped
    }

    /// All records are written down.
    pub fn resume(&mut self) {
        if self.connection == ConnectionState::Stopped {
            self.connection = ConnectionState::Up;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::backoff::Backoff;
    use crate::delivery::refusal::Streams;
    use crate::guard::epoch::EARLY_EPOCHS;

    fn delivery(epoch: u64) -> Delivery {
        let position = Position::beginning();
        let cursor = Cursor { position, number: 0 };
        let backoff = Backoff {
            exponential: false,
            delay: Duration::ZERO,
            max_delay: Duration::ZERO,
        };
        let mut delivery = Delivery::new(Guarantee::ExactlyOnce, cursor, Streams::default(), backoff);
        delivery.begin_epoch(epoch);
        delivery.connected();
        delivery
    }

    /// Millions of claims, and thousands of millions.
    #[test]
    fn numbers_of_later_claims_are_higher_and_fit_into_a_bigint() {
        let mut epochs: Vec<u64> = vec![1, 2, 1 << 20, 1 << 30, (1 << 30) + EARLY_EPOCHS - 1];
        epochs.extend((EARLY_EPOCHS - 2)..(EARLY_EPOCHS + 3));
        epochs.sort_unstable();
        let first = |epoch: u64| delivery(epoch).next_number();
        for pair in epochs.windows(2) {
            assert!(first(pair[0]) < first(pair[1]), "{pair:?}");
        }
        for epoch in epochs {
            assert_eq!(epoch_of(first(epoch)), epoch);
            assert!(first(epoch) <= i64::MAX as u64, "{epoch}");
        }
        assert_eq!(first(1), (1 << 40) + 1, "as in guards of earlier versions");
        for absurd in [1 << 41, i64::MAX as u64, u64::MAX] {
            assert!(first(absurd) <= i64::MAX as u64, "{absurd}");
        }
    }

    #[test]
    fn a_connection_that_has_used_up_its_numbers_is_recognised() {
        for epoch in [3, EARLY_EPOCHS + 7] {
            let mut delivery = delivery(epoch);
            assert!(!delivery.has_used_up_numbers());
            delivery.number = floor_of(epoch + 1) - WINDOW_BATCHES as u64 - 2;
            assert!(!delivery.has_used_up_numbers());
            delivery.number += 1;
            assert!(delivery.has_used_up_numbers());
            delivery.begin_epoch(epoch + 1);
            assert!(!delivery.has_used_up_numbers());
        }
    }
}
