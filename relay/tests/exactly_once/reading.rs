//! The worker reads on.

use crate::env::{Env, Mutant, tell};
use crate::model::redis::stream_name;
use crate::site::Site;
use relay::delivery::RowFate;
use relay::delivery::flight::Contents;
use relay::reading::range::{Position, RangeScan, Step};
use std::sync::Arc;

/// A batch that waits for the end of the transaction it was read in.
struct Built {
    seqs: Vec<i64>,
    end: Position,
}

impl Site {
    /// Reads up to `limit` rows on, as far as there is room; false: there is nothing to read.
    pub fn read(&mut self, env: &mut Env, limit: usize) -> bool {
        let Some(mut room) = self.delivery.room() else {
            return false;
        };
        if !self.pending.is_empty() && env.mutant != Mutant::ResumesUnsaved {
            self.save(env);
        }
        let start = self.delivery.position().clone();
        let from = start.from.clone();
        let (to, last_seq) = match &start.under_way {
            Some(under_way) => (under_way.to.clone(), under_way.last_seq),
            None => match &self.latest {
                Some(tick) if !Arc::ptr_eq(tick, &from) => (tick.clone(), 0),
                _ => return false,
            },
        };
        let towards = |seq| Position::towards(from.clone(), to.clone(), seq);
        let mut scan = RangeScan::open(&mut self.database.view(), &from, &to, last_seq);
        let (mut built, mut parked, mut skipped): (Vec<Built>, Vec<_>, Vec<i64>) = Default::default();
        let mut batch: Vec<i64> = Vec::new();
        let mut reached = start.clone();
        for _ in 0..limit {
            let key = match scan.step() {
                None => {
                    reached = Position::at(to.clone());
                    break;
                }
                Some(Step::Passed(key)) => key,
                Some(Step::Row(key)) => {
                    let stream = self.database.row(key.seq).stream;
                    let looks = env.mutant != Mutant::ReadsBlindly && self.delivery.may_be_written_down(key.seq);
                    if looks && self.tables.is_written_down(stream, key.seq) {
                        env.seen.written_down += 1;
                        skipped.push(key.seq);
                    } else {
                        match self.delivery.on_row(key.seq, &stream_name(stream)) {
                            RowFate::Skip => {
                                env.seen.skipped += 1;
                                skipped.push(key.seq);
                            }
                            RowFate::Park => parked.push((stream, key.seq)),
                            RowFate::Send => {
                                if batch.len() >= env.batch_size {
                                    let seqs = std::mem::take(&mut batch);
                                    let end = towards(*seqs.last().expect("full"));
                                    built.push(Built { seqs, end });
                                }
                                if batch.is_empty() {
                                    if room.batches == 0 {
                                        break;
                                    }
                                    room.batches -= 1;
                                }
                                batch.push(key.seq);
                            }
                        }
                    }
                    key
                }
            };
            reached = towards(key.seq);
        }
        if !batch.is_empty() {
            built.push(Built {
                seqs: batch,
                end: reached.clone(),
            });
        }
        if env.likely(env.faults.aborts) {
            tell!(env, "abort");
            return false;
        }
        if !parked.is_empty() {
            env.seen.parked += parked.len() as u32;
            tell!(env, "park {parked:?}");
            parked
                .iter()
                .for_each(|(stream, seq)| self.tables.park(*stream, *seq, 0));
            self.wal += 1;
            if env.mutant != Mutant::ParksUnflushed {
                self.flush(env);
            }
        }
        let parked = parked.iter().map(|(_, seq)| seq);
        skipped.iter().chain(parked).for_each(|seq| self.delivery.skipped(*seq));
        for Built { seqs, end } in built {
            let entries = self.entries(env, &seqs);
            self.send(env, &seqs, Some(&end));
            self.delivery.sent(entries, Contents::Rows { end }, 100 * seqs.len());
        }
        self.delivery.advanced(reached);
        true
    }

    /// A large piece; true: it came further.
    pub fn read_on(&mut self, env: &mut Env) -> bool {
        let before = self.delivery.position().clone();
        self.read(env, 1_000) && !self.delivery.position().same_place(&before)
    }
}
