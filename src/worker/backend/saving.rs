//! Saves what a backend's books hold.

use crate::server::process::{self, Aborted};
use crate::tables::care;
use crate::tables::catalog;
use crate::tables::cursors::{Saved, Standing};
use crate::tables::{cursors, refused};
use crate::worker::backend::Backend;
use pgrx::pg_sys;
use relay::delivery::refusal::Record;
use relay::failure;
use relay::fault::Point;
use relay::fault::{self, Mutation};
use relay::time::Now;

impl Backend {
    /// When the cursor has to be saved.
    pub(crate) fn save_at(&self) -> Option<Now> {
        self.books.save_at()
    }

    pub(crate) fn is_unsaved(&self) -> bool {
        self.books.is_unsaved()
    }

    /// Writes records and cursor down. `wall_us`: the time of day.
    pub(crate) fn save(&mut self, now: Now, wall_us: i64) {
        let accepted_in = self.is_exactly_once().then(|| self.delivery.accepted_in());
        self.heads.heed(&self.books.records);
        let failed = refused::record(self.number, &self.books.records, accepted_in);
        let standing = self.standing_now(failed, wall_us);
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
            events_per_second: self.rate(&standing, now),
            next_attempt_us,
        };
        cursors::save_cursor(self.number, self.lane(), &saved);
        self.books.pending_save = Some((standing, self.delivery.accepted()));
    }

    /// What is saved besides the position. `failed`: events that have failed since the last save.
    fn standing_now(&self, failed: u64, wall_us: i64) -> Standing {
        let books = &self.books;
        let mut standing = books.standing.clone();
        standing.failed_total += failed as i64;
        let accepted = self.delivery.accepted() - books.counted;
        if accepted > 0 {
            standing.accepted_total += accepted as i64;
            standing.last_accepted_us = Some(wall_us);
        }
        let trouble = self.delivery.trouble().filter(|_| self.is_enabled());
        let news = trouble.filter(|failure| standing.last_error.as_deref() != Some(failure.message.as_str()));
        let news = news.map(|failure| (failure.message.as_str(), failure.hint()));
        let refused = books.records.iter().rev().find_map(error_of);
        let refused = refused.map(|error| (error, failure::hint_of(error)));
        if let Some((error, hint)) = refused.or(news) {
            standing.last_error = Some(error.to_owned());
            standing.last_hint = hint.map(str::to_owned);
            standing.last_error_us = Some(wall_us);
        }
        standing
    }

    /// Events per second since the last save.
    fn rate(&self, standing: &Standing, now: Now) -> f32 {
        let elapsed = (now.saturating_sub(self.books.saved_at)).as_secs_f64();
        match elapsed > 0.0 {
            true => ((standing.accepted_total - self.books.saved_total) as f64 / elapsed) as f32,
            false => 0.0,
        }
    }

    /// Called when the transaction of [`Self::save`] has committed.
    pub(crate) fn saved(&mut self, now: Now) {
        let books = &mut self.books;
        if let Some((standing, counted)) = books.pending_save.take() {
            books.saved_total = standing.accepted_total;
            books.standing = standing;
            books.counted = counted;
        }
        let name = self.duty.row().map_or("(deleted)", |row| &row.name);
        process::debug(|| {
            let total = books.standing.accepted_total;
            format!("saved the cursor of backend \"{name}\": {total} events accepted so far")
        });
        books.records.clear();
        // What is still in flight will be acknowledged later, and is marked as a change then.
        (books.dirty_since, books.stale_since) = (None, None);
        books.saved_high_seq = self.delivery.acked().from.high_seq;
        books.saved_at = now;
        self.count_progress();
    }
}

fn error_of(record: &Record) -> Option<&str> {
    match record {
        Record::Park { error, .. } | Record::Fail { error, .. } | Record::RefusedAgain { error, .. } => Some(error),
        Record::Accepted { .. } => None,
    }
}

/// Saves what is unsaved of the chosen backends, in one transaction. Fails if the tables are not those that
/// the backends were loaded from.
pub(crate) fn save(backends: &mut [Backend], which: impl Fn(&Backend) -> bool, now: Now) -> Result<(), Aborted> {
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
    // All servers save in the same order, to avoid a deadlock: a subscription locks rows of this table in the order in
    // which the other server saved its own.
    let mut saved: Vec<&mut Backend> = backends.iter_mut().filter(|b| which(b)).collect();
    saved.sort_unstable_by_key(|b| b.whose());
    care::transaction(|| {
        saved.iter_mut().for_each(|b| b.save(now, wall_us));
        catalog::expect_served();
    })?;
    saved.iter_mut().for_each(|b| b.saved(now));
    fault::reach(Point::AfterSave);
    Ok(())
}
