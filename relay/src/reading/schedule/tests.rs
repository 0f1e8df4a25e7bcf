use super::*;
use crate::reading::snapshot::Snapshot;
use fastrand::Rng;

/// The numbers up to which the ticks see everything; the first tick is the beginning of time.
const SEQS: [i64; 4] = [0, 10_000, 300_000, 300_100];

fn ticks() -> Vec<Arc<Tick>> {
    let tick = |(at, seq): (usize, &i64)| match at {
        0 => Tick::beginning(),
        _ => Tick {
            snapshot: Snapshot::new(10 * at as u64, 10 * at as u64, Vec::new()),
            next_xid: 10 * at as u64,
            low_seq: *seq,
            high_seq: *seq,
        },
    };
    SEQS.iter().enumerate().map(tick).map(Arc::new).collect()
}

/// A reader as a row of a table. Ticks are named by their index in [`SEQS`].
#[derive(Clone, Copy, Debug)]
struct Given {
    from: usize,
    /// The number that it has reached on its way; 0: it is not on its way.
    at: i64,
    to: usize,
    role: Role,
    ready: bool,
    well: bool,
    supply: Supply,
}

/// Ready and healthy, with a sender that could run out of work.
const HUNGRY: Given = Given {
    from: 1,
    at: 0,
    to: 2,
    role: Role::Redis,
    ready: true,
    well: true,
    supply: Supply::Low,
};
const FED: Given = Given {
    supply: Supply::Enough,
    ..HUNGRY
};
const FULL: Given = Given {
    supply: Supply::Full,
    ..HUNGRY
};
const DOWN: Given = Given {
    ready: false,
    well: false,
    ..HUNGRY
};
const DELETED: Given = Given {
    role: Role::Deleted,
    well: false,
    ..HUNGRY
};
const STRAYS: Given = Given {
    role: Role::Strays,
    ..DELETED
};
const FINDER: Given = Given {
    role: Role::Finder,
    ..DELETED
};

fn at(at: i64, given: Given) -> Given {
    Given { at, ..given }
}

fn positions(given: &[Given], ticks: &[Arc<Tick>]) -> Vec<Position> {
    let position = |g: &Given| match g.at {
        0 => Position::at(ticks[g.from].clone()),
        at => Position::towards(ticks[g.from].clone(), ticks[g.to].clone(), at),
    };
    given.iter().map(position).collect()
}

fn way<'a>(given: &Given, position: &'a Position, ticks: &'a [Arc<Tick>]) -> Way<'a> {
    Way {
        position,
        goal: position.to(&ticks[given.to]),
        role: given.role,
    }
}

fn readers<'a>(given: &[Given], positions: &'a [Position], ticks: &'a [Arc<Tick>]) -> Vec<Reader<'a>> {
    let reader = |(index, given): (usize, &Given)| Reader {
        index,
        way: way(given, &positions[index], ticks),
        is_ready: given.ready,
        is_well: given.well,
        supply: given.supply,
    };
    given.iter().enumerate().map(reader).collect()
}

fn reading(given: &[Given]) -> Vec<usize> {
    let ticks = ticks();
    let positions = positions(given, &ticks);
    let schedule = Schedule::of(readers(given, &positions, &ticks).into_iter());
    let reading: Vec<usize> = schedule.reading().collect();
    let asked: Vec<usize> = (0..given.len()).filter(|index| schedule.reads(*index)).collect();
    assert_eq!(reading, asked);
    reading
}

/// All groups in the order in which they are taken.
fn groups(given: &[Given]) -> Vec<(Vec<usize>, i64, i64)> {
    let ticks = ticks();
    let positions = positions(given, &ticks);
    let mut waiting: Vec<usize> = (0..given.len()).collect();
    let take = || {
        let group = Group::take(&mut waiting, |index| way(&given[index], &positions[index], &ticks))?;
        Some((group.members, group.from.high_seq, group.last_seq))
    };
    std::iter::from_fn(take).collect()
}

#[test]
fn which_readers_read_now() {
    let nowhere = Given { from: 2, ..HUNGRY };
    let unticked = Given {
        from: 0,
        to: 0,
        ..HUNGRY
    };
    let not_ready = Given { ready: false, ..HUNGRY };
    let elsewhere = Given { to: 3, ..HUNGRY };
    for (what, given, expected) in [
        ("nobody", vec![], vec![]),
        ("a sender that could run dry", vec![HUNGRY], vec![0]),
        ("one that is not ready", vec![not_ready], vec![]),
        ("one that has come to the tick", vec![nowhere], vec![]),
        ("before the first tick", vec![unticked], vec![]),
        ("one with enough to do, alone", vec![FED], vec![0]),
        ("one with little room", vec![FULL], vec![]),
        ("two that stand together", vec![FED, FED], vec![0, 1]),
        ("one ahead lets the other come up", vec![at(12_000, FED), FED], vec![1]),
        (
            "and waits while that has little room",
            vec![at(12_000, FED), FULL],
            vec![],
        ),
        ("or is not ready for a moment", vec![at(12_000, FED), not_ready], vec![]),
        ("but not for one that is down", vec![at(12_000, FED), DOWN], vec![0]),
        (
            "nor for one that goes elsewhere",
            vec![at(12_000, FED), elsewhere],
            vec![0, 1],
        ),
        (
            "nor if its sender could run dry",
            vec![at(12_000, HUNGRY), HUNGRY],
            vec![0, 1],
        ),
        ("one far behind is waited for", vec![at(110_000, FED), HUNGRY], vec![1]),
        ("one further behind is not", vec![at(110_001, FED), HUNGRY], vec![0, 1]),
        (
            "beside one that cannot take rows yet",
            vec![at(12_000, FED), at(12_000, FULL)],
            vec![],
        ),
        (
            "one behind does not wait for one ahead",
            vec![FED, at(12_000, FULL)],
            vec![0],
        ),
        (
            "a deleted backend waits for those behind it",
            vec![at(12_000, DELETED), HUNGRY],
            vec![1],
        ),
        (
            "nobody waits for a deleted backend or for strays",
            vec![at(12_000, FED), DELETED, STRAYS],
            vec![0, 1, 2],
        ),
        (
            "a finder waits for no lane",
            vec![at(12_000, FINDER), HUNGRY, FULL],
            vec![0, 1],
        ),
        ("and nobody for a finder", vec![at(12_000, FED), FINDER], vec![0, 1]),
    ] {
        assert_eq!(reading(&given), expected, "{what}");
    }
}

#[test]
fn which_readers_share_a_scan() {
    let beginner = Given { from: 0, ..HUNGRY };
    let short = Given {
        from: 2,
        to: 3,
        ..HUNGRY
    };
    let (late, later) = (at(500, HUNGRY), at(5_000, HUNGRY));
    for (what, given, expected) in [
        ("nobody", vec![], vec![]),
        (
            "those that stand together",
            vec![HUNGRY, FED],
            vec![(vec![0, 1], 10_000, 0)],
        ),
        (
            "those that stand near each other, from the hindmost",
            vec![at(12_000, HUNGRY), at(11_000, HUNGRY)],
            vec![(vec![0, 1], 10_000, 11_000)],
        ),
        (
            "not those that stand apart: the hindmost first",
            vec![at(12_001, HUNGRY), at(11_000, HUNGRY)],
            vec![(vec![1], 10_000, 11_000), (vec![0], 10_000, 12_001)],
        ),
        (
            "those that have set out from different ticks, by the older tick",
            vec![at(12_000, HUNGRY), at(11_500, beginner)],
            vec![(vec![0, 1], 0, 11_500)],
        ),
        (
            "not if the older one may have late rows before it",
            vec![at(9_900, beginner), HUNGRY],
            vec![(vec![0], 0, 9_900), (vec![1], 10_000, 0)],
        ),
        (
            "of those among late rows, the ones that are near",
            vec![late, later, at(700, HUNGRY)],
            vec![(vec![0, 2], 10_000, 500), (vec![1], 10_000, 5_000)],
        ),
        (
            "a short way comes before a long one",
            vec![HUNGRY, short],
            vec![(vec![1], 300_000, 0), (vec![0], 10_000, 0)],
        ),
        (
            "whoever looks at all rows has a scan of its own",
            vec![STRAYS, HUNGRY],
            vec![(vec![1], 10_000, 0), (vec![0], 10_000, 0)],
        ),
        (
            "except on a short way",
            vec![
                Given {
                    role: Role::Strays,
                    ..short
                },
                short,
            ],
            vec![(vec![0, 1], 300_000, 0)],
        ),
    ] {
        assert_eq!(groups(&given), expected, "{what}");
    }
}

#[test]
fn whether_a_tick_is_of_use() {
    let wish = |number, role, is_lane, wants_tick| Wish {
        number,
        role,
        is_lane,
        wants_tick,
    };
    let finder = wish(1, Role::Finder, false, true);
    for (what, wishes, expected) in [
        (
            "a backend that takes rows",
            vec![wish(1, Role::Redis, false, true)],
            true,
        ),
        ("one that does not", vec![wish(1, Role::Redis, false, false)], false),
        ("a finder without lanes", vec![finder], true),
        (
            "a finder whose lanes are down",
            vec![finder, wish(1, Role::Redis, true, false)],
            false,
        ),
        (
            "a finder beside another's lanes",
            vec![finder, wish(2, Role::Redis, true, false)],
            true,
        ),
        (
            "nobody's events",
            vec![wish(0, Role::Strays, false, true), wish(3, Role::Deleted, false, true)],
            false,
        ),
    ] {
        assert_eq!(is_tick_of_use(wishes.into_iter()), expected, "{what}");
    }
}

fn anybody(rng: &mut Rng) -> Given {
    let roles = [
        Role::Redis,
        Role::Redis,
        Role::Redis,
        Role::Finder,
        Role::Deleted,
        Role::Strays,
    ];
    let from = rng.usize(..3);
    let to = rng.usize(from..4);
    let at = [0, rng.i64(1..30), rng.i64(1..12_000), rng.i64(1..300_000)][rng.usize(..4)];
    Given {
        from,
        at: at.min(SEQS[to]),
        to,
        role: roles[rng.usize(..6)],
        ready: rng.u8(..) < 200,
        well: rng.u8(..) < 200,
        supply: [Supply::Low, Supply::Enough, Supply::Full][rng.usize(..3)],
    }
}

/// The result that [`Schedule`] must have, computed for each reader against each other reader.
fn reading_by_definition(readers: &[Reader<'_>]) -> Vec<usize> {
    let leads_on = |r: &&Reader<'_>| r.way.leads_on();
    let holds = |other: &Reader<'_>, reader: &Reader<'_>| {
        let behind = reader.way.position.place() - other.way.position.place();
        other.index != reader.index
            && other.is_well
            && Arc::ptr_eq(other.way.goal, reader.way.goal)
            && ((1..=WAITED_FOR_SEQS).contains(&behind) || (behind == 0 && !other.takes()))
    };
    let is_held = |reader: &Reader<'_>| readers.iter().filter(leads_on).any(|other| holds(other, reader));
    let reads = |reader: &&Reader<'_>| reader.takes() && (!reader.can_wait() || !is_held(reader));
    readers.iter().filter(leads_on).filter(reads).map(|r| r.index).collect()
}

#[test]
fn no_reader_starves_and_no_sender_runs_dry() {
    let rng = &mut Rng::with_seed(1);
    let ticks = ticks();
    for round in 0..20_000 {
        let given: Vec<Given> = (0..rng.usize(1..9)).map(|_| anybody(rng)).collect();
        let positions = positions(&given, &ticks);
        let readers = readers(&given, &positions, &ticks);
        let reading = reading(&given);
        assert_eq!(reading, reading_by_definition(&readers), "round {round}: {given:?}");
        let on_their_way = || readers.iter().filter(|r| r.way.leads_on());
        for reader in on_their_way().filter(|r| r.is_ready && r.way.role == Role::Redis) {
            let is_urgent = reader.supply == Supply::Low;
            assert!(
                !is_urgent || reading.contains(&reader.index),
                "round {round}: {given:?}"
            );
        }
        // A reader that waits does so for one that reads, or for a healthy one that has more work than room.
        let is_stuck = reading.is_empty() && on_their_way().any(Reader::takes);
        let moves = on_their_way().any(|r| r.is_well && !r.takes());
        assert!(!is_stuck || moves, "round {round}: {given:?}");
    }
}

#[test]
fn each_reader_has_one_scan() {
    let rng = &mut Rng::with_seed(2);
    for round in 0..20_000 {
        let given: Vec<Given> = (0..rng.usize(1..9)).map(|_| anybody(rng)).collect();
        let taken = groups(&given);
        assert!(taken.iter().all(|(members, ..)| !members.is_empty()), "round {round}");
        let mut members: Vec<usize> = taken.into_iter().flat_map(|(members, ..)| members).collect();
        members.sort_unstable();
        assert!(members.into_iter().eq(0..given.len()), "round {round}: {given:?}");
    }
}
