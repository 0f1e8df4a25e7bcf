//! The streams of one backend, and what is known about their consumer groups: which are surveyed next, what is trimmed,
//! how full they are.

use crate::consumers::group::{EntryId, Group, GroupName, Surveyed};
use crate::consumers::trim::{Holder, Trim, judge};
use crate::failure::{Class, Failure, Trouble};
use crate::fault::{self, Mutation};
use crate::time::Now;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// A backend's Redis is asked at most this often, about a limited number of streams.
pub const SURVEY_PAUSE: Duration = Duration::from_secs(1);
pub const ASKED_AT_ONCE: usize = 200;

/// The pause if only outbox.health() wants to know.
pub const PROBE_PAUSE: Duration = Duration::from_secs(5);

/// Who wants to know about consumer groups, besides trimming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    Nobody,
    /// Somebody calls outbox.health().
    Probe,
    /// Somebody reads outbox.consumers.
    View,
}

/// A survey that is not answered for this long counts as dropped. (A Redis that does not answer ends the connection.)
/// The next one has twice as long, because Redis may only be slow.
const PATIENCE: Duration = Duration::from_secs(60);
const MOST_PATIENCE: Duration = Duration::from_secs(24 * 3_600);

/// How many streams are remembered, without trimming and with it. If there are more, those are forgotten to which
/// nothing was sent for the longest time. A forgotten stream is not trimmed until something is sent to it again.
const MOST_WATCHED: usize = 1_000;
const MOST_TRIMMED: usize = 20_000;

/// A stream that was not surveyed yet is assumed to have room for this part of `max_len`, limited to this many entries.
const UNKNOWN_PART: i64 = 10;
const MOST_UNKNOWN: i64 = 1_000;

/// `trim = 'read'`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// 0: unlimited.
    pub max_len: i64,
    /// `trim_ignore_idle`.
    pub silence: Option<Duration>,
}

/// One stream to be surveyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub stream: Arc<str>,
    /// The trimming that is done before it is surveyed.
    pub trim: Option<Trim>,
}

/// A group that no longer holds trimming.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    pub stream: Arc<str>,
    pub group: GroupName,
    pub silent: Duration,
}

pub struct Readership {
    /// `None`: Redis is only asked for outbox.consumers and outbox.health().
    policy: Option<Policy>,
    /// `None`: the own stream belongs to another lane.
    own_stream: Option<Rc<str>>,
    streams: HashMap<Rc<str>, Watched>,
    /// The survey that was ordered, and until when its answer is expected.
    on_its_way: Option<(u64, Now)>,
    patience: Duration,
    surveys: u64,
    /// When the last survey began.
    asked_at: Option<Now>,
    /// Counts what is sent, to order the streams by their last use.
    clock: u64,
    /// Whether the own stream, if there is one, was surveyed, so that sending may begin.
    is_known: bool,
    /// The stream that has no room for the next event.
    full: Option<Rc<str>>,
    /// The failure that keeps the backend from sending.
    trouble: Option<Failure>,
}

#[derive(Default)]
struct Watched {
    /// The length in the last survey.
    length: Option<i64>,
    /// Entries that were sent since, and how many of these were sent after the survey was ordered.
    sent: i64,
    sent_behind: i64,
    is_being_asked: bool,
    /// Whether Redis cannot be asked about it, for a reason of the stream itself.
    is_unaskable: bool,
    asked_at: Option<Now>,
    /// The same before the present survey, in case that leaves it out.
    asked_before: Option<Now>,
    sent_at: u64,
    /// What to trim, and the last batch when that was determined.
    goal: Option<(Trim, u64)>,
    trimmed: Option<Trim>,
    holder: Option<Holder>,
    /// Whether nothing is left to trim until something is sent.
    is_settled: bool,
    /// When its groups were last examined by this connection.
    seen_at: Option<Now>,
    /// Its groups that have something to do but do nothing.
    stalled: Vec<Stalled>,
}

/// A group that has unread or pending entries and has not moved. (Before 7.2, Redis's own `idle` counts from the last
/// delivered entry, so a group that has read everything would look silent.)
struct Stalled {
    name: GroupName,
    at: (EntryId, i64, Option<EntryId>),
    /// For how long it was seen so. The time in which Redis was not asked does not count: while Redis is down, nobody
    /// can read from it.
    silent: Duration,
}

impl Readership {
    pub fn new(policy: Option<Policy>, own_stream: Option<Rc<str>>) -> Self {
        let own = own_stream.iter().cloned();
        let streams = own.map(|stream| (stream, Watched::default())).collect();
        Self {
            is_known: own_stream.is_none(),
            policy,
            own_stream,
            streams,
            on_its_way: None,
            patience: PATIENCE,
            surveys: 0,
            asked_at: None,
            clock: 0,
            full: None,
            trouble: None,
        }
    }

    pub fn policy(&self) -> Option<&Policy> {
        self.policy.as_ref()
    }

    /// Applies other settings. What is known about the streams stays valid.
    pub fn follow(&mut self, policy: Option<Policy>, own_stream: Option<&Rc<str>>) {
        if self.policy != policy {
            // Without a policy, lengths and groups were not examined.
            self.is_known &= self.policy.is_some() || own_stream.is_none();
            self.policy = policy;
            (self.full, self.trouble) = (None, None);
            self.disconnected();
        }
        if self.own_stream.as_ref() != own_stream {
            self.own_stream = own_stream.cloned();
            own_stream.iter().for_each(|stream| self.knows(stream));
            self.is_known = own_stream.is_none();
        }
    }

    /// Adds a stream that the backend has.
    pub fn knows(&mut self, stream: &Rc<str>) {
        if !self.streams.contains_key(stream) {
            self.make_room();
            self.streams.insert(stream.clone(), Watched::default());
        }
    }

    /// Notes that `count` entries were handed to the sender.
    pub fn sent(&mut self, stream: &Rc<str>, count: i64) {
        self.knows(stream);
        self.clock += 1;
        if let Some(watched) = self.streams.get_mut(stream) {
            watched.sent += count;
            watched.sent_behind += count;
            (watched.is_settled, watched.sent_at) = (false, self.clock);
        }
    }

    fn make_room(&mut self) {
        let most = match self.policy {
            Some(_) => MOST_TRIMMED,
            None => MOST_WATCHED,
        };
        if self.streams.len() < most {
            return;
        }
        let mut ages: Vec<_> = self.streams.values().map(|w| (!w.is_settled, w.sent_at)).collect();
        let half = ages.len() / 2;
        let (_, median, _) = ages.select_nth_unstable(half);
        let median = *median;
        let age = |w: &Watched| (!w.is_settled, w.sent_at);
        let newer = self.streams.values().filter(|w| age(w) > median).count();
        // After a restart all are of the same age: half of them stay, not none.
        let mut room = half.saturating_sub(newer);
        let kept = [self.own_stream.as_ref(), self.full.as_ref()];
        self.streams.retain(|stream, w| {
            let has_room = age(w) == median && room > 0;
            room -= usize::from(has_room);
            kept.contains(&Some(stream)) || w.is_being_asked || has_room || age(w) > median
        });
    }

    // --- room

    /// Whether nothing more may be sent for now.
    pub fn holds_back(&self) -> bool {
        self.policy.is_some() && (!self.is_known || self.full.is_some() || self.trouble.is_some())
    }

    /// Whether streams have limits.
    #[inline]
    pub fn has_limits(&self) -> bool {
        self.policy.is_some_and(|policy| policy.max_len > 0)
    }

    /// How many more entries a stream has room for.
    pub fn room(&self, stream: &str) -> i64 {
        let Some(max_len) = self.policy.map(|policy| policy.max_len).filter(|max| *max > 0) else {
            return i64::MAX;
        };
        let assumed = (max_len / UNKNOWN_PART).clamp(1, MOST_UNKNOWN);
        match self.streams.get(stream) {
            Some(watched) if watched.is_unaskable => i64::MAX,
            Some(watched) => match watched.length {
                Some(length) => max_len.saturating_sub(length).saturating_sub(watched.sent),
                None => assumed - watched.sent,
            },
            None => assumed,
        }
    }

    /// Notes that the next event has no room in its stream.
    pub fn fills_up(&mut self, stream: Rc<str>) {
        self.knows(&stream);
        self.full = Some(stream);
    }

    /// When to say that a survey takes long, if the backend waits for it. `limit`: how long it may take before that.
    pub fn slow_at(&self, limit: Duration) -> Option<Now> {
        let waits = self.holds_back() && self.trouble.is_none() && self.on_its_way.is_some();
        self.asked_at.filter(|_| waits).map(|at| at + limit)
    }

    /// The backend waits for a survey that takes long. Its answers, or the next ones, end this.
    pub fn is_slow(&mut self, failure: Failure) {
        self.trouble = Some(failure);
    }

    /// The failure that keeps the backend from sending, if it is not only momentary.
    pub fn trouble(&self) -> Option<&Failure> {
        self.trouble.as_ref()
    }

    // --- surveys

    /// When the next survey is due; `None`: there is nothing to ask.
    pub fn due_at(&self, interest: Interest) -> Option<Now> {
        let has_work = || !self.is_known || self.streams.values().any(|w| !w.is_settled);
        let pause = match (interest, self.policy) {
            (Interest::View, _) => SURVEY_PAUSE,
            (_, Some(_)) if has_work() => SURVEY_PAUSE,
            (Interest::Probe, None) => PROBE_PAUSE,
            (_, Some(_)) | (Interest::Nobody, None) => return None,
        };
        let due_at = self.asked_at.map_or(Now::ZERO, |at| at + pause);
        Some(self.on_its_way.map_or(due_at, |(_, until)| until))
    }

    /// Whether goals wait for a batch later than `last`.
    pub fn waits_for_batch(&self, last: u64) -> bool {
        self.streams
            .values()
            .any(|w| w.goal.as_ref().is_some_and(|(_, number)| *number >= last))
    }

    /// Begins a survey. Returns its number and its questions. `last`: the batch that was acknowledged last or is
    /// ordered before the survey; `None`: there is no guard. `trims`: the backend is not paused.
    pub fn ask(&mut self, now: Now, last: Option<u64>, trims: bool, interest: Interest) -> (u64, Vec<Question>) {
        self.surveys += 1;
        self.patience = match self.on_its_way {
            Some(_) => (self.patience * 2).min(MOST_PATIENCE),
            None => PATIENCE,
        };
        self.on_its_way = Some((self.surveys, now + self.patience));
        self.asked_at = Some(now);
        let asks_all = interest == Interest::View || self.policy.is_none();
        let first = |stream: &Rc<str>| [&self.full, &self.own_stream].contains(&&Some(stream.clone()));
        let order = |stream: &Rc<str>, w: &Watched| (!first(stream), w.asked_at);
        let mut chosen: Vec<(_, Rc<str>)> = self
            .streams
            .iter()
            .filter(|(_, w)| asks_all || !w.is_settled || w.length.is_none())
            .map(|(stream, w)| (order(stream, w), stream.clone()))
            .collect();
        if chosen.len() > ASKED_AT_ONCE {
            chosen.select_nth_unstable(ASKED_AT_ONCE);
            chosen.truncate(ASKED_AT_ONCE);
        }
        // There may be no room for the groups of the last ones.
        chosen.sort_unstable();
        let mut questions = Vec::with_capacity(chosen.len());
        for (_, stream) in chosen {
            let Some(watched) = self.streams.get_mut(&stream) else {
                continue;
            };
            (watched.is_being_asked, watched.sent_behind) = (true, 0);
            watched.asked_before = watched.asked_at.replace(now);
            let is_unneeded = |number: u64| last.is_none_or(|last| number < last);
            let is_due = |number: u64| trims && (is_unneeded(number) || fault::is_mutated(Mutation::TrimLastBatch));
            let trim = watched.goal.as_ref().filter(|(_, number)| is_due(*number));
            questions.push(Question {
                stream: Arc::from(&*stream),
                trim: trim.map(|(trim, _)| trim.keeping(watched.sent)),
            });
        }
        (self.surveys, questions)
    }

    /// The ordered survey will not be answered.
    pub fn interrupt(&mut self) {
        self.on_its_way = None;
        self.streams.values_mut().for_each(|w| w.is_being_asked = false);
    }

    /// The connection is lost. The next one may lead to a Redis in another state.
    pub fn disconnected(&mut self) {
        self.interrupt();
        for watched in self.streams.values_mut() {
            (watched.goal, watched.trimmed, watched.is_settled) = (None, None, false);
            watched.seen_at = None;
        }
    }

    /// Processes the answers of a survey; `last`: the batch that was acknowledged last. Returns the groups that no
    /// longer hold trimming; `None`: these are not the answers of the last survey.
    pub fn surveyed(&mut self, number: u64, found: &[Surveyed], last: u64, now: Now) -> Option<Vec<LeftOut>> {
        if self.on_its_way.is_none_or(|(asked, _)| asked != number) {
            return None;
        }
        let answered: HashSet<&str> = found.iter().map(|surveyed| &*surveyed.stream).collect();
        let is_left_out = |stream: &str, w: &Watched| w.is_being_asked && !answered.contains(stream);
        for (_, watched) in self.streams.iter_mut().filter(|(stream, w)| is_left_out(stream, w)) {
            watched.asked_at = watched.asked_before;
        }
        self.interrupt();
        let mut left_out = Vec::new();
        let mut refusal = None;
        for surveyed in found {
            // The last one counts: what Redis says of a command itself is clearer than what it says of one in a script.
            for failure in [&surveyed.untrimmed, &surveyed.failure].into_iter().flatten() {
                if failure.class == Class::Configuration {
                    refusal = Some(failure);
                }
            }
            let policy = self.policy;
            if self.own_stream.as_deref() == Some(&*surveyed.stream) {
                self.is_known = true;
            }
            if let Some(watched) = self.streams.get_mut(&*surveyed.stream) {
                watched.take(surveyed, policy, last, now, &mut left_out);
            }
        }
        if let Some(stream) = &self.full
            && self.room(stream) > 0
        {
            self.full = None;
        }
        self.trouble = self.policy.and_then(|policy| match (refusal, &self.full) {
            (Some(failure), _) => Some(denied(failure)),
            (None, Some(stream)) => self.overflow(stream, policy.max_len),
            (None, None) => None,
        });
        Some(left_out)
    }

    /// Why a stream has no room, unless it will have room soon.
    fn overflow(&self, stream: &Rc<str>, max_len: i64) -> Option<Failure> {
        let watched = self.streams.get(stream)?;
        if watched.goal.is_some() {
            return None;
        }
        let (trouble, reason) = match watched.holder.as_ref()? {
            Holder::Group(group) => (
                Trouble::Full,
                format!("its consumer group \"{group}\" has not acknowledged the oldest"),
            ),
            Holder::Nobody => (Trouble::NoGroup, "it has no consumer group".to_owned()),
            Holder::Crowd => (Trouble::Full, "it has too many consumer groups".to_owned()),
            Holder::Silence => return None,
        };
        let message = format!("stream \"{stream}\" has {max_len} entries, its max_len, and {reason}");
        Some(Failure::of(trouble, message))
    }
}

impl Watched {
    fn take(&mut self, surveyed: &Surveyed, policy: Option<Policy>, last: u64, now: Now, left_out: &mut Vec<LeftOut>) {
        self.is_unaskable = surveyed.failure.as_ref().is_some_and(|f| f.class == Class::Event);
        if surveyed.failure.is_some() {
            self.is_settled = self.is_unaskable;
            return;
        }
        self.length = Some(surveyed.length);
        self.sent = self.sent_behind;
        let Some(policy) = policy else {
            return;
        };
        if surveyed.is_trimmed {
            self.trimmed = self.goal.take().map(|(trim, _)| trim);
        }
        self.note_stalled(surveyed, now);
        let stalled = &self.stalled;
        let silent_for = |group: &Group| {
            let Stalled { silent, .. } = stalled.iter().find(|stalled| stalled.name == group.name)?;
            Some(group.idle.map_or(*silent, |idle| idle.min(*silent)))
        };
        let verdict = judge(surveyed, policy.max_len, policy.silence, silent_for);
        self.holder = Some(verdict.holder);
        // Repeating the same trim would remove nothing, except for a stream that is trimmed to a length.
        let is_new = |trim: &Trim| matches!(trim, Trim::To { .. }) || self.trimmed.as_ref() != Some(trim);
        self.goal = verdict.trim.filter(is_new).map(|trim| (trim, last));
        self.is_settled = surveyed.length <= 1 && self.sent == 0;
        left_out.extend(verdict.left_out.into_iter().map(|(group, silent)| LeftOut {
            stream: surveyed.stream.clone(),
            group,
            silent,
        }));
    }

    /// Notes for how long each group has had something to do but done nothing.
    fn note_stalled(&mut self, surveyed: &Surveyed, now: Now) {
        let seen_at = self.seen_at.replace(now).unwrap_or(now);
        let since_then = now.saturating_sub(seen_at).min(PATIENCE);
        let has_work = |group: &&Group| group.pending > 0 || group.unread(surveyed.length) != Some(0);
        let known = std::mem::take(&mut self.stalled);
        let stalled = surveyed.groups.iter().filter(has_work).map(|group| {
            let at = (group.last_delivered, group.pending, group.oldest_pending);
            let before = known.iter().find(|known| known.name == group.name && known.at == at);
            Stalled {
                name: group.name.clone(),
                at,
                silent: before.map_or(Duration::ZERO, |before| before.silent + since_then),
            }
        });
        self.stalled = stalled.collect();
    }
}

/// The failure if Redis does not allow, or does not know, a command that trimming needs.
fn denied(failure: &Failure) -> Failure {
    // In a script, before Redis 7.2.
    let is_denied = |words| failure.message.contains(words);
    let trouble = match failure.message.starts_with("NOPERM") || is_denied("user executing the script can't run") {
        true => Trouble::TrimDenied,
        false => Trouble::TrimUnknown,
    };
    Failure::of(trouble, &failure.message)
}

#[cfg(test)]
mod tests;
