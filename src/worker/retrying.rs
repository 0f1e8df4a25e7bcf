//! Refused events: sends those that are due again, and fails events that wait behind a failed one.

use crate::server::guc;
use crate::server::process;
use crate::tables::care;
use crate::tables::ticks;
use crate::worker::pass;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use relay::time::Now;

/// How many waiting events of a backend fail in one round with the heads of their streams, and in how many streams.
const FAILED_AT_ONCE: usize = 250;
const FAILED_STREAMS: usize = 100;
/// Waiting events behind an accepted one are sent in batches of this many times the usual size, because with
/// exactly_once only one such batch is in flight at a time.
const FOLLOWING_BATCHES: usize = 5;

impl Worker {
    /// Decides whether events may be failed in this round, which is a large task.
    pub(super) fn pace_failing(&mut self, now: Now) {
        let may_begin = self.failing.may_begin(self.is_beside_others(), now);
        self.fails_at = (!may_begin).then(|| self.failing.rests_until());
    }

    /// Sends a batch for each backend with streams that are due, or fails a part of the events that have to fail. True:
    /// there is more to do at once.
    pub(super) fn retry_refused(&mut self, now: Now) -> bool {
        let mut more = false;
        for index in 0..self.backends.len() {
            let backend = &mut self.backends[index];
            // Records of refusals must be written down first.
            if !backend.reads_for_redis() || !backend.is_enabled() || !backend.books.records.is_empty() {
                continue;
            }
            if !self.patience.allows(Task::Retry(backend.whose()), now) {
                continue;
            }
            if backend.delivery.streams_to_fail(1).is_empty() {
                more |= self.send_again(index, now);
            } else if self.fails_at.is_none() {
                more |= self.fail_streams(index, now);
            }
        }
        more
    }

    /// True: none of these events was left, and there may be others.
    fn send_again(&mut self, index: usize, now: Now) -> bool {
        let backend = &mut self.backends[index];
        let heads = guc::BATCH_SIZE.get() as usize;
        let retries = backend.delivery.streams_to_retry(now, heads, heads * FOLLOWING_BATCHES);
        if retries.is_empty() {
            return false;
        }
        process::show_activity(&format!("sending refused events to {} again", backend.name()));
        let task = Task::Retry(backend.whose());
        backend.tell_lsn(self.flushed);
        match care::transaction(|| pass::refused_batch(backend, &retries)) {
            Ok(retried) => {
                let is_sent = retried.batch.is_some();
                if is_sent && std::mem::take(&mut backend.books.is_unflushed) {
                    self.flushed = self.flushed.max(ticks::flush());
                }
                backend.send(retried.batch.into_iter().collect(), self.flushed);
                let delivery = &mut backend.delivery;
                retried.cleared.iter().for_each(|s| delivery.stream_cleared(s));
                retried.put_back.iter().for_each(|s| delivery.stream_put_back(s));
                self.patience.succeeded(task);
                !is_sent
            }
            Err(error) => {
                backend.delivery.retry_failed();
                if error.lacks_memory() {
                    backend.lacks_memory();
                }
                self.failed(task, &error, now);
                false
            }
        }
    }

    /// True: some events were failed, and there may be others.
    fn fail_streams(&mut self, index: usize, now: Now) -> bool {
        self.failing.begins(self.now());
        let backend = &mut self.backends[index];
        let failing = backend.delivery.streams_to_fail(FAILED_STREAMS);
        match process::transaction(|| pass::fail_waiting(backend, &failing, FAILED_AT_ONCE)) {
            Ok((records, streams)) => {
                backend.books.records.extend(records);
                self.failed_streams.push((index, streams));
                true
            }
            Err(error) => {
                let task = Task::Retry(backend.whose());
                self.failed(task, &error, now);
                false
            }
        }
    }

    /// Ends the failing of streams in which all waiting events have failed, which is written down. It must be durable
    /// before later events of the streams are sent: after a crash, no earlier event may wait again.
    pub(super) fn end_failing(&mut self) {
        let failed = std::mem::take(&mut self.failed_streams);
        if failed.iter().all(|(_, streams)| streams.is_empty()) {
            return;
        }
        self.flush();
        // A backend that could not be saved is done later.
        for (index, streams) in failed {
            let backend = &mut self.backends[index];
            if backend.books.records.is_empty() {
                streams.iter().for_each(|stream| backend.delivery.stream_failed(stream));
            }
        }
    }
}
