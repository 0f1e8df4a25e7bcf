//! The worker's tasks, each with its own patience: one that fails, for a lock or an ERROR, is tried again after a while, for the backend
//! that it concerns, and holds up no other.

use super::{Worker, save};
use crate::backend::Backend;
use crate::catalog;
use crate::guc::LogLevel;
use crate::process::{self, Aborted, log};
use pgrx::PgSqlErrorCode;
use relay::delivery::Now;
use relay::patience::Waits;
use std::time::Duration;

/// A backend, or one of its lanes.
pub(super) type Whose = (i32, Option<u16>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Task {
    Load,
    /// Take ticks, and open the table of events.
    Read,
    /// Read for one backend.
    ReadFor(Whose),
    /// Save what is unsaved of all.
    Save,
    SaveOf(Whose),
    Claim(Whose),
    FinishLanes,
    AddLane(Whose),
    Retry(Whose),
    Move,
    RecordTicks,
    PurgePublished(Whose),
    PurgeFailed,
}

impl Task {
    fn waits(self) -> Waits {
        let waits = |first_ms, longest_ms| Waits {
            first: Duration::from_millis(first_ms),
            longest: Duration::from_millis(longest_ms),
        };
        match self {
            // What all wait for is looked at again and again.
            Self::Read => waits(10, 20),
            Self::Load => waits(20, 500),
            Self::ReadFor(_) => waits(50, 2_000),
            Self::Save | Self::SaveOf(_) | Self::Retry(_) | Self::Move => waits(100, 5_000),
            Self::Claim(_) | Self::FinishLanes | Self::AddLane(_) => waits(100, 5_000),
            Self::RecordTicks | Self::PurgePublished(_) | Self::PurgeFailed => waits(1_000, 60_000),
        }
    }

    fn whose(self) -> Option<Whose> {
        match self {
            Self::ReadFor(whose) | Self::SaveOf(whose) | Self::Claim(whose) | Self::AddLane(whose) => Some(whose),
            Self::Retry(whose) | Self::PurgePublished(whose) => Some(whose),
            _ => None,
        }
    }

    /// What it was at, as a sentence begins.
    fn doing(self) -> &'static str {
        match self {
            Self::Load => "It was loading the backends",
            Self::Read | Self::ReadFor(_) => "It was reading events",
            Self::Save | Self::SaveOf(_) => "It was saving cursors and what was refused",
            Self::Claim(_) => "It was claiming the guard",
            Self::FinishLanes | Self::AddLane(_) => "It was looking after the lanes of a cluster",
            Self::Retry(_) => "It was trying refused events again",
            Self::Move => "It was moving scheduled events that are due",
            Self::RecordTicks => "It was recording what has been delivered, for retention",
            Self::PurgePublished(_) => "It was purging published events",
            Self::PurgeFailed => "It was purging failed events",
        }
    }

    fn hint(self) -> &'static str {
        match self {
            Self::Load => "Backends are served as they were known last. It tries again shortly.",
            Self::Read | Self::ReadFor(_) => "Events wait. It tries again shortly.",
            Self::Claim(_) => "Its events wait. It tries again shortly.",
            _ => "Other events are delivered meanwhile. It tries again shortly.",
        }
    }
}

impl Backend {
    pub(super) fn whose(&self) -> Whose {
        (self.number, self.lane)
    }
}

/// Whether it may be over in a moment.
pub(super) fn is_lock(error: &Aborted) -> bool {
    [
        PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
        PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED,
        PgSqlErrorCode::ERRCODE_QUERY_CANCELED,
    ]
    .contains(&error.code)
}

impl Worker {
    /// Does a task unless it failed a moment ago. `None`: it was not done.
    pub(super) fn attempt<R>(
        &mut self,
        task: Task,
        now: Now,
        f: impl FnOnce(&mut Self) -> Result<R, Aborted>,
    ) -> Option<R> {
        if !self.patience.allows(task, now) {
            return None;
        }
        let outcome = f(self);
        self.took(task, outcome, now)
    }

    /// Takes note of how a task ended.
    pub(super) fn took<R>(&mut self, task: Task, outcome: Result<R, Aborted>, now: Now) -> Option<R> {
        match outcome {
            Ok(result) => {
                self.patience.succeeded(task);
                Some(result)
            }
            Err(error) => {
                self.failed(task, &error, now);
                None
            }
        }
    }

    pub(super) fn failed(&mut self, task: Task, error: &Aborted, now: Now) {
        // It cancelled what it was at.
        if process::is_told_to_end() {
            return;
        }
        if !self
            .patience
            .failed(task, &error.message, is_lock(error), task.waits(), now)
        {
            return;
        }
        let name = task.whose().and_then(|whose| {
            let backend = self.backends.iter().find(|b| b.whose() == whose)?;
            backend.row.as_ref().map(|row| row.name.clone())
        });
        let doing = match name {
            Some(name) => format!("{}, for backend \"{name}\".", task.doing()),
            None => format!("{}.", task.doing()),
        };
        let detail = match &error.detail {
            Some(detail) => format!("{detail} {doing}"),
            None => doing,
        };
        log(
            LogLevel::Error,
            &format!("outbox_relay worker: {error}"),
            Some(&detail),
            Some(error.hint.as_deref().unwrap_or(task.hint())),
        );
    }

    /// Saves what is unsaved, in one transaction: a commit each would cost more. Should that fail, each by itself, so that one that cannot
    /// be saved keeps no other from it.
    pub(super) fn save_unsaved(&mut self, now: Now) {
        if !self.patience.allows(Task::Save, now) {
            return;
        }
        let patience = &self.patience;
        let is_next = |b: &Backend| b.is_unsaved() && patience.allows(Task::SaveOf(b.whose()), now);
        let next: Vec<Whose> = self
            .backends
            .iter()
            .filter(|b| is_next(b))
            .map(Backend::whose)
            .collect();
        if next.is_empty() {
            return;
        }
        let Err(error) = save(&mut self.backends, |b| next.contains(&b.whose()), now) else {
            self.patience.succeeded(Task::Save);
            next.iter()
                .for_each(|whose| self.patience.succeeded(Task::SaveOf(*whose)));
            return;
        };
        if is_lock(&error) && !process::transaction(catalog::can_save).unwrap_or(false) {
            // It is the table, not a row of it.
            return self.failed(Task::Save, &error, now);
        }
        if let [whose] = next.as_slice() {
            return self.failed(Task::SaveOf(*whose), &error, now);
        }
        let mut failures = Vec::new();
        for whose in &next {
            match save(&mut self.backends, |b| b.whose() == *whose, now) {
                Ok(()) => self.patience.succeeded(Task::SaveOf(*whose)),
                Err(error) => failures.push((*whose, error)),
            }
        }
        if failures.len() == next.len() {
            return self.failed(Task::Save, &error, now);
        }
        for (whose, error) in failures {
            self.failed(Task::SaveOf(whose), &error, now);
        }
    }

    /// When a backend is to be saved, and can be.
    pub(super) fn save_at(&self, backend: &Backend) -> Option<Now> {
        let due = match backend.records.is_empty() {
            true => backend.save_at()?,
            false => Now::ZERO,
        };
        let waits = [
            self.patience.retry_at(Task::Save),
            self.patience.retry_at(Task::SaveOf(backend.whose())),
        ];
        waits.into_iter().flatten().chain([due]).max()
    }
}
