//! Which server may claim which guard, and where it starts.

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
        own_stream: None,
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
fn batch_numbers_show_which_side_is_behind() {
    for (number, start) in [(6, Start::Adopt), (7, Start::Own), (8, heal(true))] {
        let us = Claimant {
            number,
            ..us(Incarnation::Current)
        };
        assert_eq!(once(Some(&guard()), &us), Decision::Claim(start));
    }
}

#[test]
fn an_impossible_guard_of_our_history_is_not_believed() {
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
        // A server with another history may have come further.
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

/// Redis had lost a batch, and then also the new guard that followed, together with the reply. It came back with the
/// batch, which was adopted under its own number, and now it has come back without it.
#[test]
fn a_batch_of_another_epoch_is_not_known() {
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
fn refreshes_do_not_count_as_missed_while_nobody_looks() {
    let (mut watch, elsewhere) = (Watch::default(), promoted());
    let mut waits = |seconds| {
        let decision = judge(Some(&guard()), &elsewhere, &mut watch, Duration::from_secs(seconds));
        matches!(decision, Decision::Wait { .. })
    };
    assert!(waits(0) && waits(10));
    // Redis was unreachable; its owner has up to a minute to come back.
    assert!((100..160).step_by(10).all(&mut waits));
    assert!(!waits(160));
}

#[test]
fn an_unknown_server_waits_for_a_take_over() {
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

/// Whether it claims at once, and whether it claims after a year of silence.
fn claims(guard: &Guard, us: &Claimant<'_>) -> (bool, bool) {
    let mut watch = Watch::default();
    let mut at = |days: u64| {
        // It looks regularly during these days.
        let looks = (0..400).map(|look| Duration::from_secs(days * 86_400 + look));
        let mut decisions = looks.map(|now| judge(Some(guard), us, &mut watch, now));
        decisions.any(|decision| matches!(decision, Decision::Claim(_)))
    };
    let at_once = matches!(once(Some(guard), us), Decision::Claim(_));
    (at_once, at(0) || at(365))
}

#[test]
fn only_heirs_follow_an_owner_that_is_silent_or_has_left() {
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
fn a_server_promoted_before_the_owner_is_not_an_heir() {
    let later = Guard {
        timeline: 2,
        released: true,
        ..guard()
    };
    assert!(matches!(once(Some(&later), &promoted()), Decision::Wait { .. }));
}

#[test]
fn a_copy_or_a_paused_backend_creates_no_guard() {
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

/// In other cases the guard's position must be adopted first.
#[test]
fn restored_events_are_compared_from_the_own_position() {
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
fn a_missing_guard_matters_only_after_the_first_batch() {
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
