//! From a connection that has read the guard to one that is up, as the extension's module of that name has it.

use crate::env::{Env, Mutant, tell};
use crate::model::redis::{created_at_us, event_id, stream_name};
use crate::site::Site;
use relay::claim::{Claimant, Decision, Incarnation, Start, Why, judge};
use relay::classify::Class;
use relay::conversation::{Beginning, Claim};
use relay::delivery::Cursor;
use relay::guard::{Guard, Owner, Reach};
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
    purpose: Purpose,
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
                Some((_, ended)) => Incarnation::Earlier {
                    ended: *ended,
                    // The model's servers never lose WAL that was flushed.
                    next_xid: u64::MAX,
                },
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
            promoted_to: self.promoted_to,
            anybody: env.mutant == Mutant::CopiesTakeOver,
            copy: self.is_copy && env.mutant != Mutant::CopiesTakeOver,
            paused: false,
            number: self.delivery.number(),
            reach: Reach {
                next_xid: u64::MAX,
                highest_seq: i64::MAX,
                wal: self.flushed,
                epoch: self.tables.epoch,
                total: 0,
            },
            on_missing: env.on_missing,
            take_over: self.take_over,
            restored: false,
        };
        match judge(guard.as_ref(), &claimant, &mut self.watch, env.now) {
            Decision::Claim(start) => {
                tell!(env, "claim: {start:?}");
                if let (Start::Adopt, Incarnation::Current, Some(guard)) = (start, claimant.incarnation, &guard) {
                    let sent = self.delivery.may_have_sent(guard.number, &guard.position);
                    assert_eq!(sent, Ok(()), "an honest guard is not believed: {guard:?}");
                }
                // Before the guard is its own: whoever claims next would not know.
                match (start, &guard) {
                    (Start::Replay, _) => {
                        env.seen.replayed += 1;
                        self.step_back(env, Position::beginning(), 0, 0);
                    }
                    (Start::Heal { heard: true }, Some(guard)) => {
                        self.step_back(env, guard.position.clone(), guard.number, guard.number);
                    }
                    // Should that guard be found again, it is news.
                    (Start::Heal { heard: false }, Some(guard)) => {
                        self.step_back(env, guard.previous.clone(), guard.number - 1, guard.number - 1);
                    }
                    (Start::Compare(Why::Unfinished), Some(guard)) => {
                        self.step_back(env, guard.previous.clone(), guard.number, guard.number);
                    }
                    _ => {}
                }
                self.tables.epoch += 1;
                self.delivery.begin_epoch(self.tables.epoch);
                self.save(env);
                self.flush(env);
                let anew = guard.is_none() || matches!(start, Start::Heal { .. } | Start::Compare(_));
                let beginning = anew.then(|| Beginning {
                    // It counts as a batch, so that nobody takes it for an earlier one.
                    number: self.delivery.next_number(),
                    position: self.delivery.acked().clone(),
                    compares: matches!(start, Start::Heal { heard: false } | Start::Compare(_)),
                    wal: self.flushed,
                    total: 0,
                });
                if anew {
                    self.delivery.begins_anew();
                }
                env.tokens += 1;
                let (incarnation, _) = self.tables.incarnations.last().expect("its own");
                self.order(Order::Claim(Box::new(Claim {
                    token: format!("token-{}", env.tokens),
                    owner: Owner {
                        incarnation: incarnation.clone(),
                        system: "system".to_owned(),
                        timeline: self.promoted_to.max(1),
                        place: self.place.clone(),
                        interval: INTERVAL,
                    },
                    start: beginning,
                })));
                self.stage = Stage::Claiming(start, guard);
            }
            Decision::Disbelieve(field) => panic!("{field} of an honest guard is not believed: {guard:?}"),
            Decision::Wait { failure, retry_after } => {
                tell!(env, "wait: {failure}");
                env.seen.fenced += u32::from(failure.class == Class::Fenced);
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
        self.take_over = false;
        let start = match env.mutant {
            Mutant::IgnoresGuard | Mutant::SavesAhead => Start::Own,
            _ => start,
        };
        let own = |number| Cursor {
            position: self.delivery.acked().clone(),
            number,
        };
        let next = self.delivery.next_number();
        let candidates = match (start, &guard) {
            (Start::Adopt, None) => return self.up(env),
            (Start::Own, Some(_)) => self.waiting(),
            (Start::Adopt, Some(guard)) => {
                let mut candidates = self.last_batch(guard);
                candidates.extend(self.waiting().into_iter().filter(|c| !guard.again.contains(&c.seq)));
                candidates
            }
            (Start::Own | Start::Replay, _) => {
                self.delivery.adopt(own(next), 0);
                return self.up(env);
            }
            (Start::Heal { .. }, guard) => {
                env.seen.heals += 1;
                self.delivery.adopt(own(next), 0);
                let here = self.delivery.acked().clone();
                let mut candidates = self.waiting();
                if let Some(guard) = guard {
                    candidates.extend(self.between(&here, &guard.position, Purpose::Compare));
                }
                candidates
            }
            (Start::Compare(why), _) => {
                env.seen.compared += 1;
                env.seen.other_histories += u32::from(why == Why::OtherHistory);
                env.seen.unfinished += u32::from(why == Why::Unfinished);
                self.delivery.adopt(own(next), 0);
                self.unsent(env)
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
                created_at_us: created_at_us(row.uid),
                purpose: candidate.purpose,
            }
        });
        let wanted = wanted.collect();
        self.order(Order::Look(wanted));
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
            (Start::Own, _) => self.pending.extend(accepted),
            (Start::Heal { .. } | Start::Compare(_), _) => {
                env.seen.compared_found += there.len() as u32;
                self.pending.extend(accepted);
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
                    error: "".into(),
                };
                self.pending.extend(refused.into_iter().map(park).chain(accepted));
                let cursor = Cursor {
                    position: guard.position.clone(),
                    number: guard.number,
                };
                self.delivery.adopt(cursor, 0);
                // In another future of that guard, rows behind it may have been written down.
                self.delivery.set_reread_to(self.tables.highest_written_down());
            }
            (_, None) => {}
        }
        self.up(env);
    }

    /// What was found is saved before anything else is appended: the guard tells of one batch alone, it may be lost, and its numbers be
    /// given again.
    fn up(&mut self, env: &mut Env) {
        tell!(env, "up at {}", self.delivery.position());
        self.save(env);
        if env.mutant != Mutant::ComesUpUnflushed {
            self.flush(env);
        }
        self.delivery.set_streams(self.tables.streams());
        self.delivery.connected();
    }

    /// Goes back to `position`, durably; waiting events that were accepted after batch `since` wait again.
    fn step_back(&mut self, env: &mut Env, position: Position, number: u64, since: u64) {
        if env.mutant != Mutant::ForgetsAccepted {
            env.seen.wait_again += u32::from(self.tables.heal(since));
            self.wal += 1;
        }
        let reread_to = self.tables.highest_written_down();
        self.delivery.heal(Cursor { position, number }, reread_to);
    }

    /// The events of the last batch that the guard speaks of, as far as nobody has written down what became of them.
    fn last_batch(&mut self, guard: &Guard) -> Vec<Candidate> {
        if !guard.again.is_empty() {
            let waiting = self.tables.waiting().filter(|(_, seq, _)| guard.again.contains(seq));
            let again = |(_, seq, _)| Candidate {
                seq,
                waits: true,
                purpose: Purpose::Settle,
            };
            return waiting.map(again).collect();
        }
        self.between(&guard.previous, &guard.position, Purpose::Settle)
    }

    /// Events that were refused and wait.
    fn waiting(&self) -> Vec<Candidate> {
        let waits = |(_, seq, _)| Candidate {
            seq,
            waits: true,
            purpose: Purpose::Compare,
        };
        self.tables.waiting().map(waits).collect()
    }

    /// Events that may have been sent by somebody of whose work we know nothing.
    fn unsent(&mut self, env: &mut Env) -> Vec<Candidate> {
        let waiting = self.waiting();
        if self.latest.is_none() {
            self.take_tick(env);
        }
        let upto = Position::at(self.latest.clone().expect("just taken"));
        let here = self.delivery.acked().clone();
        let mut found = self.between(&here, &upto, Purpose::Compare);
        found.extend(waiting);
        found
    }

    /// The rows from one position to another, which are written down nowhere.
    fn between(&mut self, from: &Position, upto: &Position, purpose: Purpose) -> Vec<Candidate> {
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
                purpose,
            })
            .collect()
    }
}
