//! Refused streams that wait to be tried again, and a limit on the time that this takes when there are many.
//!
//! One publisher may have a hundred thousand refused streams. Their cost must not grow with their number, and a stream
//! of another publisher must not wait until each of them has had its turn.

use crate::time::Now;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

/// Heads that were refused at least this often are one group: by then the wait between attempts has its full length.
const GROUPS: usize = 16;

/// While more streams wait than one batch tries, failed attempts may take at most this fraction of the time.
const SHARE: u32 = 20;
/// However long attempts took, the next one is not later than this.
const LONGEST_REST: Duration = Duration::from_secs(2);

#[derive(Default)]
pub(super) struct Waiting {
    /// Ordered by how often their heads were refused, then by the time of the next attempt.
    groups: [BTreeSet<(Now, Rc<str>)>; GROUPS],
    count: usize,
    /// Index of the next pick in [`PICKS`].
    pick: usize,
}

/// Which stream to try next.
#[derive(Clone, Copy)]
enum Pick {
    /// The stream that has waited longest.
    Longest,
    /// Among the streams that were refused least often, the one that has waited longest.
    Least,
    /// Among these, the one that came last: the crowd itself may be new.
    Latest,
}

/// In a crowd, each kind has its share of the attempts.
const PICKS: [Pick; 4] = [Pick::Longest, Pick::Least, Pick::Longest, Pick::Latest];

fn group_of(attempts: u32) -> usize {
    (attempts as usize).min(GROUPS - 1)
}

impl Waiting {
    pub(super) fn insert(&mut self, attempts: u32, at: Now, stream: Rc<str>) {
        self.count += usize::from(self.groups[group_of(attempts)].insert((at, stream)));
    }

    pub(super) fn remove(&mut self, attempts: u32, at: Now, stream: &Rc<str>) {
        self.count -= usize::from(self.groups[group_of(attempts)].remove(&(at, stream.clone())));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// When the next one is to be tried.
    pub(super) fn first_at(&self) -> Option<Now> {
        // The usual case must cost nothing: this is called for each backend in each round.
        match self.is_empty() {
            true => None,
            false => self.firsts().map(|(at, _)| *at).min(),
        }
    }

    /// In each group, the stream that has waited longest.
    fn firsts(&self) -> impl Iterator<Item = &(Now, Rc<str>)> {
        self.groups.iter().filter_map(BTreeSet::first)
    }

    /// The stream to try next.
    pub(super) fn next_due(&mut self, now: Now) -> Option<Rc<str>> {
        let is_due = |(at, _): &&(Now, Rc<str>)| *at <= now;
        let next = match PICKS[self.pick % PICKS.len()] {
            Pick::Longest => self.firsts().filter(is_due).min(),
            Pick::Least => self.firsts().find(is_due),
            Pick::Latest => {
                let end = (now + Duration::from_nanos(1), Rc::from(""));
                self.groups.iter().find_map(|group| group.range(..&end).next_back())
            }
        };
        let next = next.map(|(_, stream)| stream.clone())?;
        self.pick = self.pick.wrapping_add(1);
        Some(next)
    }
}

/// The time that attempts may take.
#[derive(Clone, Default)]
pub(super) struct Budget {
    /// When the current attempts began, and how many there are.
    at_hand: Option<(Now, u32)>,
    /// How many of them were refused again.
    refused: u32,
    rests_until: Now,
}

impl Budget {
    /// No head is tried before this time.
    pub(super) fn rests_until(&self) -> Now {
        self.rests_until
    }

    /// This many heads of a crowd are being tried.
    pub(super) fn begin(&mut self, now: Now, count: usize) {
        (self.at_hand, self.refused) = (Some((now, count as u32)), 0);
    }

    pub(super) fn refused(&mut self) {
        self.refused += 1;
    }

    /// The result of the current attempts, if any, is written down.
    pub(super) fn end(&mut self, now: Now) {
        if let Some((began, count)) = self.at_hand.take() {
            let took = now.saturating_sub(began) * self.refused.min(count) / count.max(1);
            self.rests_until = now + (took * (SHARE - 1)).min(LONGEST_REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::flight::BatchedEvent;
    use crate::delivery::refusal::{Record, Streams};
    use crate::failure::{Class, Failure};

    const MS: Duration = Duration::from_millis(1);

    fn refuse(streams: &mut Streams, stream: &Rc<str>, again: bool, now: Now) -> Record {
        let entry = BatchedEvent {
            seq: 1,
            stream: stream.clone(),
            max_attempts: 1_000,
            committed_after_us: 0,
        };
        let failure = Failure::new(Class::Event, "NOPERM");
        streams.refused(&entry, again, &failure, now, |_| Duration::ZERO)
    }

    fn crowd(count: usize) -> Streams {
        Streams::waiting((0..count).map(|n| (format!("crowd{n}"), 20)))
    }

    /// A crowd whose heads were all refused once.
    fn new_crowd(count: usize) -> Streams {
        Streams::waiting((0..count).map(|n| (format!("crowd{n}"), 1)))
    }

    /// All streams of the crowd are always due.
    #[test]
    fn a_newly_refused_stream_does_not_wait_for_a_crowd() {
        for mut streams in [crowd(10_000), new_crowd(10_000)] {
            let newcomer: Rc<str> = "newcomer".into();
            refuse(&mut streams, &newcomer, false, MS);
            let due = streams.due(MS, 4, 100);
            assert!(due.iter().any(|retry| retry.stream == newcomer), "{due:?}");
            assert!(due.iter().any(|retry| retry.stream.starts_with("crowd")));
        }
    }

    #[test]
    fn refused_attempts_of_a_crowd_take_a_twentieth_of_the_time() {
        let (mut streams, mut now, mut tried) = (crowd(10_000), Now::ZERO, Duration::ZERO);
        while now < Duration::from_secs(10) {
            let due = streams.due(now, 100, 100);
            if due.is_empty() {
                now = streams.next_retry_at().expect("they wait");
                continue;
            }
            (now, tried) = (now + 10 * MS, tried + 10 * MS);
            for retry in due {
                refuse(&mut streams, &retry.stream, true, now);
            }
            streams.retried(now);
        }
        assert!((now / 25..now / 15).contains(&tried), "{tried:?} of {now:?}");
    }

    #[test]
    fn accepted_heads_and_a_few_refused_ones_need_no_rest() {
        for (count, is_accepted) in [(10_000, true), (50, false)] {
            let mut streams = crowd(count);
            for retry in streams.due(MS, 100, 100) {
                let entry = BatchedEvent {
                    seq: 1,
                    stream: retry.stream.clone(),
                    max_attempts: 1_000,
                    committed_after_us: 0,
                };
                match is_accepted {
                    true => drop(streams.accepted(&entry, true)),
                    false => drop(refuse(&mut streams, &retry.stream, true, 2 * MS)),
                }
            }
            streams.retried(11 * MS);
            assert!(!streams.due(11 * MS, 100, 100).is_empty(), "{count}");
        }
    }

    #[test]
    fn streams_beyond_the_memory_limit_have_one_attempt() {
        let mut streams = Streams::default();
        let name = |n: usize| -> Rc<str> { format!("{n:01000}").into() };
        let mut count = 0;
        while matches!(refuse(&mut streams, &name(count), false, MS), Record::Park { .. }) {
            count += 1;
        }
        assert!((25_000..30_000).contains(&count), "{count}");
        assert!(!streams.is_blocked(&name(count)));
        assert!(matches!(refuse(&mut streams, &name(0), false, MS), Record::Park { .. }));
        streams.cleared(&name(0));
        assert!(matches!(
            refuse(&mut streams, &name(count), false, MS),
            Record::Park { .. }
        ));
    }
}
