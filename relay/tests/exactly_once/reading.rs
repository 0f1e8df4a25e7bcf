//! The worker's reading: the schedule and the cutter of `relay`, over the model's tables.

use crate::env::{Env, Mutant, tell};
use crate::lane::{Lane, append_event, entry, hash_slot};
use crate::model::database::{Database, Row};
use crate::model::redis::stream_name;
use crate::model::view;
use crate::site::Site;
use crate::tables::Tables;
use relay::delivery::Delivery;
use relay::delivery::batch::{BATCH_BYTES, BuiltBatch, OpenBatch};
use relay::delivery::cut::{Backends, Collector, Limits, NotEncoded, Offer, Pass, Source};
use relay::delivery::flight::BatchedEvent;
use relay::delivery::refusal::Record;
use relay::guard::BATCH_START;
use relay::reading::range::Position;
use relay::reading::role::Role;
use relay::reading::schedule::{self, Group, Schedule, Way};
use relay::reading::snapshot::Tick;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

/// The hash slot of a row that has no lane, and the position before the row.
type Found = (u16, Position);

/// The number of the model's backend.
pub(crate) const NUMBER: i32 = 1;

/// The rows that a pass reads.
pub(crate) struct ScannedRows<'a> {
    pub(crate) database: &'a Database,
    pub(crate) lanes: &'a [Lane],
    pub(crate) tables: &'a Tables,
    pub(crate) mutant: Mutant,
    pub(crate) max_attempts: u32,
    /// Rows that are saved as refused.
    pub(crate) written_down: Cell<u32>,
}

impl Source for ScannedRows<'_> {
    type Scan = view::Rows;
    type Offer<'a>
        = RowOffer<'a>
    where
        Self: 'a;

    fn number(&self, _scan: &view::Rows) -> i32 {
        NUMBER
    }

    fn is_deleted(&mut self, _scan: &view::Rows) -> bool {
        unreachable!("there are no strays")
    }

    fn hash_slot(&mut self, scan: &view::Rows, _reader: usize) -> u16 {
        hash_slot(self.database.row(scan.seq()).stream)
    }

    fn unreadable(&mut self, _scan: &view::Rows) -> Option<String> {
        None
    }

    fn with_event<R>(&mut self, scan: &view::Rows, reader: usize, f: impl FnOnce(RowOffer<'_>) -> R) -> R {
        let row = self.database.row(scan.seq());
        f(RowOffer {
            delivery: &self.lanes[reader].delivery,
            row,
            seq: scan.seq(),
            stream: Rc::from(stream_name(row.stream)),
            rows: self,
        })
    }
}

/// The event of a row.
pub(crate) struct RowOffer<'a> {
    delivery: &'a Delivery,
    row: &'a Row,
    seq: i64,
    stream: Rc<str>,
    rows: &'a ScannedRows<'a>,
}

impl Offer for RowOffer<'_> {
    fn delivery(&self) -> &Delivery {
        self.delivery
    }

    fn stream(&self) -> &Rc<str> {
        &self.stream
    }

    fn hash_slot(&self) -> u16 {
        hash_slot(self.row.stream)
    }

    fn is_written_down(&self) -> bool {
        let looks = self.rows.mutant != Mutant::ReadsBlindly;
        let is_found = looks && self.rows.tables.is_written_down(self.row.stream, self.seq);
        self.rows.written_down.update(|count| count + u32::from(is_found));
        is_found
    }

    fn buffer(&mut self) -> Vec<u8> {
        BATCH_START.to_vec()
    }

    fn encode(self, batch: &mut OpenBatch) -> Result<BatchedEvent, NotEncoded> {
        // What is built must be sent first.
        if self.seq % 31 == 7 && !batch.entries.is_empty() {
            return Err(NotEncoded::NoMemory);
        }
        append_event(&mut batch.bytes, self.row);
        Ok(entry(self.rows.max_attempts, self.seq, self.row))
    }
}

/// The result of a pass that reads `steps` rows for each reader.
pub(crate) fn limits(env: &mut Env, steps: usize) -> Limits {
    Limits {
        batch_events: env.batch_size,
        batch_bytes: BATCH_BYTES,
        steps: steps.max(1),
        least_steps: usize::MAX,
        records: env.rng.usize(1..10),
    }
}

impl Site {
    fn way<'a>(&'a self, at: usize, latest: &'a Arc<Tick>) -> Way<'a> {
        let position = self.lanes[at].delivery.position();
        Way {
            position,
            goal: position.to(latest),
            role: self.lanes[at].role,
        }
    }

    /// The readers whose turn it is, in groups.
    fn groups(&self) -> Vec<Group> {
        let latest = self.latest.clone().unwrap_or_else(|| Arc::new(Tick::beginning()));
        let reader = |(at, lane): (usize, &Lane)| schedule::Reader {
            index: at,
            way: self.way(at, &latest),
            is_ready: lane.role == Role::Finder || lane.delivery.has_room(),
            is_well: lane.role == Role::Redis && lane.delivery.is_up() && lane.delivery.trouble().is_none(),
            supply: lane.delivery.supply(),
        };
        let mut waiting: Vec<usize> = Schedule::of(self.lanes.iter().enumerate().map(reader))
            .reading()
            .collect();
        std::iter::from_fn(|| Group::take(&mut waiting, |at| self.way(at, &latest))).collect()
    }

    /// Reads up to `limit` further rows for readers at the same position, as far as there is room; false: there is
    /// nothing to read.
    pub(crate) fn read(&mut self, env: &mut Env, limit: usize) -> bool {
        let groups = self.groups();
        let is_any = !groups.is_empty();
        if is_any {
            let group = &groups[env.rng.usize(..groups.len())];
            let found = self.read_group(env, group, limit);
            self.add_lanes(env, found);
        }
        is_any
    }

    fn read_group(&mut self, env: &mut Env, group: &Group, limit: usize) -> Vec<Found> {
        for at in &group.members {
            if !self.lanes[*at].pending.is_empty() && env.mutant != Mutant::ResumesUnsaved {
                self.save(env, *at);
            }
        }
        let reader = |at: &usize| self.collector(*at);
        let readers = group.members.iter().map(reader).collect();
        self.pass(env, group, readers, limit)
    }

    fn collector(&self, at: usize) -> Collector {
        let lane = &self.lanes[at];
        Collector::new(at, NUMBER, lane.slot, lane.role, &lane.delivery)
    }

    fn pass(&mut self, env: &mut Env, group: &Group, readers: Vec<Collector>, limit: usize) -> Vec<Found> {
        let backends = Backends::of(self.lanes.iter().map(|lane| (NUMBER, lane.slot, lane.role)));
        let pass = Pass::new(group, readers, backends, limits(env, limit));
        let mut view = self.database.view();
        let mut rows = ScannedRows {
            database: &self.database,
            lanes: &self.lanes,
            tables: &self.tables,
            mutant: env.mutant,
            max_attempts: env.max_attempts,
            written_down: Cell::new(0),
        };
        let readers = pass.run(&mut view, &mut rows, &|| false);
        let written_down = rows.written_down.get();
        if env.likely(env.faults.aborts) {
            tell!(env, "abort");
            return Vec::new();
        }
        env.seen.written_down += written_down;
        readers
            .into_iter()
            .filter_map(|reader| self.hand_over(env, reader))
            .collect()
    }

    /// Called when all groups were read: a new lane may have the index of one that is given up.
    fn add_lanes(&mut self, env: &mut Env, found: Vec<Found>) {
        for (slot, at) in found {
            self.add_lane(env, slot, at);
        }
    }

    /// The readers of lanes that do not send pass rows of others: those that are down, and those of a paused backend.
    pub(crate) fn pass_by(&mut self, env: &mut Env) -> bool {
        let latest = self.latest.clone().unwrap_or_else(|| Arc::new(Tick::beginning()));
        let may = |at: &usize| {
            let lane = &self.lanes[*at];
            lane.pending.is_empty() && lane.delivery.may_pass_by() && self.way(*at, &latest).leads_on()
        };
        let mut waiting: Vec<usize> = (0..self.lanes.len()).filter(may).collect();
        let Some(group) = Group::take(&mut waiting, |at| self.way(at, &latest)) else {
            return false;
        };
        let readers = group
            .members
            .iter()
            .map(|at| self.collector(*at).passing_by())
            .collect();
        let limit = env.rng.usize(..30);
        self.pass(env, &group, readers, limit);
        true
    }

    /// Adopts the result of a pass, in a transaction that has committed. Returns what a finder has found.
    fn hand_over(&mut self, env: &mut Env, reader: Collector) -> Option<Found> {
        let at = reader.index;
        let parked: Vec<i64> = reader.records.iter().map(parked).collect();
        env.seen.skipped += (reader.skipped.len() - parked.len()) as u32;
        env.seen.parked += parked.len() as u32;
        if !parked.is_empty() {
            tell!(env, "park {parked:?}");
            for seq in parked {
                self.tables.park(self.database.row(seq).stream, seq, 0);
            }
            self.wal += 1;
            if env.mutant != Mutant::ParksUnflushed {
                self.flush(env);
            }
        }
        for seq in &reader.skipped {
            self.lanes[at].delivery.skipped(*seq);
        }
        let mut end = reader.end.clone();
        if reader.passes_by() {
            tell!(env, "lane {at} passes rows of others, up to {end}");
            env.seen.passed_by += u32::from(!self.lanes[at].delivery.is_up());
            if reader.is_stopped && env.mutant == Mutant::PassesItsOwn {
                let to = end.newest().clone();
                end = Position::towards(end.from.clone(), to, end.place() + 1);
            }
        }
        for BuiltBatch { batch, contents } in reader.built {
            self.send(env, at, batch, contents);
        }
        self.lanes[at].delivery.advanced(end.clone());
        reader.found.map(|slot| (slot, end))
    }

    /// Reads a large piece for all; true: one of them made progress.
    pub(crate) fn read_on(&mut self, env: &mut Env) -> bool {
        let lanes = env.seen.lanes;
        let before: Vec<Position> = self.lanes.iter().map(|lane| lane.delivery.position().clone()).collect();
        let mut found = Vec::new();
        for group in self.groups() {
            found.extend(self.read_group(env, &group, 1_000));
        }
        self.add_lanes(env, found);
        let mut now = self.lanes.iter().map(|lane| lane.delivery.position()).zip(before);
        env.seen.lanes > lanes || now.any(|(now, before)| !now.same_place(&before))
    }
}

fn parked(record: &Record) -> i64 {
    match record {
        Record::Park { seq, .. } => *seq,
        other => unreachable!("a row that can be read and sent is at most parked, not {other:?}"),
    }
}
