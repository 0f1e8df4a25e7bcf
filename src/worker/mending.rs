//! Mends triggers of ours that were switched off, and rows that came meanwhile. It has its own patience: if it is
//! blocked, delivery goes on.

use crate::server::guc::LogLevel;
use crate::server::process::repeat_log_after;
use crate::server::process::{self, Aborted, log};
use crate::tables::applied;
use crate::tables::foreign::{self, TriggerLook};
use crate::worker::mended::Sweep;
use crate::worker::state::Generation;
use crate::worker::state::Worker;
use relay::reading::foreign::Judge;
use relay::reading::pace::Portion;
use relay::reading::snapshot::{FIRST_NORMAL_XID, Tick};
use relay::time::Now;
use std::time::{Duration, Instant};

/// How many rows one step of a sweep examines, which takes some milliseconds.
const LOOK_ROWS: i64 = 2_000;
/// How long one step publishes rows anew.
const PIECE_TIME: Duration = Duration::from_millis(10);
/// The pause between two attempts.
const TRY_PAUSE: Duration = Duration::from_secs(1);
/// The minimum time between two checks while our tables change all the time.
const LOOK_PAUSE: Duration = Duration::from_millis(250);
/// How long to wait before a disabled trigger is enabled. An administrator who has disabled it may be about to restore
/// rows one by one. The trigger should fire for all of them or for none.
const GRACE: Duration = Duration::from_secs(5);

impl Worker {
    /// Takes one step, if there is something to mend.
    pub(super) fn mend(&mut self, now: Now) {
        if self.mending.due_at().is_none_or(|at| at > now) {
            return;
        }
        if let Err(error) = self.try_mending(now)
            && !process::is_told_to_end()
        {
            self.mending.sweep_at = self.now() + TRY_PAUSE;
            self.say_not_mended(&error);
        }
    }

    fn try_mending(&mut self, now: Now) -> Result<(), Aborted> {
        if self.mending.is_look_due && self.mending.look_at <= now {
            self.mending.look_at = now + LOOK_PAUSE;
            self.look_at_triggers()?;
        }
        if !self.mending.broken.is_empty() && self.mending.mend_at <= now {
            self.mending.mend_at = now + TRY_PAUSE;
            self.mend_triggers()?;
        }
        if self.mending.sweep.is_none()
            && let Some(look) = self.mending.touched.take()
        {
            self.begin_sweep(look)?;
        }
        self.sweep()
    }

    fn look_at_triggers(&mut self) -> Result<(), Aborted> {
        let (look, published, held) =
            process::transaction(|| (foreign::look(), applied::publications(), applied::held()))?;
        self.mending.is_look_due = false;
        published
            .iter()
            .filter(|name| !self.mending.published.contains(name))
            .for_each(|name| applied::say_published(name));
        self.mending.published = published;
        held.iter()
            .filter(|name| !self.mending.held.contains(name))
            .for_each(|name| applied::say_held(name));
        self.mending.held = held;
        let Some(look) = look else {
            return Ok(());
        };
        if self.mending.broken.is_empty() && look.broken.iter().any(|trigger| trigger.is_disabled) {
            self.mending.mend_at = self.now() + GRACE;
        }
        self.mending.broken.clone_from(&look.broken);
        self.mending.seen.clone_from(&look.triggers);
        let is_touched = look.is_touched();
        self.mending.has_looked |= !is_touched;
        if is_touched {
            self.mending.touched = Some(look);
        } else if look.is_rewritten() && self.is_ticked() {
            // VACUUM FULL, TRUNCATE or pg_repack has rewritten the table: the transactions that wrote its rows no
            // longer tell anything.
            let latest = self.latest.clone();
            process::transaction(|| foreign::note_known(look.triggers.as_deref(), look.filenode, &latest))?;
        }
        Ok(())
    }

    fn mend_triggers(&mut self) -> Result<(), Aborted> {
        let mut failed = None;
        for trigger in &self.mending.broken {
            match process::transaction(|| foreign::mend_trigger(&trigger.table, &trigger.name)) {
                Ok(()) => say_mended(&trigger.table, &trigger.name, &trigger.found),
                Err(error) if process::is_told_to_end() => return Err(error),
                Err(error) => failed = Some(error),
            }
        }
        self.look_at_triggers()?;
        if let Some(error) = failed {
            self.say_not_mended(&error);
        }
        Ok(())
    }

    /// This comes first, so that the tick from before those rows is kept even if this worker ends.
    fn begin_sweep(&mut self, look: TriggerLook) -> Result<(), Aborted> {
        let clean = self.mending.clean.take();
        let is_rewritten = look.known_triggers.is_some() && look.is_rewritten() && clean.is_none();
        let mut known = look.known;
        // A newer tick is better, unless an earlier sweep was interrupted.
        if look.known_triggers.is_some() {
            let is_first = !self.mending.has_looked;
            let saved = self
                .backends
                .iter()
                .filter(|_| is_first)
                .map(|b| &b.delivery.acked().from);
            let newest = clean.as_ref().or_else(|| saved.max_by_key(|tick| tick.next_xid));
            if let Some(newest) = newest.filter(|tick| tick.next_xid > known.next_xid) {
                known = Tick::clone(newest);
            }
        }
        self.mending.has_looked = true;
        let upto = process::transaction(|| {
            foreign::note_known(None, None, &known);
            foreign::last_seq()
        })?;
        self.mending.sweep = Some(Sweep {
            triggers: look.triggers,
            tick: match self.is_ticked() {
                true => Tick::clone(&self.latest),
                false => known.clone(),
            },
            judge: Some(Judge::new(known, look.touched_by, is_rewritten)),
            after: 0,
            upto,
            foreign: Vec::new(),
            moved: 0,
            portion: Portion::new(PIECE_TIME),
        });
        Ok(())
    }

    /// Takes one step of a sweep, if there is one.
    fn sweep(&mut self) -> Result<(), Aborted> {
        let (now, beside_others) = (self.now(), self.is_beside_others());
        self.mending.sweep_at = now;
        if self.mending.sweep.is_none() {
            return Ok(());
        }
        if !self.mending.pieces.may_begin(beside_others, now) {
            self.mending.sweep_at = self.mending.pieces.rests_until();
            return Ok(());
        }
        self.step_of_sweep()?;
        // A step that has failed is tried again after its own pause.
        self.mending.pieces.begins(now);
        Ok(())
    }

    fn step_of_sweep(&mut self) -> Result<(), Aborted> {
        let Some(sweep) = &mut self.mending.sweep else {
            return Ok(());
        };
        let (after, upto) = (sweep.after, sweep.upto);
        if let Some(judge) = &mut sweep.judge {
            let last = process::transaction(|| foreign::look_at_rows(judge, after, upto, LOOK_ROWS))?;
            if let Some(last) = last.filter(|last| *last < upto) {
                sweep.after = last;
                return Ok(());
            }
            sweep.foreign = sweep.judge.take().map(Judge::into_found).unwrap_or_default();
        }
        let piece = &sweep.foreign[..sweep.foreign.len().min(sweep.portion.count())];
        if !piece.is_empty() {
            let start = Instant::now();
            sweep.moved += process::transaction(|| foreign::publish_anew(piece))?;
            let count = piece.len();
            sweep.foreign.drain(..count);
            sweep.portion.took(count, start.elapsed());
            self.work = true;
            // The restores that were noted must be loaded, even where no trigger announces them.
            self.generation = Generation::Stale;
        }
        match sweep.foreign.is_empty() {
            true => self.end_sweep(),
            false => Ok(()),
        }
    }

    fn end_sweep(&mut self) -> Result<(), Aborted> {
        let look = process::transaction(foreign::look)?;
        let (Some(sweep), Some(look)) = (self.mending.sweep.take(), look) else {
            return Ok(());
        };
        say_swept(sweep.moved);
        if look.triggers != sweep.triggers {
            // The trigger was changed again meanwhile: another pass is needed, from the same tick.
            self.mending.touched = Some(look);
        } else if look.broken.is_empty() {
            process::transaction(|| foreign::note_known(look.triggers.as_deref(), look.filenode, &sweep.tick))?;
        }
        Ok(())
    }

    fn is_ticked(&self) -> bool {
        self.latest.next_xid > FIRST_NORMAL_XID
    }

    fn say_not_mended(&mut self, error: &Aborted) {
        let now = self.now();
        let said = self.mending.said.as_ref();
        if said.is_some_and(|(text, at)| *text == error.message && now < *at + repeat_log_after()) {
            return;
        }
        log(
            LogLevel::Error,
            &format!("triggers of outbox_relay cannot be mended: {}", error.message),
            Some(
                "Rows that are inserted without them carry transaction ids of another cluster, or are refused. Delivery goes on.",
            ),
            Some("The worker tries again each second. See outbox.broken_triggers()."),
        );
        self.mending.said = Some((error.message.clone(), now));
    }
}

fn say_mended(table: &str, name: &str, found: &str) {
    log(
        LogLevel::Warning,
        &format!("trigger \"{name}\" of outbox.{table} was {found}, and is ENABLE ALWAYS again"),
        Some("The worker looks for rows that were inserted without it."),
        Some("pg_restore --disable-triggers leaves triggers in this state. Restore without that option."),
    );
}

fn say_swept(moved: u64) {
    if moved == 0 {
        return;
    }
    log(
        LogLevel::Warning,
        &format!("{moved} rows of outbox.events carried transaction ids of another cluster"),
        Some("They were inserted while the table's trigger was disabled, as by pg_restore --disable-triggers."),
        Some("They are sent unless they are already in their streams."),
    );
}
