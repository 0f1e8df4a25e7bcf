//! What of a backend is to be saved, and when: its cursor, its counters, and what was refused.

use crate::server::process::{self, Aborted};
use crate::tables::care;
use crate::tables::cursors::Saved;
use crate::tables::{cursors, refused};
use crate::worker::backend::Backend;
use pgrx::pg_sys;
use relay::delivery::refusal::Record;
use relay::fault::Point;
use relay::fault::{self, Mutation};
use relay::time::Now;
use std::time::Duration;

/// A cursor that moved over delivered events is saved once nothing more was delivered for this long,
const SAVE_WHEN_QUIET: Duration = Duration::from_millis(250);
/// and at the latest after this long. Each save makes the WAL writer flush, which commits of the same moment wait for.
const SAVE_AFTER: Duration = Duration::from_secs(1);
/// How long one may that only moved over events of others.
const SAVE_IDLE_AFTER: Duration = Duration::from_secs(30);

impl Backend {
    /// When the cursor is to be saved.
    pub fn save_at(&self) -> Option<Now> {
        let dirty = self
            .dirty_since
            .map(|since| (since + SAVE_AFTER).min(self.moved_at + SAVE_WHEN_QUIET));
        let stale = self.stale_since.map(|since| since + SAVE_IDLE_AFTER);
        dirty.into_iter().chain(stale).min()
    }

    pub fn is_unsaved(&self) -> bool {
        self.dirty_since.is_some() || self.stale_since.is_some() || !self.records.is_empty()
    }

    /// Writes records and cursor down. `wall_us`: the time of day.
    pub fn save(&mut self, now: Now, wall_us: i64) {
        let accepted_in = self.is_exactly_once().then(|| self.delivery.accepted_in());
        let failed = refused::record(self.number, &self.records, accepted_in);
        let mut standing = self.standing.clone();
        standing.failed_total += failed as i64;
        let published = self.delivery.published() - self.counted;
        if published > 0 {
            standing.accepted_total += published as i64;
            standing.last_accepted_us = Some(wall_us);
        }
        let elapsed = (now.saturating_sub(self.saved_at)).as_secs_f64();
        let events_per_second = match elapsed > 0.0 {
            true => ((standing.accepted_total - self.saved_published) as f64 / elapsed) as f32,
            false => 0.0,
        };
        if let Some(failure) = self
            .delivery
            .trouble()
            .filter(|_| self.is_enabled())
            .filter(|f| standing.last_error.as_ref() != Some(&f.message))
        {
            standing.last_error = Some(failure.message.clone());
            standing.last_error_us = Some(wall_us);
        }
        if let Some(error) = self.records.iter().rev().find_map(error_of) {
            standing.last_error = Some(error.to_owned());
            standing.last_error_us = Some(wall_us);
        }
        let next_attempt_us = match (self.delivery.trouble(), self.delivery.due_at()) {
            (Some(_), Some(due)) => Some(wall_us + due.saturating_sub(now).as_micros() as i64),
            _ => None,
        };
        let position = match fault::is_mutated(Mutation::SaveBeforeAck) {
            true => self.delivery.position(),
            false => self.delivery.acked(),
        };
        let saved = Saved {
            position,
            batch_number: self.delivery.number(),
            standing: &standing,
            state: self.delivery.state(),
            events_per_second,
            next_attempt_us,
        };
        cursors::save_cursor(self.number, self.lane, &saved);
        self.pending_save = Some((standing, self.delivery.published()));
    }

    /// The transaction of [`Self::save`] has committed.
    pub fn saved(&mut self, now: Now) {
        if let Some((standing, counted)) = self.pending_save.take() {
            self.saved_published = standing.accepted_total;
            self.standing = standing;
            self.counted = counted;
        }
        process::debug(|| {
            let (name, total) = (self.name(), self.standing.accepted_total);
            format!("saved the cursor of backend \"{name}\": {total} events accepted so far")
        });
        self.records.clear();
        // Something still in flight will be acknowledged: the flag is raised then.
        (self.dirty_since, self.stale_since) = (None, None);
        self.saved_high_seq = self.delivery.acked().from.high_seq;
        self.saved_at = now;
    }
}

fn error_of(record: &Record) -> Option<&str> {
    match record {
        Record::Park { error, .. } | Record::Fail { error, .. } | Record::RefusedAgain { error, .. } => Some(error),
        Record::Accepted { .. } => None,
    }
}

/// Writes down what is unsaved of some, in one transaction.
pub fn save(backends: &mut [Backend], which: impl Fn(&Backend) -> bool, now: Now) -> Result<(), Aborted> {
    let which = |b: &Backend| b.is_unsaved() && which(b);
    if !backends.iter().any(&which) {
        return Ok(());
    }
    fault::reach(match backends.iter().any(|b| b.delivery.is_stopped()) {
        true => Point::BeforeRefusedSaved,
        false => Point::BeforeSave,
    });
    // SAFETY: reads the clock.
    let wall_us = unsafe { pg_sys::GetCurrentTimestamp() } + crate::server::datum::EPOCH_SHIFT_US;
    // In one order on all servers: a subscription locks the same rows here in the order in which the other server has saved its own.
    let mut saved: Vec<&mut Backend> = backends.iter_mut().filter(|b| which(b)).collect();
    saved.sort_unstable_by_key(|b| b.whose());
    care::transaction(|| saved.iter_mut().for_each(|b| b.save(now, wall_us)))?;
    saved.iter_mut().for_each(|b| b.saved(now));
    fault::reach(Point::AfterSave);
    Ok(())
}
