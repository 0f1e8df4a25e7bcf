//! What recovery asks of the model: its books are the tables of [`Site`].

use crate::env::{Env, Mutant, tell};
use crate::model::database::Database;
use crate::model::redis::{created_at_us, event_id, stream_name};
use crate::model::view::{self, View};
use crate::site::Site;
use crate::tables::Tables;
use relay::delivery::refusal::Record;
use relay::delivery::{Cursor, Delivery};
use relay::event::wanted::{Purpose, Wanted};
use relay::failure::{Class, Failure};
use relay::guard::claim::{Claimant, Incarnation, Why};
use relay::guard::{Guard, Owner, Reach};
use relay::reading::range::Position;
use relay::reading::snapshot::Tick;
use relay::recovery::books::{Books, Notice, Rows};
use relay::sender::orders::Order;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

pub const INTERVAL: Duration = Duration::from_secs(1);

impl Site {
    /// From a report on, as far as it goes without another.
    pub fn recover(&mut self, env: &mut Env) {
        // Before the first tick, nothing is known of what there is to send.
        if self.recovery.is_due() && self.latest.is_none() {
            self.take_tick(env);
        }
        if !self.recovery.is_due() {
            return;
        }
        if !self.pending.is_empty() {
            self.save(env);
        }
        let mut recovery = std::mem::take(&mut self.recovery);
        let now = env.now;
        let Ok(()) = recovery.step(&mut SiteBooks { site: self, env }, now);
        self.recovery = recovery;
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

struct SiteBooks<'a> {
    site: &'a mut Site,
    env: &'a mut Env,
}

impl Books for SiteBooks<'_> {
    type Error = Infallible;
    type Rows<'a>
        = SiteRows<'a>
    where
        Self: 'a;

    fn delivery(&mut self) -> &mut Delivery {
        &mut self.site.delivery
    }

    fn claimant(&mut self, guard: Option<&Guard>) -> Result<Claimant<'_>, Infallible> {
        let (site, env) = (&*self.site, &*self.env);
        let copies_take_over = env.mutant == Mutant::CopiesTakeOver;
        Ok(Claimant {
            incarnation: guard.map_or(Incarnation::Unknown, |guard| site.know(&guard.incarnation)),
            system: "system",
            place: &site.place,
            promoted_to: site.promoted_to,
            anybody: copies_take_over,
            copy: site.is_copy && !copies_take_over,
            paused: false,
            number: site.delivery.number(),
            reach: Reach {
                next_xid: u64::MAX,
                highest_seq: i64::MAX,
                wal: site.flushed,
                epoch: site.tables.epoch,
                total: 0,
            },
            on_missing: env.on_missing,
            take_over: site.take_over,
            restored: self.is_restored(),
            last_restore: match env.mutant {
                Mutant::ForgetsRestores => 0,
                _ => site.tables.last_restore,
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
            mutant: self.env.mutant,
        }))
    }

    fn begin_epoch(&mut self, claimed: u64) {
        self.site.tables.epoch = self.site.tables.epoch.max(claimed) + 1;
        self.site.delivery.begin_epoch(self.site.tables.epoch);
    }

    fn record(&mut self, record: Record) {
        let seen = &mut self.env.seen;
        match &record {
            Record::Park { .. } => seen.settled_missing += 1,
            Record::Accepted { .. } => seen.settled_again += 1,
            Record::Fail { .. } | Record::RefusedAgain { .. } => {}
        }
        self.site.pending.push(record);
    }

    fn save(&mut self) -> Result<(), Infallible> {
        self.site.save(self.env);
        Ok(())
    }

    fn flush(&mut self) -> u64 {
        self.site.flush(self.env);
        self.site.flushed
    }

    fn wait_again(&mut self, since: u64) -> Result<(), Infallible> {
        if self.env.mutant != Mutant::ForgetsAccepted {
            self.env.seen.wait_again += u32::from(self.site.tables.heal(since));
            self.site.wal += 1;
        }
        Ok(())
    }

    fn adopt(&mut self, cursor: Cursor, _total: i64) {
        let is_guards = cursor.number != self.site.delivery.next_number();
        self.env.seen.adopted += u32::from(is_guards);
        tell!(self.env, "stands at {} of {}", cursor.number, cursor.position);
        self.site.delivery.adopt(cursor, 0);
    }

    fn read_again(&mut self, cursor: Cursor, reread_to: i64) {
        tell!(self.env, "goes back to {} of {}", cursor.number, cursor.position);
        self.site.delivery.heal(cursor, reread_to);
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
        self.site.restores_seen() > 0 && self.env.mutant != Mutant::SendsRestored
    }

    fn compares_to(&mut self, tick: &Arc<Tick>) {
        self.site.comparing_to = Some(tick.clone());
    }

    fn has_compared(&mut self) -> Result<(), Infallible> {
        let compared = self.site.comparing_to.take().expect("it was compared to a tick");
        let tables = &mut self.site.tables;
        for xid in tables.restores.extract_if(.., |xid| compared.snapshot.sees(*xid)) {
            tables.last_restore = tables.last_restore.max(xid);
            self.env.seen.restores += 1;
        }
        self.site.wal += 1;
        Ok(())
    }

    fn has_taken_over(&mut self) -> Result<(), Infallible> {
        self.site.take_over = false;
        Ok(())
    }

    fn order(&mut self, order: Order) {
        match &order {
            Order::Claim(claim) => tell!(self.env, "claim as {}", claim.token),
            Order::Look(wanted) => tell!(self.env, "look for {}", wanted.len()),
            _ => {}
        }
        self.site.order(order);
    }

    fn disbelieve(&mut self, field: &str) {
        panic!("{field} of an honest guard is not believed");
    }

    fn hold_off(&mut self, failure: Failure, retry_after: Duration) {
        tell!(self.env, "wait: {failure}");
        self.env.seen.fenced += u32::from(failure.class == Class::Fenced);
        let (now, random) = (self.env.now, self.env.rng.f64());
        self.site.delivery.hold_off(failure, retry_after, now, random);
        self.site.drop_connection(self.env);
    }

    fn let_go(&mut self) {
        self.site.let_go(self.env);
    }

    fn come_up(&mut self) -> Result<(), Infallible> {
        let Self { site, env } = self;
        tell!(env, "up at {}", site.delivery.position());
        // The guard may be lost, and its numbers be given again.
        if env.mutant != Mutant::ComesUpUnflushed {
            site.flush(env);
        }
        site.delivery.set_streams(site.tables.streams());
        site.delivery.connected();
        Ok(())
    }

    fn waiting_at_once(&self) -> usize {
        self.env.waiting_at_once
    }
}

struct SiteRows<'a> {
    view: View,
    database: &'a Database,
    tables: &'a Tables,
    mutant: Mutant,
}

impl Rows for SiteRows<'_> {
    type Table = View;

    fn open(&mut self) -> View {
        self.view.clone()
    }

    fn close(&mut self, _table: View) {}

    fn wanted(&self, scan: &view::Rows, purpose: Purpose) -> Option<Wanted> {
        let is_blind = match purpose {
            Purpose::Settle => self.mutant == Mutant::AdoptsUnsettled,
            Purpose::Compare => self.mutant == Mutant::ComparesNothing,
        };
        let row = self.database.row(scan.seq());
        (!is_blind).then(|| Wanted {
            stream: Arc::from(stream_name(row.stream)),
            event_id: event_id(row.uid),
            created_at_us: created_at_us(row.uid),
            purpose,
        })
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
