//! From a connection that has read the guard to one that is up, as the extension's module of that name has it.

use crate::model::redis::{event_id, stream_name};
use crate::site::Site;
use crate::world::{Env, Mutant, tell};
use relay::claim::{Claimant, Decision, Incarnation, OnMissing, Start, judge};
use relay::conversation::Claim;
use relay::delivery::Cursor;
use relay::guard::{Guard, Owner};
use relay::reader::Position;
use relay::refusal::Record;
use relay::sender::Order;
use relay::tails::{Purpose, Wanted};
use std::sync::Arc;
use std::time::Duration;

pub const INTERVAL: Duration = Duration::from_secs(1);

/// An event that may stand in its stream already.
pub struct Candidate {
    seq: i64,
    waits: bool,
}

#[derive(Default)]
pub enum Stage {
    #[default]
    None,
    Claiming(Start, Option<Guard>),
    Looking(Start, Option<Guard>, Vec<Candidate>),
}

impl Site {
    fn know(&self, incarnation: &str) -> Incarnation {
        let known = &self.tables.incarnations;
        match known.iter().position(|(name, _)| name == incarnation) {
            None => Incarnation::Unknown,
            Some(index) => match known.get(index + 1) {
                Some((_, ended)) => Incarnation::Earlier { ended: *ended },
                None => Incarnation::Current,
            },
        }
    }

    pub fn decide(&mut self, env: &mut Env, guard: Option<Guard>) {
        if !self.pending.is_empty() {
            self.save(env);
        }
        let claimant = Claimant {
            incarnation: guard
                .as_ref()
                .map_or(Incarnation::Unknown, |g| self.know(&g.incarnation)),
            system: "system",
            place: &self.place,
            number: self.delivery.number(),
            on_missing: OnMissing::Continue,
            take_over: false,
        };
        match judge(guard.as_ref(), &claimant, &mut self.watch, env.now) {
            Decision::Claim(start) => {
                tell!(env, "claim: {start:?}");
                self.flush(env);
                let starts_anew = guard.is_none() || matches!(start, Start::Compare(_) | Start::Replay);
                let fields = (self.delivery.number(), self.flushed, 0);
                env.tokens += 1;
                let (incarnation, _) = self.tables.incarnations.last().expect("its own");
                self.order(Order::Claim(Box::new(Claim {
                    token: format!("token-{}", env.tokens),
                    owner: Owner {
                        incarnation: incarnation.clone(),
                        system: "system".to_owned(),
                        timeline: 1,
                        place: self.place.clone(),
                        interval: INTERVAL,
                    },
                    start: starts_anew.then_some(fields),
                })));
                self.stage = Stage::Claiming(start, guard);
            }
            Decision::Wait { failure, retry_after } => {
                tell!(env, "wait: {failure}");
                env.seen.waits += 1;
                let random = env.rng.f64();
                self.delivery.hold_off(failure, retry_after, env.now, random);
                self.drop_connection(env);
            }
        }
    }

    /// The guard is ours.
    pub fn begin(&mut self, env: &mut Env) {
        let Stage::Claiming(start, guard) = std::mem::take(&mut self.stage) else {
            unreachable!("no claim is under way");
        };
        let start = match env.mutant {
            Mutant::IgnoresGuard | Mutant::SavesAhead => Start::Own,
            _ => start,
        };
        let (candidates, purpose) = match (start, &guard) {
            (Start::Own, _) | (Start::Adopt | Start::Heal, None) => return self.up(env),
            (Start::Heal, Some(guard)) => {
                env.seen.heals += 1;
                let position = guard.position.clone().expect("judged so");
                let cursor = Cursor {
                    position,
                    number: guard.number,
                };
                return self.read_again(env, cursor, guard.number);
            }
            (Start::Replay, _) => {
                let cursor = Cursor {
                    position: Position::beginning(),
                    number: self.delivery.number(),
                };
                return self.read_again(env, cursor, 0);
            }
            (Start::Adopt, Some(guard)) => (self.last_batch(guard), Purpose::Settle),
            (Start::Compare(_), _) => {
                env.seen.compared += 1;
                (self.unsent(env), Purpose::Compare)
            }
        };
        tell!(
            env,
            "look for {:?}",
            candidates.iter().map(|c| c.seq).collect::<Vec<_>>()
        );
        let blind = match start {
            Start::Adopt => env.mutant == Mutant::AdoptsUnsettled,
            _ => env.mutant == Mutant::ComparesNothing,
        };
        if candidates.is_empty() || blind {
            return self.finish(
                env,
                start,
                guard,
                &candidates,
                &vec![start == Start::Adopt; candidates.len()],
            );
        }
        let wanted = candidates.iter().map(|candidate| {
            let row = self.database.row(candidate.seq);
            Wanted {
                stream: Arc::from(stream_name(row.stream)),
                event_id: event_id(row.uid),
            }
        });
        let wanted = wanted.collect();
        self.order(Order::Look { wanted, purpose });
        self.stage = Stage::Looking(start, guard, candidates);
    }

    pub fn seen(&mut self, env: &mut Env, found: Vec<bool>) {
        let Stage::Looking(start, guard, candidates) = std::mem::take(&mut self.stage) else {
            unreachable!("nothing was looked for");
        };
        self.finish(env, start, guard, &candidates, &found);
    }

    fn finish(&mut self, env: &mut Env, start: Start, guard: Option<Guard>, candidates: &[Candidate], found: &[bool]) {
        let all = || candidates.iter().zip(found);
        let (there, missing): (Vec<_>, Vec<_>) = all().partition(|(_, found)| **found);
        let accepted: Vec<Record> = there
            .iter()
            .filter(|(candidate, _)| candidate.waits)
            .map(|(candidate, _)| Record::Accepted { seq: candidate.seq })
            .collect();
        match (start, &guard) {
            (Start::Compare(_), _) => {
                env.seen.compared_found += there.len() as u32;
                self.write_down(env, accepted, self.delivery.number());
                self.delivery.set_streams(self.tables.streams());
                let rows = there.iter().filter(|(candidate, _)| !candidate.waits);
                self.delivery.pass_over(rows.map(|(candidate, _)| candidate.seq));
            }
            (_, Some(guard)) => {
                env.seen.adopted += 1;
                env.seen.settled_again += accepted.len() as u32;
                let refused: Vec<i64> = missing.iter().filter(|(c, _)| !c.waits).map(|(c, _)| c.seq).collect();
                env.seen.settled_missing += refused.len() as u32;
                let park = |seq| Record::Park {
                    seq,
                    attempts: 1,
                    error: String::new(),
                };
                let records = refused.into_iter().map(park).chain(accepted).collect();
                self.write_down(env, records, guard.number);
                let position = guard.position.clone().expect("judged so");
                let cursor = Cursor {
                    position,
                    number: guard.number,
                };
                self.delivery.adopt(cursor, 0);
                self.delivery.set_streams(self.tables.streams());
            }
            (_, None) => {}
        }
        self.up(env);
    }

    fn up(&mut self, env: &mut Env) {
        tell!(env, "up at {}", self.delivery.position());
        self.delivery.connected();
    }

    /// Before anything else is appended: the guard can tell of one batch alone.
    fn write_down(&mut self, env: &mut Env, records: Vec<Record>, number: u64) {
        if records.is_empty() {
            return;
        }
        records.into_iter().for_each(|record| self.record(env, record, number));
        self.flush(env);
    }

    /// Goes back to `cursor`; waiting events that were accepted after batch `since` wait again.
    fn read_again(&mut self, env: &mut Env, cursor: Cursor, since: u64) {
        if env.mutant != Mutant::ForgetsAccepted {
            env.seen.wait_again += u32::from(self.tables.heal(since));
            self.wal += 1;
        }
        let reread_to = self.tables.highest_written_down();
        self.delivery.heal(cursor, reread_to);
        self.delivery.set_streams(self.tables.streams());
        self.up(env);
    }

    /// The events of the last batch that the guard speaks of, as far as nobody has written down what became of them.
    fn last_batch(&mut self, guard: &Guard) -> Vec<Candidate> {
        if !guard.again.is_empty() {
            let waiting = self.tables.waiting().filter(|(_, seq, _)| guard.again.contains(seq));
            return waiting.map(|(_, seq, _)| Candidate { seq, waits: true }).collect();
        }
        let (Some(previous), Some(position)) = (&guard.previous, &guard.position) else {
            return Vec::new();
        };
        self.between(previous, position)
    }

    /// Events that may have been sent by somebody of whose work we know nothing.
    fn unsent(&mut self, env: &mut Env) -> Vec<Candidate> {
        let waiting = self.tables.waiting();
        let waiting: Vec<_> = waiting.map(|(_, seq, _)| Candidate { seq, waits: true }).collect();
        if self.ticks.is_empty() {
            self.take_tick(env);
        }
        let upto = Position::at(self.ticks.last().expect("just taken").clone());
        let here = self.delivery.acked().clone();
        let mut found = self.between(&here, &upto);
        found.extend(waiting);
        found
    }

    /// The rows from one position to another, which are written down nowhere.
    fn between(&mut self, from: &Position, upto: &Position) -> Vec<Candidate> {
        let keys = self.database.view().keys;
        let rows = keys.iter().filter(|key| upto.covers(**key) && !from.covers(**key));
        let unknown = rows.filter(|key| {
            let stream = self.database.row(key.seq).stream;
            !self.tables.is_written_down(stream, key.seq)
        });
        unknown
            .map(|key| Candidate {
                seq: key.seq,
                waits: false,
            })
            .collect()
    }
}
