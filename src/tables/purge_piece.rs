//! Deletes a piece of a backend's sent events: those between the tick up to which was purged and the newest tick that
//! is older than the retention. The worker and `outbox.purge()` use it.

use crate::server::guc;
use crate::server::process;
use crate::tables::catalog;
use crate::tables::events::EventsTable;
use crate::tables::{backends, refused, retention};
use relay::reading::range::RangeScan;
use relay::reading::snapshot::Tick;
use std::sync::Arc;

/// How many rows one statement deletes; it takes about a tenth of a millisecond. Between two statements the worker
/// checks whether an event has come.
const STEP_ROWS: usize = 32;
/// How many numbers one scan reads. Index entries of deleted rows count too, because a scan passes them without
/// interruption.
const WINDOW_SEQS: i64 = 2_000;

/// How long sent events are kept, in microseconds; `None`: for ever.
pub(crate) fn sent_retention_us() -> Option<i64> {
    guc::retention_us(&guc::PUBLISHED_RETENTION_MIN).filter(|_| guc::CLEANUP_PUBLISHED.get())
}

/// Deletes up to `count` rows of a backend after `after`; fewer if `is_over`, which is asked after each statement.
/// Returns how many were deleted, and after which row to go on; `None`: all are done.
pub(crate) fn purge_sent(
    number: i32,
    after: i64,
    retention_us: i64,
    count: usize,
    is_over: impl Fn() -> bool,
) -> (u64, Option<i64>) {
    let Some((from, to)) = retention::purgeable(number, retention_us) else {
        return (0, None);
    };
    // Number 0 stands for the events of backends that do not exist.
    let known = if number == 0 {
        backends::known_numbers()
    } else {
        Vec::new()
    };
    let is_its = |row_number: i32| row_number == number || (number == 0 && !known.contains(&row_number));
    let relations = catalog::expect_relations();
    let mut table = EventsTable::open(&relations);
    let (mut found, mut deleted, mut last) = (Vec::new(), Vec::new(), Some(after));
    retention::delete_events(|delete| {
        'windows: while let Some(after) = last {
            let upto = after.max(from.low_seq).saturating_add(WINDOW_SEQS);
            let window = Arc::new(Tick {
                high_seq: upto.min(to.high_seq),
                ..Tick::clone(&to)
            });
            pgrx::check_for_interrupts!();
            let mut scan = RangeScan::open(&mut table, &from, &window, after);
            while let Some(step) = scan.step() {
                last = Some(step.seq());
                if let Some(key) = step.row()
                    && is_its(scan.current().row().backend_number())
                {
                    found.push(key.seq);
                }
                if found.len() >= STEP_ROWS.min(count - deleted.len()) {
                    delete(&found);
                    deleted.append(&mut found);
                    if deleted.len() >= count || is_over() {
                        break 'windows;
                    }
                }
            }
            last = (upto < to.high_seq).then_some(upto);
            if is_over() {
                break;
            }
        }
        if !found.is_empty() {
            delete(&found);
            deleted.append(&mut found);
        }
    });
    table.close();
    if !deleted.is_empty() {
        // Refused events that were accepted later.
        refused::forget(&deleted);
    }
    if last.is_none() {
        retention::purged(number, &to);
    }
    if !deleted.is_empty() {
        process::debug(|| format!("purged {} sent events", deleted.len()));
    }
    (deleted.len() as u64, last)
}
