//! Decides what may be trimmed of a stream, given what its groups have acknowledged.

use crate::consumers::group::{EntryId, Group, GroupName, Surveyed};
use std::time::Duration;

/// If no group counts, a stream is trimmed when more than this part of `max_len` is used.
const KEPT_QUARTERS: i64 = 3;

/// How a stream is to be trimmed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trim {
    /// Entries before this one are removed. All groups except those that are `left_out` must have acknowledged them.
    Before { id: EntryId, left_out: Vec<Silent> },
    /// The oldest entries are removed until this many are left. All groups must be `left_out`.
    To { length: i64, left_out: Vec<Silent> },
}

impl Trim {
    /// The same, but it leaves the newest `sent` entries, of which the last batch may be one.
    pub(super) fn keeping(&self, sent: i64) -> Self {
        match self {
            Self::To { length, left_out } => Self::To {
                length: sent.max(*length),
                left_out: left_out.clone(),
            },
            Self::Before { .. } => self.clone(),
        }
    }
}

/// A group that does not count as long as it does not move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silent {
    pub name: Vec<u8>,
    pub last_delivered: EntryId,
    pub pending: i64,
}

/// What may be trimmed of a stream, and which groups keep the rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// `None`: nothing may be trimmed.
    pub trim: Option<Trim>,
    /// The groups that keep the entries that may not be trimmed.
    pub holder: Holder,
    /// Groups that do not count because they have been silent for too long, and for how long.
    pub left_out: Vec<(GroupName, Duration)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This group has acknowledged less than all others.
    Group(GroupName),
    /// The stream has no group.
    Nobody,
    /// There are too many groups to examine.
    Crowd,
    /// All groups were left out.
    Silence,
}

/// Judges a stream. `silence`: how long a group may be silent before it is left out; `silent_for`: how long a group has
/// been silent. `max_len` 0: unlimited.
pub fn judge(
    stream: &Surveyed,
    max_len: i64,
    silence: Option<Duration>,
    silent_for: impl Fn(&Group) -> Option<Duration>,
) -> Verdict {
    let nothing = |holder| Verdict {
        trim: None,
        holder,
        left_out: Vec::new(),
    };
    if stream.has_more_groups {
        return nothing(Holder::Crowd);
    }
    if stream.groups.is_empty() {
        return nothing(Holder::Nobody);
    }
    // A group that was set ahead of the stream's end has not acknowledged what is still to come.
    let acknowledged = |group: &Group| group.acknowledged().min(stream.last.unwrap_or_default());
    let (mut left_out, mut names) = (Vec::new(), Vec::new());
    let mut lowest: Option<&Group> = None;
    for group in &stream.groups {
        match silence.zip(silent_for(group)) {
            Some((most, silent)) if silent > most => {
                let GroupName::Known(name) = &group.name else {
                    // A script in Redis could not distinguish it from the other groups.
                    return nothing(Holder::Group(group.name.clone()));
                };
                names.push(Silent {
                    name: name.clone(),
                    last_delivered: group.last_delivered,
                    pending: group.pending,
                });
                left_out.push((group.name.clone(), silent));
            }
            _ if lowest.is_none_or(|lowest| acknowledged(group) < acknowledged(lowest)) => lowest = Some(group),
            _ => {}
        }
    }
    let (trim, holder) = match lowest {
        Some(group) => {
            let trim = Trim::Before {
                id: acknowledged(group),
                left_out: names,
            };
            let is_of_use = acknowledged(group) > EntryId::FIRST;
            (is_of_use.then_some(trim), Holder::Group(group.name.clone()))
        }
        None => {
            // No group counts that could lose entries. So the stream makes room for new entries, but no more than
            // needed.
            let length = (max_len / 4 * KEPT_QUARTERS).max(1);
            let trim = Trim::To {
                length,
                left_out: names,
            };
            let is_of_use = max_len > 0 && stream.length >= max_len;
            (is_of_use.then_some(trim), Holder::Silence)
        }
    };
    Verdict { trim, holder, left_out }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    /// A group in which no consumer has read for this many seconds.
    fn group(name: &str, last: u64, oldest_pending: Option<u64>, idle_s: u64) -> Group {
        Group {
            idle: Some(Duration::from_secs(idle_s)),
            ..samples::group(name, last, oldest_pending)
        }
    }

    /// Its last entry was number 100 of its millisecond.
    fn stream(length: i64, groups: Vec<Group>) -> Surveyed {
        Surveyed {
            length,
            last: Some(EntryId { ms: 1, seq: 100 }),
            groups,
            ..Surveyed::of("s".into())
        }
    }

    fn judged(stream: &Surveyed, silence_s: Option<u64>) -> Verdict {
        judge(stream, 100, silence_s.map(Duration::from_secs), |g| g.idle)
    }

    fn silent(name: &str, last: u64) -> Silent {
        Silent {
            name: name.into(),
            last_delivered: EntryId { ms: 1, seq: last },
            pending: 0,
        }
    }

    fn before(seq: u64, left_out: &[Silent]) -> Option<Trim> {
        let left_out = left_out.to_vec();
        let id = EntryId { ms: 1, seq };
        Some(Trim::Before { id, left_out })
    }

    fn of(name: &str) -> Holder {
        Holder::Group(GroupName::Known(name.into()))
    }

    #[test]
    fn the_slowest_group_decides() {
        for (groups, trim, holder) in [
            (vec![group("a", 9, None, 0)], before(9, &[]), of("a")),
            (vec![group("a", 9, Some(4), 0)], before(4, &[]), of("a")),
            (
                vec![group("a", 9, None, 0), group("b", 7, None, 0)],
                before(7, &[]),
                of("b"),
            ),
            (
                vec![group("a", 9, Some(3), 0), group("b", 7, None, 0)],
                before(3, &[]),
                of("a"),
            ),
            // A group that was set back after it had read more.
            (vec![group("a", 2, Some(5), 0)], before(2, &[]), of("a")),
        ] {
            let verdict = judged(&stream(50, groups), None);
            assert_eq!((verdict.trim, verdict.holder), (trim, holder));
        }
    }

    #[test]
    fn a_stream_without_groups_keeps_all_entries() {
        let verdict = judged(&stream(1_000, Vec::new()), Some(1));
        assert_eq!((verdict.trim, verdict.holder), (None, Holder::Nobody));
    }

    #[test]
    fn a_group_that_has_read_nothing_keeps_all_entries() {
        let fresh = Group {
            last_delivered: EntryId::FIRST,
            ..group("b", 0, None, 0)
        };
        let verdict = judged(&stream(50, vec![group("a", 9, None, 0), fresh]), None);
        assert_eq!((verdict.trim, verdict.holder), (None, of("b")));
    }

    #[test]
    fn a_group_with_unknown_progress_keeps_all_entries() {
        let unknown = Group {
            pending: 3,
            ..group("b", 9, None, 0)
        };
        assert_eq!(judged(&stream(50, vec![unknown]), None).trim, None);
        let nameless = Group {
            name: GroupName::TooLong(500),
            ..group("", 9, None, 100)
        };
        let others = vec![group("a", 9, None, 0), nameless];
        assert_eq!(judged(&stream(50, others), Some(10)).trim, None);
        let crowd = Surveyed {
            has_more_groups: true,
            ..stream(50, vec![group("a", 9, None, 0)])
        };
        assert_eq!(judged(&crowd, None).holder, Holder::Crowd);
        assert_eq!(judged(&crowd, None).trim, None);
    }

    #[test]
    fn a_group_ahead_of_the_end_has_acknowledged_no_entry_to_come() {
        let ahead = Group {
            last_delivered: EntryId { ms: 2, seq: 0 },
            ..group("a", 9, None, 0)
        };
        let alone = stream(50, vec![ahead.clone()]);
        assert_eq!(judged(&alone, None).trim, before(100, &[]));
        let with_another = stream(50, vec![ahead.clone(), group("b", 7, None, 0)]);
        assert_eq!(judged(&with_another, None).trim, before(7, &[]));
        let unknown = Surveyed { last: None, ..alone };
        assert_eq!(judged(&unknown, None).trim, None);
    }

    #[test]
    fn silent_groups_are_left_out_if_the_policy_allows() {
        let groups = vec![group("a", 9, None, 1), group("b", 2, None, 11)];
        assert_eq!(judged(&stream(50, groups.clone()), None).trim, before(2, &[]));
        assert_eq!(judged(&stream(50, groups.clone()), Some(11)).trim, before(2, &[]));
        let verdict = judged(&stream(50, groups), Some(10));
        assert_eq!((verdict.trim, verdict.holder), (before(9, &[silent("b", 2)]), of("a")));
        assert_eq!(
            verdict.left_out,
            [(GroupName::Known(b"b".to_vec()), Duration::from_secs(11))]
        );
    }

    #[test]
    fn a_full_stream_with_only_silent_groups_makes_room() {
        let groups = vec![group("a", 9, None, 20), group("b", 2, None, 20)];
        assert_eq!(judged(&stream(99, groups.clone()), Some(10)).trim, None);
        let left_out = vec![silent("a", 9), silent("b", 2)];
        let trim = Some(Trim::To { length: 75, left_out });
        assert_eq!(judged(&stream(100, groups.clone()), Some(10)).trim, trim);
        let unlimited = judge(&stream(100, groups), 0, Some(Duration::from_secs(10)), |g| g.idle);
        assert_eq!((unlimited.trim, unlimited.holder), (None, Holder::Silence));
    }
}
