//! Events that Redis refuses because of their content, stream by stream.
//!
//! The head of a refused stream is tried again up to its `max_retries`. Meanwhile everything behind it in the same
//! stream waits in the table of refused events, and other streams go on. When the head is accepted, the others follow
//! in order. When it has failed, they fail with it, and each further event of that stream has one attempt, until one is
//! accepted.
//!
//! There may be a hundred thousand such streams. Only a change of settings examines all of them. Their cost is limited:
//! attempts have a share of the time (`waiting.rs`), and streams a share of the memory.

use crate::delivery::flight::BatchedEvent;
use crate::delivery::waiting::{Budget, Waiting};
use crate::failure::Failure;
use crate::time::Now;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

/// The most attempts that an event may ask for. This is also the limit of the setting `max_retries`.
pub const MOST_ATTEMPTS: i32 = 1_000;

/// At most this many streams with exhausted attempts are remembered. Beyond that, all are forgotten.
const REMEMBERED_STREAMS: usize = 10_000;

/// The memory for refused streams. When it is used up, a refused event in another stream has one attempt.
const MOST_BYTES: usize = 32 * 1024 * 1024;
/// The memory that a stream takes besides its name, as measured.
const STREAM_BYTES: usize = 200;

/// What must be written down in Postgres before the cursor passes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Copy the row to the refused events, to be tried again.
    Park { seq: i64, attempts: u32, error: Rc<str> },
    /// Copy the row to the failed events.
    Fail { seq: i64, attempts: u32, error: Rc<str> },
    /// A waiting event was accepted and no longer waits.
    Accepted { seq: i64 },
    /// A waiting event was refused again.
    RefusedAgain { seq: i64, attempts: u32, error: Rc<str> },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum StreamState {
    /// Events wait; the head has had `attempts` attempts.
    Blocked {
        attempts: u32,
        retry_at: Now,
        retrying: bool,
    },
    /// The head was accepted; the others follow.
    Following { sending: bool },
    /// The head has failed for this reason, and all waiting events are about to fail.
    Failing { error: Rc<str> },
    /// The head has failed: the next refused event fails at once.
    Exhausted,
}

/// A stream that is to be tried again, and how many of its events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    pub stream: Rc<str>,
    pub count: usize,
}

/// The refused streams of one backend.
#[derive(Default)]
pub struct Streams {
    /// Sorted, so that a run can be reproduced.
    troubled: BTreeMap<Rc<str>, StreamState>,
    /// Streams that are blocked and not being tried now.
    waiting: Waiting,
    budget: Budget,
    /// Streams of a batch of which nothing was appended because of other streams. They are tried next, without other
    /// streams. Otherwise many streams that are refused before EXEC would keep them from ever being appended.
    innocent: BTreeSet<Rc<str>>,
    /// The memory that the streams take.
    bytes: usize,
    /// Streams whose next events may follow, in the order in which they came. A stream without refused events may still
    /// be in this queue.
    following: VecDeque<Rc<str>>,
    /// Streams with something in flight.
    busy: BTreeSet<Rc<str>>,
    failing: BTreeSet<Rc<str>>,
    exhausted: usize,
}

fn bytes_of(stream: &Rc<str>) -> usize {
    stream.len() + STREAM_BYTES
}

impl Streams {
    /// The streams from the table, with the attempts of their heads.
    pub fn waiting(streams: impl IntoIterator<Item = (String, u32)>) -> Self {
        let mut all = Self::default();
        for (name, attempts) in streams {
            all.set(
                Rc::from(name),
                StreamState::Blocked {
                    attempts,
                    retry_at: Now::ZERO,
                    retrying: false,
                },
            );
        }
        all
    }

    /// The one place where a stream's state changes.
    fn set(&mut self, stream: Rc<str>, state: StreamState) {
        self.forget(&stream);
        self.bytes += bytes_of(&stream);
        match &state {
            StreamState::Blocked { retrying: true, .. } | StreamState::Following { sending: true } => {
                self.busy.insert(stream.clone());
            }
            StreamState::Blocked { attempts, retry_at, .. } => {
                self.waiting.insert(*attempts, *retry_at, stream.clone());
            }
            StreamState::Following { .. } => self.following.push_back(stream.clone()),
            StreamState::Failing { .. } => {
                self.failing.insert(stream.clone());
            }
            StreamState::Exhausted => self.exhausted += 1,
        }
        self.troubled.insert(stream, state);
    }

    /// The stream has no refused events any more.
    fn forget(&mut self, stream: &Rc<str>) {
        let state = self.troubled.remove(stream);
        if state.is_some() {
            self.bytes -= bytes_of(stream);
        }
        match state {
            Some(StreamState::Blocked { retrying: true, .. } | StreamState::Following { sending: true }) => {
                self.busy.remove(stream);
            }
            Some(StreamState::Blocked { attempts, retry_at, .. }) => {
                self.waiting.remove(attempts, retry_at, stream);
            }
            Some(StreamState::Failing { .. }) => {
                self.failing.remove(stream);
            }
            Some(StreamState::Exhausted) => self.exhausted -= 1,
            // Its place in the queue is skipped later.
            Some(StreamState::Following { .. }) | None => {}
        }
    }

    /// Whether events of this stream must wait behind others.
    pub fn is_blocked(&self, stream: &str) -> bool {
        !self.troubled.is_empty()
            && matches!(
                self.troubled.get(stream),
                Some(StreamState::Blocked { .. } | StreamState::Following { .. } | StreamState::Failing { .. })
            )
    }

    /// Whether any event waits.
    pub fn has_waiting(&self) -> bool {
        self.troubled.len() > self.exhausted || !self.innocent.is_empty()
    }

    /// When the next stream is to be tried again.
    pub fn next_retry_at(&self) -> Option<Now> {
        let may_follow = || self.following.iter().any(|stream| self.may_follow(stream));
        match !self.innocent.is_empty() || may_follow() {
            true => Some(Now::ZERO),
            false => self.waiting.first_at().map(|at| at.max(self.budget.rests_until())),
        }
    }

    fn may_follow(&self, stream: &Rc<str>) -> bool {
        self.troubled.get(stream) == Some(&StreamState::Following { sending: false })
    }

    /// Chooses the streams to be tried again now in one batch, and marks them: the heads of at most `heads` streams
    /// that are due, and `followers` events in total of streams whose head was accepted. These streams share that
    /// number, so that none waits for another to finish. `waiting.rs` chooses the heads. After they were tried,
    /// [`Self::retried`] must be called.
    pub fn due(&mut self, now: Now, heads: usize, followers: usize) -> Vec<Retry> {
        let mut due = self.due_innocent(followers);
        if !due.is_empty() {
            return due;
        }
        let may_try = now >= self.budget.rests_until();
        while may_try
            && due.len() < heads
            && let Some(stream) = self.waiting.next_due(now)
        {
            self.retrying(&stream);
            due.push(Retry { stream, count: 1 });
        }
        let blocked = due.len();
        if blocked > 0 && !self.waiting.is_empty() {
            self.budget.begin(now, blocked);
        }
        while due.len() < blocked + heads
            && let Some(stream) = self.following.pop_front()
        {
            if self.may_follow(&stream) {
                self.retrying(&stream);
                due.push(Retry { stream, count: 1 });
            }
        }
        let following = &mut due[blocked..];
        let share = followers / following.len().max(1);
        following.iter_mut().for_each(|retry| retry.count = share.max(1));
        due
    }

    /// The streams that are tried without others.
    fn due_innocent(&mut self, followers: usize) -> Vec<Retry> {
        let mut due = Vec::new();
        for stream in std::mem::take(&mut self.innocent) {
            let count = match self.troubled.get(&stream) {
                Some(StreamState::Blocked { retrying: false, .. }) => 1,
                Some(StreamState::Following { sending: false }) => followers,
                _ => continue,
            };
            self.retrying(&stream);
            due.push(Retry { stream, count });
        }
        let sharing = due.iter().filter(|retry| retry.count > 1).count().max(1);
        for retry in due.iter_mut().filter(|retry| retry.count > 1) {
            retry.count = (followers / sharing).max(1);
        }
        due
    }

    /// Nothing was appended of a batch, although nothing of this stream was refused.
    pub(crate) fn is_innocent(&mut self, stream: Rc<str>) {
        self.innocent.insert(stream);
    }

    /// Nothing is being tried any more, and the result is written down.
    pub(crate) fn retried(&mut self, now: Now) {
        self.budget.end(now);
    }

    /// Shortens waits: no stream waits longer than until `latest`, which depends on the attempts of its head.
    pub(crate) fn hasten(&mut self, latest: impl Fn(u32) -> Now) {
        for state in self.troubled.values_mut() {
            if let StreamState::Blocked { attempts, retry_at, .. } = state {
                *retry_at = latest(*attempts).min(*retry_at);
            }
        }
        self.waiting = Waiting::default();
        for (stream, state) in &self.troubled {
            if let StreamState::Blocked {
                attempts,
                retry_at,
                retrying: false,
            } = state
            {
                self.waiting.insert(*attempts, *retry_at, stream.clone());
            }
        }
    }

    /// No event of this stream waits any more.
    pub fn cleared(&mut self, stream: &Rc<str>) {
        self.forget(stream);
    }

    /// All waiting events of a stream whose head was accepted are in flight: nothing needs to wait behind them.
    pub(crate) fn released(&mut self, stream: &Rc<str>) {
        if matches!(self.troubled.get(stream), Some(StreamState::Following { .. })) {
            self.forget(stream);
        }
    }

    /// Events of this stream in flight are in doubt, and still in the table.
    pub(crate) fn waits_again(&mut self, stream: &Rc<str>) {
        if !self.troubled.contains_key(stream) {
            self.set(stream.clone(), StreamState::Following { sending: false });
        }
    }

    /// Events of this stream are in flight again.
    pub(crate) fn retrying(&mut self, stream: &Rc<str>) {
        self.mark(stream, true);
    }

    /// No events of this stream are in flight any more.
    pub(crate) fn rests(&mut self, stream: &Rc<str>) {
        self.mark(stream, false);
    }

    fn mark(&mut self, stream: &Rc<str>, busy: bool) {
        let state = match self.troubled.get(stream) {
            Some(StreamState::Blocked {
                attempts,
                retry_at,
                retrying,
            }) if *retrying != busy => StreamState::Blocked {
                attempts: *attempts,
                retry_at: *retry_at,
                retrying: busy,
            },
            Some(StreamState::Following { sending }) if *sending != busy => StreamState::Following { sending: busy },
            _ => return,
        };
        self.set(stream.clone(), state);
    }

    /// The connection is lost: nothing is being tried any more.
    pub fn abandon(&mut self) {
        while let Some(stream) = self.busy.first().cloned() {
            self.rests(&stream);
        }
    }

    /// At most `count` streams in which all waiting events must fail, with the reason.
    pub fn to_fail(&self, count: usize) -> Vec<(Rc<str>, Rc<str>)> {
        let reason = |stream: &Rc<str>| match self.troubled.get(stream) {
            Some(StreamState::Failing { error }) => Some((stream.clone(), error.clone())),
            _ => None,
        };
        self.failing.iter().take(count).filter_map(reason).collect()
    }

    /// All waiting events of this stream have failed.
    pub(crate) fn failed(&mut self, stream: &Rc<str>) {
        if self.failing.contains(stream) {
            self.exhaust(stream.clone());
        }
    }

    /// Called when this replaces `other`: a stream that was failing there fails here too, if it has waiting events.
    pub(crate) fn go_on_from(&mut self, other: &Self) {
        self.budget = other.budget.clone();
        for (stream, error) in other.to_fail(usize::MAX) {
            if self.troubled.contains_key(&stream) {
                self.set(stream, StreamState::Failing { error });
            }
        }
    }

    fn exhaust(&mut self, stream: Rc<str>) {
        if self.exhausted >= REMEMBERED_STREAMS {
            let bytes = &mut self.bytes;
            self.troubled.retain(|stream, state| {
                let stays = *state != StreamState::Exhausted;
                *bytes -= if stays { 0 } else { bytes_of(stream) };
                stays
            });
            self.exhausted = 0;
        }
        self.set(stream, StreamState::Exhausted);
    }

    /// An event was accepted; `again`: it had been waiting.
    pub(crate) fn accepted(&mut self, entry: &BatchedEvent, again: bool) -> Option<Record> {
        match self.troubled.get(&entry.stream) {
            Some(StreamState::Blocked { retrying: true, .. }) if again => {
                self.set(entry.stream.clone(), StreamState::Following { sending: true });
            }
            Some(StreamState::Exhausted) => self.forget(&entry.stream),
            _ => {}
        }
        again.then_some(Record::Accepted { seq: entry.seq })
    }

    /// An event was refused; `again`: it had been waiting.
    pub(crate) fn refused(
        &mut self,
        entry: &BatchedEvent,
        again: bool,
        failure: &Failure,
        now: Now,
        wait: impl Fn(u32) -> Duration,
    ) -> Record {
        let (seq, error): (i64, Rc<str>) = (entry.seq, Rc::from(failure.message.as_str()));
        let attempts = match self.troubled.get(&entry.stream) {
            // It was already in flight behind the head.
            Some(StreamState::Blocked { .. } | StreamState::Following { .. } | StreamState::Failing { .. })
                if !again =>
            {
                return Record::Park {
                    seq,
                    attempts: 1,
                    error,
                };
            }
            Some(StreamState::Blocked { retrying: false, .. } | StreamState::Failing { .. }) => {
                return Record::RefusedAgain {
                    seq,
                    attempts: 1,
                    error,
                };
            }
            Some(StreamState::Exhausted) => {
                return Record::Fail {
                    seq,
                    attempts: 1,
                    error,
                };
            }
            Some(StreamState::Blocked { attempts, .. }) => attempts + 1,
            Some(StreamState::Following { .. }) | None => 1,
        };
        if again {
            self.budget.refused();
        }
        let has_room = again || self.troubled.contains_key(&entry.stream) || self.bytes < MOST_BYTES;
        if attempts < entry.max_attempts && !has_room {
            let error = format!("{error} (not tried again: too many streams of its backend have refused events)");
            let error = error.into();
            return Record::Fail { seq, attempts, error };
        }
        if attempts < entry.max_attempts {
            let blocked = StreamState::Blocked {
                attempts,
                retry_at: now + wait(attempts),
                retrying: false,
            };
            self.set(entry.stream.clone(), blocked);
            return match again {
                true => Record::RefusedAgain { seq, attempts, error },
                false => Record::Park { seq, attempts, error },
            };
        }
        match again {
            // Other events may wait behind it.
            true => self.set(entry.stream.clone(), StreamState::Failing { error: error.clone() }),
            false => self.exhaust(entry.stream.clone()),
        }
        Record::Fail { seq, attempts, error }
    }

    /// The replies of a retry have been evaluated.
    pub(crate) fn end_retry(&mut self, stream: &Rc<str>) {
        if let Some(StreamState::Following { sending: true }) = self.troubled.get(stream) {
            self.rests(stream);
        }
    }
}
