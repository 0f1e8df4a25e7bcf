//! Events that Redis refuses for what they are, stream by stream.
//!
//! The head of a refused stream is tried again up to its `max_retries`; meanwhile everything behind it in the same stream waits
//! in the table of refused events, and other streams go on. When the head is accepted the others follow in order; when it
//! has failed they fail with it, and the next event of that stream has one attempt, until one is accepted.

use crate::classify::Failure;
use crate::delivery::{Entry, Now};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Streams that have exhausted their attempts are remembered up to this many; beyond it, all are forgiven.
const REMEMBERED_STREAMS: usize = 10_000;

/// What must be written down in Postgres before the cursor passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Copy the row to the refused events, to be tried again.
    Park { seq: i64, attempts: u32, error: String },
    /// Copy the row to the failed events.
    Fail { seq: i64, attempts: u32, error: String },
    /// A waiting event was accepted: it need not wait any more.
    Accepted { seq: i64 },
    /// A waiting event was refused again.
    RefusedAgain { seq: i64, attempts: u32, error: String },
    /// A waiting event was refused for the last time: it and everything that waits behind it in its stream fail.
    FailStream {
        stream: Rc<str>,
        seq: i64,
        attempts: u32,
        error: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    /// Events wait; the head had `attempts`.
    Blocked {
        attempts: u32,
        retry_at: Now,
        retrying: bool,
    },
    /// The head was accepted; the others follow.
    Following { sending: bool },
    /// The head failed: the next refusal fails at once.
    Exhausted,
}

/// The streams of one backend that are not well.
#[derive(Default)]
pub struct Streams {
    /// Sorted, so that a run can be replayed.
    troubled: BTreeMap<Rc<str>, Trouble>,
}

impl Streams {
    /// From the table: a stream and the attempts of its head.
    pub fn waiting(streams: impl IntoIterator<Item = (String, u32)>) -> Self {
        let blocked = |attempts| Trouble::Blocked {
            attempts,
            retry_at: Now::ZERO,
            retrying: false,
        };
        Self {
            troubled: streams
                .into_iter()
                .map(|(name, attempts)| (Rc::from(name), blocked(attempts)))
                .collect(),
        }
    }

    /// Whether events of this stream must wait behind others.
    pub fn is_blocked(&self, stream: &str) -> bool {
        !self.troubled.is_empty()
            && matches!(
                self.troubled.get(stream),
                Some(Trouble::Blocked { .. } | Trouble::Following { .. })
            )
    }

    /// When the next stream is to be tried again.
    pub fn next_retry_at(&self) -> Option<Now> {
        let due = |trouble: &Trouble| match *trouble {
            Trouble::Blocked {
                retry_at,
                retrying: false,
                ..
            } => Some(retry_at),
            Trouble::Following { sending: false } => Some(Now::ZERO),
            _ => None,
        };
        self.troubled.values().filter_map(due).min()
    }

    /// A stream to be tried again now, marked as such, and how many of its events.
    pub fn due(&mut self, now: Now, batch_size: usize) -> Option<(Rc<str>, usize)> {
        self.troubled.iter_mut().find_map(|(stream, trouble)| match trouble {
            Trouble::Blocked { retry_at, retrying, .. } if !*retrying && *retry_at <= now => {
                *retrying = true;
                Some((stream.clone(), 1))
            }
            Trouble::Following { sending } if !*sending => {
                *sending = true;
                Some((stream.clone(), batch_size))
            }
            _ => None,
        })
    }

    /// Streams are tried again at `latest` at the latest, by the attempts of their heads.
    pub(crate) fn hasten(&mut self, latest: impl Fn(u32) -> Now) {
        for trouble in self.troubled.values_mut() {
            if let Trouble::Blocked { attempts, retry_at, .. } = trouble {
                *retry_at = latest(*attempts).min(*retry_at);
            }
        }
    }

    /// No event of this stream waits any more.
    pub fn cleared(&mut self, stream: &str) {
        self.troubled.remove(stream);
    }

    /// All that waited in a stream whose head was accepted is on its way: nothing needs to wait behind it.
    pub(crate) fn released(&mut self, stream: &str) {
        if matches!(self.troubled.get(stream), Some(Trouble::Following { .. })) {
            self.troubled.remove(stream);
        }
    }

    /// What was on its way is in doubt, and still in the table.
    pub(crate) fn waits_again(&mut self, stream: &Rc<str>) {
        self.troubled
            .entry(stream.clone())
            .or_insert(Trouble::Following { sending: false });
    }

    /// Events of this stream are on their way again.
    pub(crate) fn retrying(&mut self, stream: &str) {
        match self.troubled.get_mut(stream) {
            Some(Trouble::Blocked { retrying, .. }) => *retrying = true,
            Some(Trouble::Following { sending }) => *sending = true,
            Some(Trouble::Exhausted) | None => {}
        }
    }

    /// The connection is gone: nothing is being retried.
    pub fn abandon(&mut self) {
        for trouble in self.troubled.values_mut() {
            match trouble {
                Trouble::Blocked { retrying, .. } => *retrying = false,
                Trouble::Following { sending } => *sending = false,
                Trouble::Exhausted => {}
            }
        }
    }

    /// An event was accepted; `again`: it had been waiting.
    pub(crate) fn accepted(&mut self, entry: &Entry, again: bool) -> Option<Record> {
        match self.troubled.get(&entry.stream) {
            Some(Trouble::Blocked { retrying: true, .. }) if again => {
                self.troubled
                    .insert(entry.stream.clone(), Trouble::Following { sending: true });
            }
            Some(Trouble::Exhausted) => {
                self.troubled.remove(&entry.stream);
            }
            _ => {}
        }
        again.then_some(Record::Accepted { seq: entry.seq })
    }

    /// An event was refused; `again`: it had been waiting.
    pub(crate) fn refused(
        &mut self,
        entry: &Entry,
        again: bool,
        failure: &Failure,
        now: Now,
        wait: impl Fn(u32) -> Duration,
    ) -> Record {
        let (seq, error) = (entry.seq, failure.message.clone());
        let attempts = match self.troubled.get(&entry.stream) {
            // Behind the head: it was on its way already.
            Some(Trouble::Blocked { .. }) if !again => {
                return Record::Park {
                    seq,
                    attempts: 1,
                    error,
                };
            }
            Some(Trouble::Blocked { retrying: false, .. }) => {
                return Record::RefusedAgain {
                    seq,
                    attempts: 1,
                    error,
                };
            }
            Some(Trouble::Following { .. }) if !again => {
                return Record::Park {
                    seq,
                    attempts: 1,
                    error,
                };
            }
            Some(Trouble::Exhausted) => {
                return Record::Fail {
                    seq,
                    attempts: 1,
                    error,
                };
            }
            Some(Trouble::Blocked { attempts, .. }) => attempts + 1,
            Some(Trouble::Following { .. }) | None => 1,
        };
        if attempts < entry.max_attempts {
            let blocked = Trouble::Blocked {
                attempts,
                retry_at: now + wait(attempts),
                retrying: false,
            };
            self.troubled.insert(entry.stream.clone(), blocked);
            return match again {
                true => Record::RefusedAgain { seq, attempts, error },
                false => Record::Park { seq, attempts, error },
            };
        }
        if self.troubled.len() >= REMEMBERED_STREAMS {
            self.troubled
                .retain(|_, trouble| !matches!(trouble, Trouble::Exhausted));
        }
        self.troubled.insert(entry.stream.clone(), Trouble::Exhausted);
        match again {
            true => Record::FailStream {
                stream: entry.stream.clone(),
                seq,
                attempts,
                error,
            },
            false => Record::Fail { seq, attempts, error },
        }
    }

    /// The replies of a retry were looked at.
    pub(crate) fn end_retry(&mut self, entries: &[Entry]) {
        let stream = entries.first().map(|e| e.stream.clone());
        if let Some(Trouble::Following { sending }) = stream.and_then(|s| self.troubled.get_mut(&s)) {
            *sending = false;
        }
    }
}
