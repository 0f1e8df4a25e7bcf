//! The tables of the worker.

use crate::model::redis::stream_name;
use relay::delivery::Cursor;
use relay::delivery::refusal::{Record, Streams};
use relay::reading::range::Position;
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Refused {
    pub(crate) attempts: u32,
    /// The batch in which it was accepted at last; `None`: it waits.
    pub(crate) accepted_in: Option<u64>,
}

/// The saved state of a backend, or of a lane.
#[derive(Clone)]
pub(crate) struct Saved {
    pub(crate) cursor: Cursor,
    /// How often its guard was claimed.
    pub(crate) epoch: u64,
}

impl Saved {
    pub(crate) fn at(position: Position) -> Self {
        let cursor = Cursor { position, number: 0 };
        Self { cursor, epoch: 0 }
    }
}

#[derive(Clone)]
pub(crate) struct Tables {
    /// By stream and seq.
    pub(crate) refused: BTreeMap<(u8, i64), Refused>,
    pub(crate) failed: BTreeMap<i64, u32>,
    /// By hash slot; the backend itself, or its finder, has none.
    pub(crate) saved: BTreeMap<Option<u16>, Saved>,
    /// The same of lanes that were given up.
    pub(crate) former: BTreeMap<u16, Saved>,
    /// Transactions that have restored events of a dump, which are still to be looked for.
    pub(crate) restores: Vec<u64>,
    /// The latest of those whose events have been looked for.
    pub(crate) last_restore: u64,
    /// Of the server, and where the one before it ended.
    pub(crate) incarnations: Vec<(String, u64)>,
}

impl Tables {
    pub(crate) fn new() -> Self {
        Self {
            refused: BTreeMap::new(),
            failed: BTreeMap::new(),
            saved: BTreeMap::from([(None, Saved::at(Position::beginning()))]),
            former: BTreeMap::new(),
            restores: Vec::new(),
            last_restore: 0,
            incarnations: Vec::new(),
        }
    }

    pub(crate) fn is_written_down(&self, stream: u8, seq: i64) -> bool {
        self.refused.contains_key(&(stream, seq)) || self.failed.contains_key(&seq)
    }

    pub(crate) fn waiting(&self) -> impl Iterator<Item = (u8, i64, u32)> {
        let waiting = self.refused.iter().filter(|(_, refused)| refused.accepted_in.is_none());
        waiting.map(|((stream, seq), refused)| (*stream, *seq, refused.attempts))
    }

    pub(crate) fn waiting_in(&self, stream: u8) -> impl Iterator<Item = i64> {
        self.waiting()
            .filter(move |(of, ..)| *of == stream)
            .map(|(_, seq, _)| seq)
    }

    /// Streams with waiting events, of those that a lane serves.
    pub(crate) fn streams(&self, serves: impl Fn(u8) -> bool) -> Streams {
        let mut heads = BTreeMap::new();
        for (stream, _, attempts) in self.waiting().filter(|(stream, ..)| serves(*stream)) {
            heads.entry(stream_name(stream)).or_insert(attempts);
        }
        Streams::waiting(heads)
    }

    pub(crate) fn highest_written_down(&self) -> i64 {
        let refused = self.refused.keys().map(|(_, seq)| seq);
        refused.chain(self.failed.keys()).copied().max().unwrap_or(0)
    }

    pub(crate) fn fail(&mut self, stream: u8, seq: i64, attempts: u32) {
        self.refused.remove(&(stream, seq));
        self.failed.entry(seq).or_insert(attempts);
    }

    pub(crate) fn park(&mut self, stream: u8, seq: i64, attempts: u32) {
        let new = Refused {
            attempts,
            accepted_in: None,
        };
        let known = self.refused.entry((stream, seq)).or_insert(new);
        known.attempts = known.attempts.max(attempts);
    }

    /// Redis has lost the entries after batch `number` of a lane.
    pub(crate) fn heal(&mut self, serves: impl Fn(u8) -> bool, number: u64) -> bool {
        let mut lost = false;
        let its = self.refused.iter_mut().filter(|((stream, _), _)| serves(*stream));
        for (_, refused) in its {
            if refused.accepted_in.is_some_and(|batch| batch > number) {
                refused.accepted_in = None;
                lost = true;
            }
        }
        lost
    }

    /// Saves the result for an event of this stream; an accepted one was in batch `number`.
    pub(crate) fn record(&mut self, stream: u8, record: Record, number: u64) {
        match record {
            Record::Park { seq, attempts, .. } => self.park(stream, seq, attempts),
            Record::Fail { seq, attempts, .. } => self.fail(stream, seq, attempts),
            Record::Accepted { seq } => {
                if let Some(refused) = self.refused.get_mut(&(stream, seq)) {
                    refused.accepted_in = Some(number);
                }
            }
            Record::RefusedAgain { seq, attempts, .. } => {
                if let Some(refused) = self.refused.get_mut(&(stream, seq)) {
                    refused.attempts = attempts;
                }
            }
        }
    }
}
