//! The rows that a pass reads.

use crate::model::{Database, Rows};
use crate::sweep::may_move;
use crate::{DELETED, Member, hash_slot, is_damaged, number};
use relay::delivery::Delivery;
use relay::delivery::batch::OpenBatch;
use relay::delivery::cut::{NotEncoded, Offer, Source};
use relay::delivery::flight::BatchedEvent;
use relay::reading::range::Key;
use std::rc::Rc;

pub(crate) struct ScannedRows<'a> {
    pub(crate) database: &'a Database,
    pub(crate) members: &'a [Member],
    pub(crate) is_deleted: bool,
    pub(crate) swept: Option<i64>,
}

pub(crate) struct RowOffer<'a> {
    delivery: &'a Delivery,
    entry: BatchedEvent,
    hash_slot: u16,
}

impl Source for ScannedRows<'_> {
    type Scan = Rows;
    type Offer<'a>
        = RowOffer<'a>
    where
        Self: 'a;

    fn number(&self, scan: &Rows) -> i32 {
        number(self.database.row(scan.seq()).stream)
    }

    fn is_deleted(&mut self, scan: &Rows) -> bool {
        self.is_deleted || self.number(scan) == DELETED
    }

    fn hash_slot(&mut self, scan: &Rows, _reader: usize) -> u16 {
        hash_slot(self.database.row(scan.seq()).stream)
    }

    fn unreadable(&mut self, scan: &Rows) -> Option<String> {
        is_damaged(scan.seq()).then(|| "damaged".to_owned())
    }

    fn awaits_sweep(&mut self, _scan: &Rows, key: Key) -> bool {
        may_move(key.seq, self.swept)
    }

    fn with_event<R>(&mut self, scan: &Rows, reader: usize, f: impl FnOnce(RowOffer<'_>) -> R) -> R {
        let stream = self.database.row(scan.seq()).stream;
        f(RowOffer {
            delivery: &self.members[reader].delivery,
            entry: BatchedEvent {
                seq: scan.seq(),
                stream: Rc::from(format!("stream-{stream}")),
                max_attempts: 1,
                committed_after_us: 0,
            },
            hash_slot: hash_slot(stream),
        })
    }
}

impl Offer for RowOffer<'_> {
    fn delivery(&self) -> &Delivery {
        self.delivery
    }

    fn stream(&self) -> &Rc<str> {
        &self.entry.stream
    }

    fn hash_slot(&self) -> u16 {
        self.hash_slot
    }

    fn is_written_down(&self) -> bool {
        unreachable!("nothing was written down in an earlier life")
    }

    fn buffer(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn encode(self, batch: &mut OpenBatch) -> Result<BatchedEvent, NotEncoded> {
        if self.entry.seq % 29 == 5 {
            return Err(NotEncoded::Impossible("too large".to_owned()));
        }
        // What is built must be sent first.
        if self.entry.seq % 31 == 7 && !batch.entries.is_empty() {
            return Err(NotEncoded::NoMemory);
        }
        batch.bytes.push(0);
        Ok(self.entry)
    }
}
