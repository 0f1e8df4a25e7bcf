//! The pace of backends with `max_rate`: how many events each may send in this round. The lanes of a cluster's backend
//! share its tokens evenly. Within a lane, events go in their order, whatever stream they are for. A stream whose
//! refused events are due gets half of the tokens.

use crate::worker::state::Worker;
use relay::delivery::max_rate::Bucket;
use relay::time::Now;
use std::collections::BTreeMap;

impl Worker {
    /// Counts what each backend with a pace has sent, and sets what it may send now.
    pub(super) fn grant(&mut self, now: Now) {
        if self.rates.0.is_empty() && self.backends.iter().all(|b| b.max_rate().is_none()) {
            return;
        }
        let backends = &self.backends;
        self.rates.0.retain(|number, bucket| {
            backends
                .iter()
                .any(|b| b.number == *number && b.max_rate() == Some(bucket.per_second()))
        });
        let wants: Vec<bool> = (0..self.backends.len())
            .map(|index| self.wants_to_send(index, now))
            .collect();
        // Grouped by number: everything that was sent is counted before tokens are shared.
        let mut wanting: BTreeMap<i32, usize> = BTreeMap::new();
        for (backend, wants) in self.backends.iter_mut().zip(&wants) {
            let sent = backend.delivery.take_sent();
            if let Some(rate) = backend.max_rate() {
                let bucket = self
                    .rates
                    .0
                    .entry(backend.number)
                    .or_insert_with(|| Bucket::new(rate, now));
                bucket.spend(sent);
                *wanting.entry(backend.number).or_default() += usize::from(*wants);
            }
        }
        for (backend, wants) in self.backends.iter_mut().zip(&wants) {
            let bucket = self.rates.0.get_mut(&backend.number);
            let allowance = bucket.map(|bucket| {
                let lanes = wanting.get(&backend.number).copied().unwrap_or_default();
                bucket.available(now).div_ceil(lanes.max(1))
            });
            let was_paced = backend.delivery.is_paced();
            backend.delivery.allow(allowance, *wants, now);
            if was_paced != backend.delivery.is_paced() {
                // Waiting for the pace shows in the state.
                backend.books.change(now);
            }
        }
    }

    /// Whether it may have events to send, apart from its pace.
    fn wants_to_send(&self, index: usize, now: Now) -> bool {
        let backend = &self.backends[index];
        let is_retry_due = || backend.delivery.streams().next_retry_at().is_some_and(|at| at <= now);
        backend.reads_for_redis() && (self.way(index).leads_on() || is_retry_due())
    }

    /// When a backend that waits for its pace may send again.
    pub(super) fn granted_at(&self) -> Option<Now> {
        let waits = |number: i32| {
            self.backends
                .iter()
                .any(|b| b.number == number && b.delivery.is_paced())
        };
        let times = self.rates.0.iter().filter(|(number, _)| waits(**number));
        times.map(|(_, bucket)| bucket.next_at()).min()
    }
}
