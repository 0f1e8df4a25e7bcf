//! Lasting failures of the worker's tasks, for `outbox.health()`. They are kept in shared memory, because the failure
//! may be that the tables cannot be written.

use crate::server::database_slot::DatabaseSlot;
use crate::worker::task::Task;
use relay::time::Now;
use relay::time::patience::Patience;
use std::collections::BTreeMap;
use std::time::Duration;

/// A failure that ends sooner is not reported.
const LASTS: Duration = Duration::from_secs(1);
/// The same for waiting for a lock. `outbox.health()` finds out by itself who has locked a whole table.
const LOCK_LASTS: Duration = Duration::from_secs(30);
/// A task that is no longer tried, because it is no longer due, counts as well after this time.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);

struct TaskTrouble {
    since: Now,
    latest: Now,
    /// From when on it is reported.
    told_from: Now,
    detail: String,
    hint: String,
}

#[derive(Default)]
pub(super) struct Troubles {
    of_tasks: BTreeMap<Task, TaskTrouble>,
    told: String,
}

impl Troubles {
    /// A task has failed. `detail`: the reason, as a sentence.
    pub(super) fn failed(&mut self, task: Task, detail: String, hint: &str, is_lock: bool, now: Now) {
        let since = self.of_tasks.get(&task).map_or(now, |known| known.since);
        let trouble = TaskTrouble {
            since,
            latest: now,
            told_from: since + if is_lock { LOCK_LASTS } else { LASTS },
            detail,
            hint: hint.to_owned(),
        };
        self.of_tasks.insert(task, trouble);
    }

    /// Reports the gravest failure, if it has changed: three lines, see `outbox.worker_trouble()`.
    pub(super) fn tell(&mut self, slot: &DatabaseSlot, patience: &Patience<Task>, now: Now) {
        if self.of_tasks.is_empty() && self.told.is_empty() {
            return;
        }
        self.of_tasks.retain(|task, trouble| {
            patience.retry_at(*task).is_some() && now < trouble.latest + 2 * task.waits().longest + FORGOTTEN_AFTER
        });
        let gravest = self
            .of_tasks
            .iter()
            .find(|(_, trouble)| trouble.latest >= trouble.told_from);
        let words = gravest.map_or_else(String::new, |(task, trouble)| {
            let status = if task.is_vital() { "fail" } else { "warn" };
            let [detail, hint] = [&trouble.detail, &trouble.hint].map(|text| text.replace('\n', " "));
            // There is room for both, see `TEXT_BYTES`.
            format!("{status}\n{}\n{}", cut(&detail, 300), cut(&hint, 190))
        });
        if words != self.told {
            slot.tell_trouble(&words);
            self.told = words;
        }
    }
}

/// The beginning of a text, of at most this many bytes.
fn cut(text: &str, most: usize) -> &str {
    &text[..text.floor_char_boundary(most)]
}
