//! The interface of recovery to the model: its state is in the tables of [`Site`].

use crate::env::{Env, Mutant, tell};
use crate::lane::{Lane, serves};
use crate::model::database::Database;
use crate::model::redis::{created_at_us, event_id, stream_name};
use crate::model::view::{self, View};
use crate::site::Site;
use crate::tables::{Saved, Tables};
use relay::delivery::refusal::Record;
use relay::delivery::{Cursor, Delivery};
use relay::event::wanted::{Purpose, Wanted};
use relay::failure::{Class, Failure};
use relay::guard::claim::{Claimant, Incarnation, Why};
use relay::guard::{Guard, Owner, Reach};
use relay::reading::range::{Key, Position};
use relay::reading::snapshot::Tick;
use relay::recovery::books::{Books, Notice, Rows};
use relay::sender::orders::Order;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

pub(crate) const INTERVAL: Duration = Duration::from_secs(1);

impl Site {
    /// Continues from a report until it needs another one.
    pub(crate) fn recover(&mut self, env: &mut Env, at: usize) {
        // Before the first tick, it is unknown which events are to be sent.
        if self.lanes[at].recovery.is_due() && self.latest.is_none() {
            self.take_tick(env);
        }
        if !self.lanes[at].recovery.is_due() {
            return;
        }
        if !self.lanes[at].pending.is_empty() {
            self.save(env, at);
        }
        let mut recovery = std::mem::take(&mut self.lanes[at].recovery);
        let now = env.now;
        let Ok(()) = recovery.step(&mut SiteBooks { site: self, env, at }, now);
        self.lanes[at].recovery = recovery;
    }

    fn has_lane_that_is_up(&self) -> bool {
        self.lanes
            .iter()
            .any(|lane| lane.slot.is_some() && lane.delivery.is_up())
    }

    fn know(&self, incarnation: &str) -> Incarnation {
        let known = &self.tables.incarnations;
        match known.iter().position(|(name, _)| name == incarnation) {
            None => Incarnation::Unknown,
            Some(index) => match known.get(index + 1) {
                Some((_, ended)) => Incarnation::Earlier {
                    ended: *ended,
                    // The model's servers never lose WAL that was flushed.
                    next_xid: u64::MAX,
                },
                None => Incarnation::Current,
            },
        }
    }
}

/// The saved state of one lane.
struct SiteBooks<'a> {
    site: &'a mut Site,
    env: &'a mut Env,
    at: usize,
}

impl SiteBooks<'_> {
    fn lane(&self) -> &Lane {
        &self.site.lanes[self.at]
    }

    fn lane_mut(&mut self) -> &mut Lane {
        &mut self.site.lanes[self.at]
    }

    fn epoch(&mut self) -> &mut u64 {
        let slot = self.lane().slot;
        let new = Saved::at(Position::beginning());
        &mut self.site.tables.saved.entry(slot).or_insert(new).epoch
    }

    /// Events after the maximum that is looked for may be sent once more.
    fn note_what_is_not_compared(&mut self) {
        let most = self.env.most_compared;
        let newest = self.newest_tick();
        let here = self.lane().delivery.acked().clone();
        let mut parts = vec![(here.clone(), Position::at(newest.clone()))];
        if let Some(under_way) = &here.under_way {
            let there = Position::at(under_way.to.clone());
            parts = vec![(here.clone(), there.clone()), (there, Position::at(newest))];
        }
        for (from, upto) in parts {
            let database = &self.site.database;
            let is_candidate = |key: &Key| {
                let stream = database.row(key.seq).stream;
                let is_there = database.is_committed(key.seq) && !database.is_purged(key.seq);
                let is_open = !self.site.tables.is_written_down(stream, key.seq);
                is_there && is_open && self.lane().serves(stream) && upto.covers(*key) && !from.covers(*key)
            };
            let mut rows: Vec<Key> = database.rows().filter(is_candidate).collect();
            rows.sort_by_key(|key| (key.seq > from.from.low_seq, key.seq));
            let beyond: Vec<u64> = rows.iter().skip(most).map(|key| database.row(key.seq).uid).collect();
            self.env.seen.not_compared += beyond.len() as u32;
            self.env.not_compared.extend(beyond);
        }
    }
}

impl Books for SiteBooks<'_> {
    type Error = Infallible;
    type Rows<'a>
        = SiteRows<'a>
    where
        Self: 'a;

    fn delivery(&mut self) -> &mut Delivery {
        &mut self.lane_mut().delivery
    }

    fn claimant(&mut self, guard: Option<&Guard>) -> Result<Claimant<'_>, Infallible> {
        let restored = self.is_restored();
        let (site, env) = (&*self.site, &*self.env);
        let lane = &site.lanes[self.at];
        let copies_take_over = env.mutant == Mutant::CopiesTakeOver;
        let is_trusted = match env.mutant {
            Mutant::TakesOverBlindly => lane.take_over,
            Mutant::OneLaneComparesForAll => site.has_lane_that_is_up(),
            _ => false,
        };
        let incarnation = match guard {
            None => Incarnation::Unknown,
            Some(_) if is_trusted => Incarnation::Earlier {
                ended: u64::MAX,
                next_xid: u64::MAX,
            },
            Some(guard) => site.know(&guard.incarnation),
        };
        Ok(Claimant {
            incarnation,
            system: "system",
            place: &site.place,
            promoted_to: site.promoted_to,
            anybody: copies_take_over,
            copy: site.is_copy && !copies_take_over,
            paused: false,
            number: lane.delivery.number(),
            reach: Reach {
                next_xid: u64::MAX,
                highest_seq: i64::MAX,
                wal: site.flushed,
                epoch: site.tables.saved.get(&lane.slot).map_or(0, |saved| saved.epoch),
                total: 0,
            },
            on_missing: env.on_missing,
            take_over: lane.take_over,
            restored,
            last_restore: match env.mutant {
                Mutant::ForgetsRestores => 0,
                _ => site.tables.last_restore.max(lane.last_compared),
            },
        })
    }

    fn owner(&self) -> Owner {
        let (incarnation, _) = self.site.tables.incarnations.last().expect("its own");
        Owner {
            incarnation: incarnation.clone(),
            system: "system".to_owned(),
            timeline: self.site.promoted_to.max(1),
            place: self.site.place.clone(),
            interval: INTERVAL,
        }
    }

    fn token(&mut self) -> String {
        self.env.tokens += 1;
        format!("token-{}", self.env.tokens)
    }

    fn total(&self) -> i64 {
        0
    }

    fn newest_tick(&mut self) -> Arc<Tick> {
        self.site.latest.clone().expect("taken before the first step")
    }

    fn oldest(&mut self) -> Result<Position, Infallible> {
        Ok(Position::beginning())
    }

    fn vouched(&mut self, guard: Guard) -> Result<Guard, Infallible> {
        Ok(guard)
    }

    fn in_tables<R>(&mut self, mut f: impl FnMut(&mut SiteRows<'_>) -> R) -> Result<R, Infallible> {
        Ok(f(&mut SiteRows {
            view: self.site.database.view(),
            database: &self.site.database,
            tables: &self.site.tables,
            lane: self.lane(),
            mutant: self.env.mutant,
        }))
    }

    fn begin_epoch(&mut self, claimed: u64) {
        let known = self.epoch();
        *known = claimed.max(*known) + 1;
        let epoch = *known;
        self.lane_mut().delivery.begin_epoch(epoch);
    }

    fn record(&mut self, record: Record) {
        let seen = &mut self.env.seen;
        match &record {
            Record::Park { .. } => seen.settled_missing += 1,
            Record::Accepted { .. } => seen.settled_again += 1,
            Record::Fail { .. } | Record::RefusedAgain { .. } => {}
        }
        self.lane_mut().pending.push(record);
    }

    fn save(&mut self) -> Result<(), Infallible> {
        self.site.save(self.env, self.at);
        Ok(())
    }

    fn flush(&mut self) -> u64 {
        self.site.flush(self.env);
        self.site.flushed
    }

    fn wait_again(&mut self, since: u64) -> Result<(), Infallible> {
        if self.env.mutant != Mutant::ForgetsAccepted {
            let lane = &self.site.lanes[self.at];
            let lost = self.site.tables.heal(|stream| lane.serves(stream), since);
            self.env.seen.wait_again += u32::from(lost);
            self.site.wal += 1;
        }
        Ok(())
    }

    fn adopt(&mut self, cursor: Cursor, _total: i64) {
        let is_guards = cursor.number != self.lane().delivery.next_number();
        self.env.seen.adopted += u32::from(is_guards);
        tell!(self.env, "stands at {} of {}", cursor.number, cursor.position);
        self.lane_mut().delivery.adopt(cursor, 0);
    }

    fn read_again(&mut self, cursor: Cursor, reread_to: i64) {
        tell!(self.env, "goes back to {} of {}", cursor.number, cursor.position);
        self.lane_mut().delivery.heal(cursor, reread_to);
    }

    fn count_healing(&mut self) {}

    fn tell(&mut self, notice: Notice<'_>) {
        let seen = &mut self.env.seen;
        match notice {
            Notice::Heals(_) => seen.heals += 1,
            Notice::Replays => seen.replayed += 1,
            Notice::Compared { why, found, .. } => {
                seen.compared += 1;
                seen.compared_found += found as u32;
                seen.other_histories += u32::from(why == Why::OtherHistory);
                seen.unfinished += u32::from(why == Why::Unfinished);
            }
        }
    }

    fn is_restored(&self) -> bool {
        self.site.restores_seen(self.at) > 0 && self.env.mutant != Mutant::SendsRestored
    }

    fn compares_to(&mut self, tick: &Arc<Tick>) {
        self.lane_mut().comparing_to = Some(tick.clone());
    }

    fn has_compared(&mut self) -> Result<(), Infallible> {
        let compared = self.lane_mut().comparing_to.take().expect("it was compared to a tick");
        let Self { site, env, at } = self;
        let seen = |xid: &u64| compared.snapshot.sees(*xid);
        if site.lanes[*at].slot.is_some() {
            // The others, and the finder, must pass them too.
            let lane = &mut site.lanes[*at];
            let known = lane.compared.len();
            let due = |xid: &u64| seen(xid) && !lane.compared.contains(xid);
            let restores: Vec<u64> = site.tables.restores.iter().copied().filter(due).collect();
            lane.compared.extend(restores);
            if lane.compared.len() > known {
                lane.last_compared = compared.snapshot.xmax() - 1;
            }
            return Ok(());
        }
        for xid in site.tables.restores.extract_if(.., |xid| seen(xid)) {
            site.tables.last_restore = site.tables.last_restore.max(xid);
            env.seen.restores += 1;
        }
        site.wal += 1;
        Ok(())
    }

    fn has_taken_over(&mut self) -> Result<(), Infallible> {
        self.note_what_is_not_compared();
        self.env.seen.taken_over += u32::from(self.lane().take_over);
        self.lane_mut().take_over = false;
        Ok(())
    }

    fn order(&mut self, order: Order) {
        match &order {
            Order::Claim(claim) => tell!(self.env, "claim as {}", claim.token),
            Order::Look(wanted) => tell!(self.env, "look for {}", wanted.len()),
            _ => {}
        }
        self.site.order(self.at, order);
    }

    fn disbelieve(&mut self, field: &str) {
        panic!("{field} of an honest guard is not believed");
    }

    fn hold_off(&mut self, failure: Failure, retry_after: Duration) {
        tell!(self.env, "wait: {failure}");
        self.env.seen.fenced += u32::from(failure.class == Class::Fenced);
        let (now, random) = (self.env.now, self.env.rng.f64());
        self.lane_mut().delivery.hold_off(failure, retry_after, now, random);
        self.site.drop_connection(self.env, self.at);
    }

    fn let_go(&mut self) {
        self.site.let_go(self.env, self.at);
    }

    fn come_up(&mut self) -> Result<(), Infallible> {
        let Self { site, env, at } = self;
        tell!(env, "up at {}", site.lanes[*at].delivery.position());
        // The guard may be lost, and its numbers may be used again.
        if env.mutant != Mutant::ComesUpUnflushed {
            site.flush(env);
        }
        let lane = &mut site.lanes[*at];
        let slot = lane.slot;
        let streams = site.tables.streams(|stream| serves(slot, stream));
        lane.delivery.set_streams(streams);
        lane.delivery.connected();
        Ok(())
    }

    fn waiting_at_once(&self) -> usize {
        self.env.waiting_at_once
    }

    fn most_compared(&self) -> usize {
        match self.env.mutant {
            Mutant::ComparesLess => self.env.most_compared / 2,
            _ => self.env.most_compared,
        }
    }
}

struct SiteRows<'a> {
    view: View,
    database: &'a Database,
    tables: &'a Tables,
    lane: &'a Lane,
    mutant: Mutant,
}

impl Rows for SiteRows<'_> {
    type Table = View;

    fn open(&mut self) -> View {
        self.view.clone()
    }

    fn close(&mut self, _table: View) {}

    fn wanted(&self, scan: &view::Rows, purpose: Purpose, _own_stream: Option<&str>) -> Option<Wanted> {
        let is_blind = match purpose {
            Purpose::Settle => self.mutant == Mutant::AdoptsUnsettled,
            Purpose::Compare => match self.mutant {
                Mutant::NewLaneComparesNothing => self.lane.is_new,
                mutant => mutant == Mutant::ComparesNothing,
            },
        };
        let row = self.database.row(scan.seq());
        (!is_blind && self.lane.serves(row.stream)).then(|| Wanted {
            stream: Arc::from(stream_name(row.stream)),
            event_id: event_id(row.uid),
            created_at_us: created_at_us(row.uid),
            purpose,
        })
    }

    fn published(&mut self, event_id: [u8; 16]) -> Option<(Key, i64)> {
        let uid = u128::from_be_bytes(event_id) as u64;
        let is_it = |key: &Key| {
            let row = self.database.row(key.seq);
            row.uid == uid && self.lane.serves(row.stream)
        };
        let key = self.database.rows().find(is_it)?;
        Some((key, created_at_us(uid)))
    }

    fn waiting(&mut self, after: i64, limit: usize) -> Vec<i64> {
        let mut waiting: Vec<i64> = self.tables.waiting().map(|(_, seq, _)| seq).collect();
        waiting.retain(|seq| *seq > after);
        waiting.sort_unstable();
        waiting.truncate(limit);
        waiting
    }

    fn still_waiting(&mut self, seqs: &[i64]) -> Vec<i64> {
        let waiting = self.tables.waiting().map(|(_, seq, _)| seq);
        waiting.filter(|seq| seqs.contains(seq)).collect()
    }

    fn highest_written_down(&mut self) -> i64 {
        self.tables.highest_written_down()
    }

    fn is_written_down(&mut self, seq: i64, _wanted: &Wanted) -> bool {
        self.tables.is_written_down(self.database.row(seq).stream, seq)
    }
}
