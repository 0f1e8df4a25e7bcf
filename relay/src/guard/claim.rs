//! Whether a guard may be claimed, and from where its new owner goes on: decisions alone.
//!
//! A live owner is never robbed, and an owner who is silent, or has left, is followed by its heirs alone:
//!
//! - Who has been owner before, in the same place, claims at once: it was restarted.
//! - The same data directory after the machine was started again, a streaming standby that was promoted since, and a server that
//!   pg_upgrade has made of the owner's first watch whether the owner still refreshes the guard, unless that says that he has left.
//! - Everybody else who has the owner's history (a base backup, a snapshot, a recovery to a target) is a copy. Silence proves nothing to it:
//!   it waits for `outbox.take_over()`, as does whoever does not know the owner. (The setting outbox_relay.take_over makes heirs of all
//!   that know him.)
//!
//! pg_upgrade of a copy cannot be told from pg_upgrade of the owner.

use crate::failure::{Failure, Trouble};
use crate::guard::epoch::epoch_of;
use crate::guard::place::{self, Likeness};
use crate::guard::{Guard, Reach};
use crate::time::Now;
use std::time::Duration;

/// So many refreshes must be missed before an owner counts as gone.
const MISSED_BEATS: u32 = 3;
/// The same, after nobody may have reached Redis for a while: its owner may wait longer than we did before it tries again.
const MISSED_AFTER_OUTAGE: u32 = 12;
/// A look that comes so much later than two refreshes after the one before it comes after an outage, too.
const LATE_LOOK: Duration = Duration::from_secs(1);

/// `on_missing_guard`: Redis lost everything, the guard too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMissing {
    /// Go on with what has not been sent.
    Continue,
    /// Wait for `outbox.take_over()`.
    Halt,
    /// Send again all that is retained.
    Replay,
}

/// What we know of the incarnation that a guard names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Incarnation {
    /// This run of this server.
    Current,
    /// An earlier one of our history, which ended at this position of the WAL and before transaction `next_xid`.
    Earlier { ended: u64, next_xid: u64 },
    /// Nobody we know.
    Unknown,
}

/// Who judges.
pub struct Claimant<'a> {
    /// Of the guard's incarnation.
    pub incarnation: Incarnation,
    pub system: &'a str,
    pub place: &'a str,
    /// The timeline that this data directory was promoted to, as a standby that had streamed; 0: it never was.
    pub promoted_to: u32,
    /// Whoever knows the owner may follow him.
    pub anybody: bool,
    /// This database is a copy of the one that relayed, and nobody has said that it is to go on.
    pub copy: bool,
    /// It sends nothing now: what is its own it keeps, and nothing else does it claim.
    pub paused: bool,
    /// The last batch that is known to be appended; 0: it has never been the owner.
    pub number: u64,
    pub reach: Reach,
    pub on_missing: OnMissing,
    /// Somebody asked for it.
    pub take_over: bool,
    /// Events of a dump have come.
    pub restored: bool,
    /// The latest transaction that has brought some which were looked for; 0: none has.
    pub last_restore: u64,
}

/// From where the new owner goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Where it stood.
    Own,
    /// At the guard's position: batches were appended that it has not heard of.
    Adopt,
    /// At the guard's position: Redis has lost batches that it had acknowledged. Unless its last batch was `heard` of for sure, at the
    /// previous position, leaving out those events of that batch that stand in the streams. If events of a dump have come since
    /// (`restored`), of all events.
    Heal { heard: bool, restored: bool },
    /// Where it stood (unfinished: at the guard's previous position), leaving out events that stand in the streams already.
    Compare(Why),
    /// At the beginning of what is retained.
    Replay,
}

/// Why event ids are to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// There is no guard.
    Missing,
    /// The guard's position lies beyond our history.
    OtherHistory,
    /// Whoever began to compare did not come to an end.
    Unfinished,
    /// Events of a dump have come, of which some may have been sent since it was taken.
    Restored,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Claim(Start),
    /// The guard says of itself that it is of our history, but this field of it can't be.
    Disbelieve(&'static str),
    /// Look again after this long; zero: as after any failure.
    Wait {
        failure: Failure,
        retry_after: Duration,
    },
}

/// What is remembered of a guard that is being watched.
#[derive(Default)]
pub struct Watch {
    seen: Option<Sighting>,
    /// It has moved under our eyes.
    moved: bool,
    /// Refreshes that must be missed.
    missable: u32,
}

struct Sighting {
    mark: (String, u64, u64),
    interval: Duration,
    since: Now,
    looked_at: Now,
    /// Redis could not be reached since then.
    interrupted: bool,
}

impl Watch {
    /// Redis cannot be reached, perhaps by nobody: silence says nothing.
    pub fn interrupt(&mut self) {
        if let Some(seen) = &mut self.seen {
            seen.interrupted = true;
        }
    }

    /// For how much longer the guard must not move.
    fn look(&mut self, guard: &Guard, now: Now) -> Duration {
        let mark = (guard.token.clone(), guard.number, guard.beat);
        let gap = guard.interval * 2 + LATE_LOOK;
        let mut since = now;
        match &self.seen {
            Some(seen) if seen.mark != mark => (self.moved, self.missable) = (true, MISSED_BEATS),
            // What was not looked at says nothing.
            Some(seen) if seen.interrupted || now > seen.looked_at + gap => self.missable = MISSED_AFTER_OUTAGE,
            Some(seen) => since = seen.since,
            None => self.missable = MISSED_BEATS,
        }
        let looked_at = now;
        let interval = guard.interval;
        self.seen = Some(Sighting {
            mark,
            interval,
            since,
            looked_at,
            interrupted: false,
        });
        (interval * self.missable).saturating_sub(now - since)
    }

    /// The guard is missing, and somebody else owned it, who is to come first: how often to look meanwhile, and for how long.
    fn misses(&self, now: Now) -> Option<(Duration, Duration)> {
        let seen = self.seen.as_ref()?;
        let rest = (seen.interval * MISSED_AFTER_OUTAGE).saturating_sub(now.saturating_sub(seen.looked_at));
        (!rest.is_zero()).then_some((seen.interval, rest))
    }
}

/// What the judge is to the guard's owner.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kinship {
    /// The same.
    Owner,
    /// May follow, once the owner is gone.
    Heir,
    Stranger,
}

fn kinship(guard: &Guard, us: &Claimant<'_>) -> Kinship {
    let likeness = place::compare(&guard.place, us.place);
    match us.incarnation {
        Incarnation::Current => Kinship::Owner,
        Incarnation::Earlier { .. } if likeness == Likeness::Same => Kinship::Owner,
        Incarnation::Earlier { .. } if us.copy => Kinship::Stranger,
        Incarnation::Earlier { .. } if likeness == Likeness::Rebooted => Kinship::Heir,
        Incarnation::Earlier { .. } if us.paused => Kinship::Stranger,
        Incarnation::Earlier { .. } if us.promoted_to > guard.timeline || us.anybody => Kinship::Heir,
        // A base backup keeps its identifier.
        Incarnation::Earlier { .. } if guard.system != us.system => Kinship::Heir,
        Incarnation::Earlier { .. } | Incarnation::Unknown => Kinship::Stranger,
    }
}

/// Judges the guard that was read at `now`.
pub fn judge(guard: Option<&Guard>, us: &Claimant<'_>, watch: &mut Watch, now: Now) -> Decision {
    let Some(guard) = guard else {
        return judge_missing(us, watch, now);
    };
    let kinship = kinship(guard, us);
    if kinship == Kinship::Owner || us.take_over || (guard.released && kinship == Kinship::Heir) {
        return claim(guard, us, watch);
    }
    let rest = watch.look(guard, now);
    if kinship == Kinship::Stranger {
        return Decision::Wait {
            failure: fenced(guard),
            retry_after: guard.interval,
        };
    }
    if rest.is_zero() {
        return claim(guard, us, watch);
    }
    let failure = match watch.moved {
        true => fenced(guard),
        false => Failure::backend(format!(
            "watching whether its former owner still lives: {}",
            guard.place
        )),
    };
    Decision::Wait {
        failure,
        retry_after: guard.interval.min(rest),
    }
}

fn claim(guard: &Guard, us: &Claimant<'_>, watch: &mut Watch) -> Decision {
    *watch = Watch::default();
    let is_current = us.incarnation == Incarnation::Current;
    match (start(guard, us), guard.beyond(&us.reach, is_current)) {
        // Nothing that it says is gone by.
        (start @ Start::Compare(Why::OtherHistory), _) => Decision::Claim(start),
        (_, Some(field)) => Decision::Disbelieve(field),
        (start, None) => Decision::Claim(start),
    }
}

fn judge_missing(us: &Claimant<'_>, watch: &mut Watch, now: Now) -> Decision {
    let waits = |trouble, text: &str, retry_after| Decision::Wait {
        failure: Failure::of(trouble, text),
        retry_after,
    };
    if us.copy && !us.take_over {
        let text = "its guard is missing, and this server is a copy of the one that relayed";
        return waits(Trouble::Copied, text, Duration::ZERO);
    }
    if us.paused {
        return waits(Trouble::GuardMissing, "its guard is missing", Duration::ZERO);
    }
    if let Some((interval, rest)) = watch.misses(now).filter(|_| !us.take_over) {
        return Decision::Wait {
            failure: Failure {
                trouble: Trouble::GuardMissing,
                ..Failure::backend("its guard is missing, and belonged to another server, which is waited for")
            },
            retry_after: interval.min(rest),
        };
    }
    *watch = Watch::default();
    missing(us)
}

fn missing(us: &Claimant<'_>) -> Decision {
    match us.on_missing {
        _ if us.number == 0 => Decision::Claim(own(us)),
        OnMissing::Halt if !us.take_over => Decision::Wait {
            failure: Failure::of(
                Trouble::GuardMissing,
                "its guard is missing: Redis has lost its data, or stands for another",
            ),
            retry_after: Duration::ZERO,
        },
        OnMissing::Replay => Decision::Claim(Start::Replay),
        OnMissing::Continue | OnMissing::Halt => Decision::Claim(Start::Compare(Why::Missing)),
    }
}

fn own(us: &Claimant<'_>) -> Start {
    match us.restored {
        true => Start::Compare(Why::Restored),
        false => Start::Own,
    }
}

fn fenced(guard: &Guard) -> Failure {
    Failure::of(
        Trouble::Fenced,
        format!(
            "it belongs to the server at {} (system {}, timeline {})",
            guard.place, guard.system, guard.timeline
        ),
    )
}

fn start(guard: &Guard, us: &Claimant<'_>) -> Start {
    let is_ours = match us.incarnation {
        Incarnation::Current => true,
        // WAL positions of another system mean nothing here (pg_upgrade has made a new one): equal numbers must do.
        Incarnation::Earlier { .. } if guard.system != us.system => guard.number == us.number,
        // Where the server has lost its WAL (pg_resetwal), the WAL goes on further ahead, and ids of transactions are used again.
        Incarnation::Earlier { ended, next_xid } => {
            guard.wal <= ended && guard.position.newest().snapshot.xmax() <= next_xid
        }
        Incarnation::Unknown => false,
    };
    if !is_ours {
        return Start::Compare(Why::OtherHistory);
    }
    if guard.compares {
        return Start::Compare(Why::Unfinished);
    }
    // What a dump has brought since may be the same events as those that the guard has passed, with new numbers.
    let restored = us.last_restore > 0 && !guard.position.from.snapshot.sees(us.last_restore);
    match guard.number.cmp(&us.number) {
        std::cmp::Ordering::Equal if restored => Start::Compare(Why::Restored),
        std::cmp::Ordering::Equal => own(us),
        std::cmp::Ordering::Greater if restored => Start::Compare(Why::Unfinished),
        std::cmp::Ordering::Greater => Start::Adopt,
        // Of an earlier epoch may be what Redis comes back with after it has lost it, and after that was healed.
        std::cmp::Ordering::Less => Start::Heal {
            heard: epoch_of(guard.number) == epoch_of(us.number),
            restored,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reading::range::Position;

    const INTERVAL: Duration = Duration::from_secs(5);
    const EARLIER: Incarnation = Incarnation::Earlier {
        ended: 100,
        next_xid: 1_000,
    };

    fn heal(heard: bool) -> Start {
        Start::Heal { heard, restored: false }
    }

    fn guard() -> Guard {
        Guard {
            token: "t".into(),
            incarnation: "i".into(),
            system: "1".into(),
            timeline: 1,
            place: "here".into(),
            interval: INTERVAL,
            beat: 0,
            released: false,
            number: 7,
            position: Position::beginning(),
            previous: Position::beginning(),
            again: Vec::new(),
            compares: false,
            wal: 100,
            total: 0,
        }
    }

    const REACH: Reach = Reach {
        next_xid: 1_000,
        highest_seq: 100,
        wal: 200,
        epoch: 1,
        total: 50,
    };

    fn us(incarnation: Incarnation) -> Claimant<'static> {
        Claimant {
            reach: REACH,
            incarnation,
            system: "1",
            place: "here",
            promoted_to: 0,
            anybody: false,
            copy: false,
            paused: false,
            number: 7,
            on_missing: OnMissing::Continue,
            take_over: false,
            restored: false,
            last_restore: 0,
        }
    }

    fn promoted() -> Claimant<'static> {
        Claimant {
            place: "there",
            promoted_to: 2,
            ..us(EARLIER)
        }
    }

    fn once(guard: Option<&Guard>, us: &Claimant<'_>) -> Decision {
        judge(guard, us, &mut Watch::default(), Now::ZERO)
    }

    #[test]
    fn the_numbers_say_who_is_behind() {
        for (number, start) in [(6, Start::Adopt), (7, Start::Own), (8, heal(true))] {
            let us = Claimant {
                number,
                ..us(Incarnation::Current)
            };
            assert_eq!(once(Some(&guard()), &us), Decision::Claim(start));
        }
    }

    #[test]
    fn a_guard_of_our_history_that_says_what_cannot_be_is_not_believed() {
        let position = |text: &str| text.parse::<Position>().unwrap();
        type Forge = Box<dyn Fn(&mut Guard)>;
        let forge = |f: fn(&mut Guard)| -> Forge { Box::new(f) };
        let at = |text: &'static str| -> Forge { Box::new(move |g| g.position = position(text)) };
        let before = |text: &'static str| -> Forge { Box::new(move |g| g.previous = position(text)) };
        let forged: [(Forge, Option<&str>); 16] = [
            (at("900:1000:/1000/100/100"), None),
            (at("900:1001:/1000/100/100"), Some("position")),
            (at("900:1000:/1001/100/100"), Some("position")),
            (at("900:1000:/1000/101/101"), Some("position")),
            (at("900:1000:/1000/100/101"), Some("position")),
            (at("10:20:/20/1/2>900:1001:/1000/3/4@3"), Some("position")),
            (at("10:20:/20/1/2>30:30:/30/3/4@101"), Some("position")),
            (before("900:1000:/1000/100/100"), None),
            (before("900:1001:/1000/100/100"), Some("previous")),
            (forge(|g| g.wal = 200), None),
            (forge(|g| g.wal = 201), Some("wal")),
            (forge(|g| g.number = (2 << 40) - 1), None),
            (forge(|g| g.number = 2 << 40), Some("number")),
            (forge(|g| g.total = 151), Some("total")),
            (forge(|g| g.again = vec![100, 101]), Some("again")),
            (forge(|g| g.again = vec![100]), None),
        ];
        for (index, (forge, field)) in forged.into_iter().enumerate() {
            let mut guard = guard();
            forge(&mut guard);
            let expected = |start| field.map_or(Decision::Claim(start), Decision::Disbelieve);
            let decision = once(Some(&guard), &us(Incarnation::Current));
            let start = if guard.number > 7 { Start::Adopt } else { Start::Own };
            assert_eq!(decision, expected(start), "{index}");
            // Whose history is not ours may have come further.
            let told = Claimant {
                take_over: true,
                ..us(Incarnation::Unknown)
            };
            let compares = Decision::Claim(Start::Compare(Why::OtherHistory));
            assert_eq!(once(Some(&guard), &told), compares, "{index}");
        }
        // A server that has lost its cursors knows neither total nor epoch.
        let lost = Claimant {
            number: 0,
            reach: Reach {
                epoch: 0,
                total: 0,
                ..REACH
            },
            ..us(Incarnation::Current)
        };
        for (number, decision) in [
            (9 << 40, Decision::Claim(Start::Adopt)),
            (i64::MAX as u64, Decision::Disbelieve("number")),
        ] {
            let guard = Guard {
                number,
                total: 1_000,
                ..guard()
            };
            assert_eq!(once(Some(&guard), &lost), decision);
        }
    }

    #[test]
    fn of_a_batch_of_another_epoch_nothing_is_known() {
        let us = Claimant {
            number: (1 << 40) + 1,
            ..us(Incarnation::Current)
        };
        let heals = Decision::Claim(heal(false));
        assert_eq!(once(Some(&guard()), &us), heals);
    }

    #[test]
    fn a_position_beyond_our_history_is_not_believed() {
        let next_xid = guard().position.newest().snapshot.xmax();
        for (ended, next_xid, start) in [
            (100, next_xid, Start::Own),
            (99, next_xid, Start::Compare(Why::OtherHistory)),
            (100, next_xid - 1, Start::Compare(Why::OtherHistory)),
        ] {
            let decision = once(Some(&guard()), &us(Incarnation::Earlier { ended, next_xid }));
            assert_eq!(decision, Decision::Claim(start));
        }
    }

    #[test]
    fn a_promoted_standby_watches_three_refreshes() {
        let (mut watch, elsewhere) = (Watch::default(), promoted());
        let mut at = |seconds, guard: &Guard| judge(Some(guard), &elsewhere, &mut watch, Duration::from_secs(seconds));
        let is_fenced = |d: Decision| matches!(d, Decision::Wait { failure, .. } if failure.trouble == Trouble::Fenced);
        assert!(!is_fenced(at(0, &guard())));
        assert!(!is_fenced(at(7, &guard())));
        assert!(!is_fenced(at(14, &guard())));
        let moved = Guard { beat: 1, ..guard() };
        assert!(is_fenced(at(14, &moved)));
        assert!(is_fenced(at(21, &moved)));
        assert!(is_fenced(at(28, &moved)));
        assert_eq!(at(29, &moved), Decision::Claim(Start::Own));
    }

    #[test]
    fn while_nobody_looks_no_refresh_is_missed() {
        let (mut watch, elsewhere) = (Watch::default(), promoted());
        let mut waits = |seconds| {
            let decision = judge(Some(&guard()), &elsewhere, &mut watch, Duration::from_secs(seconds));
            matches!(decision, Decision::Wait { .. })
        };
        assert!(waits(0) && waits(10));
        // Redis was away; its owner has up to a minute to come back.
        assert!((100..160).step_by(10).all(&mut waits));
        assert!(!waits(160));
    }

    #[test]
    fn a_stranger_stays_away_until_told() {
        let stranger = us(Incarnation::Unknown);
        assert!(matches!(once(Some(&guard()), &stranger), Decision::Wait { .. }));
        let released = Guard {
            released: true,
            ..guard()
        };
        assert!(matches!(once(Some(&released), &stranger), Decision::Wait { .. }));
        let told = Claimant {
            take_over: true,
            ..stranger
        };
        let compares = Decision::Claim(Start::Compare(Why::OtherHistory));
        assert_eq!(once(Some(&guard()), &told), compares);
    }

    /// Whether it claims at once, and whether it does so after a year of silence.
    fn claims(guard: &Guard, us: &Claimant<'_>) -> (bool, bool) {
        let mut watch = Watch::default();
        let mut at = |days: u64| {
            // It looks all the time.
            let looks = (0..400).map(|look| Duration::from_secs(days * 86_400 + look));
            let mut decisions = looks.map(|now| judge(Some(guard), us, &mut watch, now));
            decisions.any(|decision| matches!(decision, Decision::Claim(_)))
        };
        let at_once = matches!(once(Some(guard), us), Decision::Claim(_));
        (at_once, at(0) || at(365))
    }

    #[test]
    fn only_heirs_follow_an_owner_who_is_silent_or_has_left() {
        const GUARD: &str = "db:/data#1.2.3@boot1";
        const REBOOTED: &str = "db:/data#9.2.3@boot2";
        let silent = Guard {
            place: GUARD.into(),
            ..guard()
        };
        let released = Guard {
            released: true,
            ..silent.clone()
        };
        let earlier = |place| Claimant { place, ..us(EARLIER) };
        let upgraded = Claimant {
            system: "2",
            ..earlier("db:/new#1.7.8@boot1")
        };
        let copied = |us: Claimant<'static>| Claimant { copy: true, ..us };
        let paused = |us: Claimant<'static>| Claimant { paused: true, ..us };
        let anybody = Claimant {
            anybody: true,
            ..us(EARLIER)
        };
        let unknown = Claimant {
            place: GUARD,
            ..us(Incarnation::Unknown)
        };
        for (name, us, when_silent, when_released) in [
            ("a restart", earlier(GUARD), (true, true), true),
            ("a reboot", earlier(REBOOTED), (false, true), true),
            ("a promoted standby", promoted(), (false, true), true),
            ("an upgrade", upgraded, (false, true), true),
            ("anybody", anybody, (false, true), true),
            ("a copy", earlier("db:/copy#1.4.5@boot1"), (false, false), false),
            ("a stranger", unknown, (false, false), false),
            ("a promoted copy", copied(promoted()), (false, false), false),
            ("a paused restart", paused(earlier(GUARD)), (true, true), true),
            ("a paused reboot", paused(earlier(REBOOTED)), (false, true), true),
            ("a paused heir", paused(promoted()), (false, false), false),
        ] {
            let (of_silent, of_released) = (claims(&silent, &us), claims(&released, &us));
            assert_eq!(of_silent, when_silent, "{name}, silent");
            assert_eq!(of_released, (when_released, when_released), "{name}, released");
        }
    }

    #[test]
    fn who_was_promoted_before_the_owner_is_no_heir() {
        let later = Guard {
            timeline: 2,
            released: true,
            ..guard()
        };
        assert!(matches!(once(Some(&later), &promoted()), Decision::Wait { .. }));
    }

    #[test]
    fn a_copy_begins_no_guard_and_neither_does_who_is_paused() {
        for number in [0, 7] {
            let copy = Claimant {
                copy: true,
                number,
                ..us(EARLIER)
            };
            let Decision::Wait { failure, .. } = once(None, &copy) else {
                panic!("it claims at {number}");
            };
            assert_eq!(failure.trouble, Trouble::Copied);
            let told = Claimant {
                take_over: true,
                ..copy
            };
            assert!(matches!(once(None, &told), Decision::Claim(_)));
            let paused = Claimant {
                paused: true,
                number,
                ..us(Incarnation::Current)
            };
            assert!(matches!(once(None, &paused), Decision::Wait { .. }));
        }
    }

    /// Elsewhere the guard's position is to be taken in first.
    #[test]
    fn what_a_dump_has_brought_is_compared_from_the_own_position() {
        let restored = |number| Claimant {
            number,
            restored: true,
            ..us(Incarnation::Current)
        };
        let compares = Decision::Claim(Start::Compare(Why::Restored));
        assert_eq!(once(None, &restored(0)), compares);
        assert_eq!(once(Some(&guard()), &restored(7)), compares);
        assert_eq!(once(Some(&guard()), &restored(6)), Decision::Claim(Start::Adopt));
    }

    #[test]
    fn a_missing_guard_is_news_only_after_the_first_batch() {
        let first = Claimant {
            number: 0,
            ..us(Incarnation::Current)
        };
        assert_eq!(once(None, &first), Decision::Claim(Start::Own));
        for (on_missing, start) in [
            (OnMissing::Continue, Some(Start::Compare(Why::Missing))),
            (OnMissing::Replay, Some(Start::Replay)),
            (OnMissing::Halt, None),
        ] {
            let us = Claimant {
                on_missing,
                ..us(Incarnation::Current)
            };
            match start {
                Some(start) => assert_eq!(once(None, &us), Decision::Claim(start)),
                None => assert!(matches!(once(None, &us), Decision::Wait { .. })),
            }
        }
    }
}
