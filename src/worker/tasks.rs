//! The worker's tasks, each with its own patience. A task that fails because of a lock or an ERROR is tried again after
//! a while, for the backend that it concerns, and delays no other task.

use crate::server::guc::LogLevel;
use crate::server::process::{self, Aborted, log};
use crate::tables::catalog;
use crate::worker::backend::Backend;
use crate::worker::backend::Whose;
use crate::worker::backend::saving::save;
use crate::worker::state::{Generation, Worker};
use crate::worker::task::Task;
use crate::worker::task::is_lock;
use relay::time::Now;

/// How many backends are saved in one transaction, in some milliseconds.
const SAVED_AT_ONCE: usize = 64;

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

    /// Notes how a task ended.
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
        // The order to end has cancelled the statement that was running.
        if process::is_told_to_end() || self.is_of_another_extension() {
            return;
        }
        let is_news = self
            .patience
            .failed(task, &error.message, is_lock(error), task.waits(), now);
        let name = task.whose().and_then(|whose| {
            let backend = self.backends.iter().find(|b| b.whose() == whose)?;
            backend.row().map(|row| row.name.clone())
        });
        let doing = match name {
            Some(name) => format!("{}, for backend \"{name}\".", task.doing()),
            None => format!("{}.", task.doing()),
        };
        let detail = match &error.detail {
            Some(detail) => format!("{detail} {doing}"),
            None => doing,
        };
        let hint = error.hint.as_deref().unwrap_or(task.hint());
        self.troubles
            .failed(task, format!("{error}. {detail}"), hint, is_lock(error), now);
        if is_news {
            log(
                LogLevel::Error,
                &format!("outbox_relay worker: {error}"),
                Some(&detail),
                Some(hint),
            );
        }
    }

    /// Whether what the worker knows is of an extension that is gone. Then it loads the next one.
    fn is_of_another_extension(&mut self) -> bool {
        let is_gone = !self.backends.is_empty() && !process::transaction(catalog::is_served).unwrap_or(true);
        if is_gone {
            self.generation = Generation::Stale;
        }
        is_gone
    }

    /// Saves what is unsaved in one transaction, which costs less than a commit for each backend; of very many backends
    /// those that are due first, since events wait meanwhile. If that fails, each backend is saved alone, so that one
    /// that cannot be saved does not prevent the others.
    pub(super) fn save_unsaved(&mut self, now: Now) {
        if !self.patience.allows(Task::Save, now) {
            return;
        }
        let patience = &self.patience;
        let is_next = |b: &Backend| b.is_unsaved() && patience.allows(Task::SaveOf(b.whose()), now);
        let due = |b: &Backend| (!b.books.records.is_empty(), b.save_at());
        let mut next: Vec<_> = self
            .backends
            .iter()
            .filter(|b| is_next(b))
            .map(|b| (due(b), b.whose()))
            .collect();
        if next.is_empty() {
            return;
        }
        if next.len() > SAVED_AT_ONCE {
            // Refused events before all else.
            next.sort_unstable_by_key(|((has_records, save_at), whose)| (!has_records, *save_at, *whose));
            next.truncate(SAVED_AT_ONCE);
        }
        let next: Vec<Whose> = next.into_iter().map(|(_, whose)| whose).collect();
        process::show_activity("saving cursors");
        let Err(error) = save(&mut self.backends, |b| next.contains(&b.whose()), now) else {
            self.patience.succeeded(Task::Save);
            next.iter()
                .for_each(|whose| self.patience.succeeded(Task::SaveOf(*whose)));
            return;
        };
        if self.is_of_another_extension() {
            return;
        }
        if is_lock(&error) && !process::transaction(catalog::can_save).unwrap_or(false) {
            // Somebody has locked the whole table, not a row.
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

    /// When a backend has to be saved and its patience allows it.
    pub(super) fn save_at(&self, backend: &Backend) -> Option<Now> {
        let due = match backend.books.records.is_empty() {
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
