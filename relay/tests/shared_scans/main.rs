//! Readers that share scans, against a model of Postgres, over random schedules: the schedule decides who reads and
//! with whom, the cutter gives each reader its rows. Even if readers are slow, hang or are far behind, each reader gets
//! its rows once and in order, and none starves.

#[path = "../model/mod.rs"]
mod model;
mod paused;
mod rows;
mod sweep;

use model::{Database, Rng, caught, for_each_seed, likely};
use relay::delivery::backoff::Backoff;
use relay::delivery::batch::BuiltBatch;
use relay::delivery::cut::{Backends, Collector, Limits, Pass};
use relay::delivery::refusal::{Record, Streams};
use relay::delivery::{Cursor, Delivery, Guarantee};
use relay::reading::deleted;
use relay::reading::range::{Key, Position};
use relay::reading::role::Role;
use relay::reading::schedule::{self, Group, Schedule, Way};
use relay::reading::snapshot::Tick;
use relay::time::Now;
use rows::ScannedRows;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

const STREAMS: u8 = 6;
/// The backend of a cluster, each of whose streams has its own hash slot.
const CLUSTER: i32 = 3;
const DELETED: i32 = 4;
/// Nobody knows this one at first.
const UNKNOWN: i32 = 5;

/// The number of the backend that a row is for.
fn number(stream: u8) -> i32 {
    [1, 2, CLUSTER, CLUSTER, DELETED, UNKNOWN][usize::from(stream)]
}

fn hash_slot(stream: u8) -> u16 {
    u16::from(stream)
}

/// Whether a row cannot be read.
fn is_damaged(seq: i64) -> bool {
    seq % 31 == 7
}

/// A fault that is put into the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// A scan begins at the foremost of its readers,
    ScansFromAhead,
    /// or at the newest of their ticks.
    ScansFromNewest,
    /// One scan serves all readers, wherever they go.
    ScansForAll,
    /// A lane begins at the newest tick instead of its finder's position.
    LaneBeginsAtNewest,
    /// A finder continues although its lane could not be created.
    FinderGoesOn,
    /// Rows that are visible in the tick of one lane are taken for delivered by its whole backend.
    PurgesWithoutLanes,
    /// The reader of a deleted backend ends although its position differs from that of the reader of strays.
    ForgetsElsewhere,
    /// The reader of a backend that does not send passes a row of its own, too.
    PassesItsOwn,
    /// Rows that may get other numbers are read like any others.
    ReadsBeforeTheSweep,
}

struct Member {
    number: i32,
    lane: Option<u16>,
    role: Role,
    delivery: Delivery,
    /// Rows that it was given: sent, or to be written down as failed.
    sent: Vec<i64>,
    failed: Vec<i64>,
    /// How likely its sender reads a reply before the next round.
    speed: f64,
    /// Whether it has not answered for so long that this is an error.
    is_hung: bool,
    /// It reads and sends nothing: its reader only passes rows of others.
    is_paused: bool,
}

impl Member {
    fn new(number: i32, lane: Option<u16>, role: Role, position: Position, rng: &mut Rng) -> Self {
        let backoff = Backoff {
            exponential: false,
            delay: Duration::from_secs(1),
            max_delay: Duration::from_secs(1),
        };
        let cursor = Cursor { position, number: 0 };
        let mut delivery = Delivery::new(Guarantee::AtLeastOnce, cursor, Streams::default(), backoff);
        if role == Role::Redis {
            delivery.connecting();
            delivery.connected();
            delivery.set_window_bytes([3, 40, 2 * 1024 * 1024][rng.usize(..3)]);
        }
        Self {
            number,
            lane,
            role,
            delivery,
            sent: Vec::new(),
            failed: Vec::new(),
            speed: [0.05, 0.5, 1.0][rng.usize(..3)],
            is_hung: false,
            is_paused: false,
        }
    }

    fn has(&self, seq: i64) -> bool {
        self.sent.contains(&seq) || self.failed.contains(&seq)
    }

    fn reader<'a>(&'a self, index: usize, latest: &'a Arc<Tick>, may_rest: bool) -> schedule::Reader<'a> {
        schedule::Reader {
            index,
            way: self.way(latest),
            is_ready: match self.role {
                _ if self.is_paused => false,
                Role::Redis => self.delivery.has_room(),
                _ => !may_rest,
            },
            is_well: self.role == Role::Redis && !self.is_hung && !self.is_paused,
            supply: self.delivery.supply(),
        }
    }

    fn way<'a>(&'a self, latest: &'a Arc<Tick>) -> Way<'a> {
        let position = self.delivery.position();
        Way {
            position,
            goal: position.to(latest),
            role: self.role,
        }
    }
}

fn tight(rng: &mut Rng) -> Limits {
    Limits {
        batch_events: rng.usize(1..8),
        batch_bytes: 5,
        steps: 0,
        least_steps: 3,
        records: rng.usize(1..20),
    }
}

struct World {
    rng: Rng,
    mutant: Mutant,
    database: Database,
    members: Vec<Member>,
    latest: Arc<Tick>,
    /// The backend that was deleted without the worker's knowledge.
    is_deleted: bool,
    /// Rows that all have delivered some time ago.
    old: Option<Arc<Tick>>,
    /// A sweep has passed the rows up to this number; `None`: there is none.
    swept: Option<i64>,
    scans: usize,
    limits: fn(&mut Rng) -> Limits,
}

impl World {
    fn new(seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng::with_seed(seed);
        let database = Database::new(&mut rng, STREAMS);
        let beginning = Position::beginning();
        let mut member = |number: i32, role: Role| Member::new(number, None, role, beginning.clone(), &mut rng);
        let members = vec![
            member(0, Role::Strays),
            member(1, Role::Redis),
            member(2, Role::Redis),
            member(CLUSTER, Role::Finder),
            member(DELETED, Role::Deleted),
        ];
        Self {
            mutant,
            database,
            members,
            latest: Arc::new(Tick::beginning()),
            is_deleted: false,
            old: None,
            swept: None,
            scans: 0,
            limits: tight,
            rng,
        }
    }

    /// Only readers that send, all equally fast and with much room.
    fn of_fast_senders() -> Self {
        let mut world = Self::new(1, Mutant::None);
        world.limits = |_| Limits::of(1_000);
        world.members.retain(|m| m.role == Role::Redis);
        for member in &mut world.members {
            member.speed = 1.0;
            member.delivery.set_window_bytes(2 * 1024 * 1024);
        }
        world
    }

    fn take_tick(&mut self) {
        self.latest = Arc::new(self.database.tick(&mut self.rng));
    }

    fn schedule(&self) -> Schedule<'_> {
        let readers = self.members.iter().enumerate();
        Schedule::of(
            readers.map(|(index, m)| m.reader(index, &self.latest, m.role == Role::Strays && !self.is_deleted)),
        )
    }

    /// Reads for all whose turn it is.
    fn round(&mut self, steps: usize, aborts: f64) -> Result<(), String> {
        let mut waiting: Vec<usize> = self.schedule().reading().collect();
        while let Some(mut group) = Group::take(&mut waiting, |index| self.members[index].way(&self.latest)) {
            self.spoil(&mut group, &mut waiting);
            self.scans += 1;
            let readers = self.pass(&group, steps, false);
            if likely(&mut self.rng, aborts) {
                continue;
            }
            for reader in readers {
                self.hand_over(reader)?;
            }
            self.check_positions()?;
        }
        Ok(())
    }

    fn spoil(&self, group: &mut Group, waiting: &mut Vec<usize>) {
        let position = |index: &usize| self.members[*index].delivery.position();
        match self.mutant {
            Mutant::ScansFromAhead => {
                let last = group.members.iter().map(|index| position(index).last_seq()).max();
                group.last_seq = last.unwrap_or_default();
            }
            Mutant::ScansFromNewest => {
                let newest = group.members.iter().map(position).max_by_key(|p| p.from.next_xid);
                group.from = newest.map_or(group.from.clone(), |p| p.from.clone());
            }
            Mutant::ScansForAll => group.members.append(waiting),
            _ => {}
        }
    }

    fn pass(&mut self, group: &Group, steps: usize, passes_by: bool) -> Vec<Collector> {
        let reader = |index: &usize| {
            let m = &self.members[*index];
            let reader = Collector::new(*index, m.number, m.lane, m.role, &m.delivery);
            if passes_by { reader.passing_by() } else { reader }
        };
        let limits = Limits {
            steps,
            ..(self.limits)(&mut self.rng)
        };
        let readers = group.members.iter().map(reader).collect();
        let backends = Backends::of(self.members.iter().map(|m| (m.number, m.lane, m.role)));
        let is_wanted = self.rng.bool();
        let mut view = self.database.view();
        let mut rows = ScannedRows {
            database: &self.database,
            members: &self.members,
            is_deleted: self.is_deleted,
            swept: self.swept.filter(|_| self.mutant != Mutant::ReadsBeforeTheSweep),
        };
        Pass::new(group, readers, backends, limits).run(&mut view, &mut rows, &|| is_wanted)
    }

    fn hand_over(&mut self, reader: Collector) -> Result<(), String> {
        self.check_sweep(&reader)?;
        let member = &mut self.members[reader.index];
        for record in reader.records {
            let Record::Fail { seq, .. } = record else {
                return Err(format!("nothing waits here, yet there is {record:?}"));
            };
            member.failed.push(seq);
        }
        for BuiltBatch { batch, contents } in reader.built {
            member.sent.extend(batch.entries.iter().map(|entry| entry.seq));
            member.delivery.sent(batch.entries, contents, batch.bytes.len());
        }
        member.delivery.advanced(reader.end.clone());
        if let Some(slot) = reader.found {
            let (number, mut at) = (member.number, reader.end);
            // Sometimes it cannot be created.
            let fails = likely(&mut self.rng, 0.3);
            if fails && self.mutant == Mutant::FinderGoesOn {
                let last_seq = at.last_seq().max(at.from.low_seq) + 1;
                let beyond = Position::towards(at.from.clone(), at.to(&self.latest).clone(), last_seq);
                member.delivery.advanced(beyond);
            }
            if self.mutant == Mutant::LaneBeginsAtNewest {
                at = Position::at(self.latest.clone());
            }
            if !fails {
                let lane = Member::new(number, Some(slot), Role::Redis, at, &mut self.rng);
                self.members.push(lane);
            }
        }
        Ok(())
    }

    fn hear(&mut self) {
        for member in &mut self.members {
            while !member.delivery.is_idle() && likely(&mut self.rng, member.speed) {
                member.delivery.replied(Vec::new(), Now::ZERO, 0.0);
            }
        }
    }

    /// Deletes rows that the cluster's backend has delivered some time ago, in all of its lanes.
    fn purge(&mut self) {
        let of_backend = self.members.iter().filter(|m| m.number == CLUSTER);
        let counts = |m: &&Member| self.mutant != Mutant::PurgesWithoutLanes || m.lane.is_none();
        let delivered = of_backend.filter(counts).map(|m| m.delivery.acked().from.clone());
        let lowest = delivered.reduce(|lowest, tick| match tick.snapshot.includes(&lowest.snapshot) {
            true => lowest,
            false => tick,
        });
        if let Some(old) = std::mem::replace(&mut self.old, lowest) {
            let is_its = |key: &Key| number(self.database.row(key.seq).stream) == CLUSTER;
            let rows: Vec<i64> = self.database.rows().filter(is_its).map(|key| key.seq).collect();
            self.database
                .purge(|key| old.snapshot.sees(key.xid) && rows.contains(&key.seq));
        }
    }

    /// The reader that gets the rows of a stream; `None`: a lane that is still to be created.
    fn owner(&self, stream: u8) -> Option<&Member> {
        let number = match number(stream) {
            UNKNOWN => 0,
            DELETED if self.members.iter().all(|m| m.number != DELETED) => 0,
            number => number,
        };
        let lane = (number == CLUSTER).then(|| hash_slot(stream));
        let mut of_backend = self.members.iter().filter(|m| m.number == number);
        of_backend.find(|m| m.lane == lane)
    }

    /// The reader of the deleted backend ends, and leaves its rows to the reader of strays.
    fn forget(&mut self) {
        let strays = self.members.iter().position(|m| m.role == Role::Strays);
        let index = self.members.iter().position(|m| m.role == Role::Deleted);
        let (Some(strays), Some(index)) = (strays, index) else {
            return;
        };
        let [at, theirs] = [index, strays].map(|index| self.members[index].delivery.position());
        // That no row is lost or read twice must not depend on the end of earlier transactions.
        let goes = deleted::may_go(at, theirs, 0);
        if goes || (self.mutant == Mutant::ForgetsElsewhere && at.under_way.is_none()) {
            let gone = self.members.remove(index);
            self.members[strays].failed.extend(gone.failed);
        }
    }

    /// Checks that exactly the rows before the positions were read.
    fn check_positions(&self) -> Result<(), String> {
        for key in self.database.rows().filter(|key| self.database.is_committed(key.seq)) {
            let row = self.database.row(key.seq);
            match self.owner(row.stream) {
                // An unreadable row fails for the reader that meets it first.
                _ if is_damaged(key.seq) => {}
                None => {
                    let mut finders = self.members.iter().filter(|m| m.role == Role::Finder);
                    if finders.any(|finder| finder.delivery.position().covers(key)) {
                        return Err(format!("the finder is past {}, which has no lane", key.seq));
                    }
                }
                Some(member) => {
                    let covers = member.delivery.position().covers(key);
                    if covers != member.has(key.seq) {
                        return Err(format!("{} is covered: {covers}, read: {}", key.seq, !covers));
                    }
                }
            }
        }
        Ok(())
    }

    fn check_end(&self) -> Result<(), String> {
        let mut read = BTreeSet::new();
        for member in &self.members {
            for seq in member.sent.iter().chain(&member.failed) {
                // An unreadable row fails for each reader that meets it, and is saved once.
                if !read.insert(*seq) && !is_damaged(*seq) {
                    return Err(format!("{seq} was read twice"));
                }
                if !self.database.is_committed(*seq) {
                    return Err(format!("{seq} never committed"));
                }
            }
            if let Some((before, after)) = self.database.out_of_order(member.sent.iter().copied()) {
                return Err(format!("{after} comes after {before}"));
            }
        }
        let mut committed = self.database.rows().filter(|key| self.database.is_committed(key.seq));
        match committed.find(|key| !read.contains(&key.seq)) {
            Some(key) => Err(format!("{} is lost", key.seq)),
            None => Ok(()),
        }
    }

    fn is_through(&self, index: usize) -> bool {
        let m = &self.members[index];
        !m.way(&self.latest).leads_on() && m.delivery.is_idle()
    }

    /// No more rows are published: all readers reach the end, except one whose Redis does not answer. For a while that
    /// is not an error yet.
    fn run_dry(&mut self, hung: Option<usize>) -> Result<(), String> {
        for round in 0..3_000 {
            let rest: Vec<usize> = (0..self.members.len())
                .filter(|index| !self.is_through(*index))
                .collect();
            if rest.iter().all(|index| Some(*index) == hung) {
                return Ok(());
            }
            if let Some(hung) = hung {
                self.members[hung].is_hung = round > 100;
            }
            self.round(50, 0.0)?;
            self.hear();
        }
        Err("somebody starves".to_owned())
    }
}

fn schedule(seed: u64, mutant: Mutant) -> Result<(), String> {
    let mut world = World::new(seed, mutant);
    let steps = [2, 10, 60][world.rng.usize(..3)];
    let (aborts, purges) = (world.rng.f64() * 0.3, world.rng.f64() * 0.1);
    for _ in 0..world.rng.usize(5..80) {
        world.database.steps(&mut world.rng, 12);
        if likely(&mut world.rng, 0.4) {
            world.take_tick();
        }
        world.sweep();
        world.round(steps, aborts)?;
        world.pause();
        world.pass_by(steps, aborts)?;
        world.hear();
        if likely(&mut world.rng, purges) {
            world.purge();
        }
    }
    world.is_deleted = true;
    for _ in 0..world.rng.usize(0..40) {
        world.database.steps(&mut world.rng, 12);
        if likely(&mut world.rng, 0.4) {
            world.take_tick();
        }
        world.round(steps, aborts)?;
        world.pause();
        world.pass_by(steps, aborts)?;
        world.hear();
        if likely(&mut world.rng, 0.5) {
            world.forget();
        }
    }
    world.members.iter_mut().for_each(|m| m.is_paused = false);
    world.swept = None;
    world.database.finish(&mut world.rng);
    world.take_tick();
    let hung = world.rng.usize(..world.members.len());
    if world.members[hung].role == Role::Redis {
        let speed = std::mem::replace(&mut world.members[hung].speed, 0.0);
        world.run_dry(Some(hung))?;
        (world.members[hung].speed, world.members[hung].is_hung) = (speed, false);
    }
    world.run_dry(None)?;
    world.check_end()
}

#[test]
fn each_reader_gets_its_rows_once_and_in_order() {
    for_each_seed(2_000, |seed| schedule(seed, Mutant::None));
}

fn said_of(mutant: Mutant) -> String {
    caught(2_000, |seed| schedule(seed, mutant))
}

#[test]
fn the_oracle_catches_scans_that_begin_too_far_on() {
    for mutant in [Mutant::ScansFromAhead, Mutant::ScansFromNewest, Mutant::ScansForAll] {
        let said = said_of(mutant);
        assert!(
            said.contains("is covered: ") || said.contains("is lost"),
            "{mutant:?}: {said}"
        );
    }
}

#[test]
fn the_oracle_catches_a_lane_that_begins_at_the_newest_tick() {
    let said = said_of(Mutant::LaneBeginsAtNewest);
    assert!(said.contains("is covered: true"), "{said}");
}

#[test]
fn the_oracle_catches_a_finder_that_goes_on_without_a_lane() {
    let said = said_of(Mutant::FinderGoesOn);
    assert!(said.contains("which has no lane"), "{said}");
}

#[test]
fn the_oracle_catches_retention_that_forgets_the_lanes() {
    let said = said_of(Mutant::PurgesWithoutLanes);
    assert!(said.contains("is lost") || said.contains("is covered: true"), "{said}");
}

#[test]
fn the_oracle_catches_a_deleted_backend_that_is_forgotten_elsewhere() {
    let said = said_of(Mutant::ForgetsElsewhere);
    assert!(said.contains("is covered"), "{said}");
}

/// Readers that begin together stay together, so that one scan serves them all.
#[test]
fn one_scan_serves_readers_of_the_same_speed() {
    let mut world = World::of_fast_senders();
    for _ in 0..500 {
        world.database.publish(&[0, 1, 0, 1]);
    }
    world.latest = Arc::new(world.database.quiet_tick());
    let mut rounds = 0;
    while !world.is_through(0) {
        rounds += 1;
        world.round(50, 0.0).expect("all is well");
        world.hear();
        let [a, b] = [0, 1].map(|index| world.members[index].delivery.position());
        assert!(a.same_place(b), "round {rounds}: {a} and {b}");
    }
    assert_eq!(world.scans, rounds);
}
