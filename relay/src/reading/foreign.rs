//! Finds rows that did not come through the trigger of `outbox.events`: their transaction ids do not belong to this
//! table's history.
//!
//! A row of ours was written by the transaction whose id it carries, or by a subtransaction of it, whose id is higher
//! and was assigned while the transaction ran. A row that contradicts this comes from another cluster, or from an
//! earlier state of this one.

use crate::reading::snapshot::Tick;
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// How many transactions with a single row are remembered. Beyond that, they are forgotten.
const MOST_SINGLES: usize = 100_000;
/// The maximum distance between ids of transactions in quick succession.
const NEAR: u64 = 8;
/// Lower ids are not used for transactions.
const FIRST_NORMAL: u32 = 3;

/// A row: the transaction id that it carries, and the transaction that wrote it.
#[derive(Clone, Copy, Debug)]
pub struct Written {
    pub seq: i64,
    /// The publishing transaction, from the column xid.
    pub xid: u64,
    /// The transaction that wrote it, from the system column xmin.
    pub xmin: u32,
}

/// Finds foreign rows in one pass over the table.
pub struct Judge {
    known: Tick,
    /// The latest transaction that changed the trigger.
    touched_by: u64,
    /// Whether the table was rewritten (pg_repack), so that the writing transaction of a row tells nothing.
    is_rewritten: bool,
    /// For each writing transaction: the single id that its rows carry, and the row; or `None` if it has brought
    /// foreign rows.
    of_writer: HashMap<u64, Option<(u64, i64)>>,
    found: Vec<i64>,
}

impl Judge {
    /// `known`: a tick from before such rows can have come; `touched_by`: the transaction that has enabled the trigger
    /// again; 0: none yet.
    pub fn new(known: Tick, touched_by: u64, is_rewritten: bool) -> Self {
        Self {
            known,
            touched_by,
            is_rewritten,
            of_writer: HashMap::new(),
            found: Vec::new(),
        }
    }

    /// Examines rows: those that carry another id than their writing transaction, and all other rows of the same
    /// writers. `next_xid` was read after them.
    pub fn look_at(&mut self, rows: &[Written], next_xid: u64) {
        for row in rows.iter().filter(|row| !is_its_own(row, next_xid)) {
            let writer = latest(row.xmin, next_xid);
            if self.contradicts(row, writer, next_xid) {
                self.found.push(row.seq);
                self.gives_away(writer);
            } else if self.tells_of(writer, row.xmin) {
                self.look_at_others(writer, row);
            }
        }
        // A transaction that brought such rows may by chance have brought one that carries its own id.
        for row in rows.iter().filter(|row| is_its_own(row, next_xid)) {
            if self.tells_of(row.xid, row.xmin) && self.of_writer.contains_key(&row.xid) {
                self.look_at_others(row.xid, row);
            }
        }
    }

    /// Whether a row may turn out to be foreign, although not all have been examined. `next_xid` was read after it.
    pub fn suspects(&self, row: &Written, next_xid: u64) -> bool {
        let writer = latest(row.xmin, next_xid);
        match is_its_own(row, next_xid) {
            // A transaction that brought foreign rows may by chance have brought one that carries its own id.
            true => (self.known.next_xid..=self.touched_by).contains(&writer),
            false => self.contradicts(row, writer, next_xid),
        }
    }

    /// The numbers of foreign rows, in order. They include single rows that came between or next to them, each in a
    /// transaction of its own.
    pub fn into_found(mut self) -> Vec<i64> {
        let mut writers: Vec<(u64, Option<(u64, i64)>)> = self.of_writer.drain().collect();
        writers.sort_unstable();
        for _ in 0..2 {
            let mut last_foreign = None;
            for (writer, row) in &mut writers {
                let is_near = last_foreign.is_some_and(|last: u64| writer.abs_diff(last) <= NEAR);
                if let Some((_, seq)) = row.filter(|_| is_near) {
                    self.found.push(seq);
                    *row = None;
                }
                if row.is_none() {
                    last_foreign = Some(*writer);
                }
            }
            // And in the opposite direction.
            writers.reverse();
        }
        self.found.sort_unstable();
        self.found.dedup();
        self.found
    }

    /// Whether a row that carries another id than its writer's cannot have been written by a subtransaction of that id.
    fn contradicts(&self, row: &Written, writer: u64, next_xid: u64) -> bool {
        // A future transaction cannot have published.
        if row.xid >= next_xid {
            return true;
        }
        if row.xmin < FIRST_NORMAL {
            return false;
        }
        let had_ended = self.known.snapshot.sees(row.xid) && writer >= self.known.next_xid;
        let has_early_number = row.xid >= self.known.next_xid && row.seq <= self.known.low_seq;
        // A row that a subtransaction has published at just that time is included. That is harmless, because it is
        // looked for in the streams too.
        let came_meanwhile = writer >= self.known.next_xid && writer < self.touched_by;
        row.xid > writer || (!self.is_rewritten && (had_ended || has_early_number || came_meanwhile))
    }

    /// Whether the other rows of a writer tell anything about a row.
    fn tells_of(&self, writer: u64, xmin: u32) -> bool {
        !self.is_rewritten && xmin >= FIRST_NORMAL && writer >= self.known.next_xid
    }

    /// Marks everything that this transaction wrote as foreign.
    fn gives_away(&mut self, writer: u64) {
        if let Some(Some((_, seq))) = self.of_writer.insert(writer, None) {
            self.found.push(seq);
        }
    }

    /// Compares with the writer's other rows: a transaction or subtransaction publishes under only one id.
    fn look_at_others(&mut self, writer: u64, row: &Written) {
        if self.of_writer.len() >= MOST_SINGLES {
            self.of_writer.clear();
        }
        match self.of_writer.entry(writer) {
            Entry::Vacant(entry) => {
                entry.insert(Some((row.xid, row.seq)));
            }
            Entry::Occupied(entry) => match *entry.get() {
                Some((xid, _)) if xid == row.xid => {}
                Some(_) => {
                    self.found.push(row.seq);
                    self.gives_away(writer);
                }
                None => self.found.push(row.seq),
            },
        }
    }
}

/// Whether a row carries the id of the transaction that wrote it.
fn is_its_own(row: &Written, next_xid: u64) -> bool {
    row.xid as u32 == row.xmin && row.xid < next_xid
}

/// A transaction id as 64 bits: the latest possible one before `next_xid`.
pub fn latest(xid: u32, next_xid: u64) -> u64 {
    const EPOCH: u64 = 1 << 32;
    let xid = (next_xid & !(EPOCH - 1)) | u64::from(xid);
    if xid < next_xid { xid } else { xid.saturating_sub(EPOCH) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(seq: i64, xid: u64, xmin: u32) -> Written {
        Written { seq, xid, xmin }
    }

    fn found(known: &str, rows: &[Written], next_xid: u64) -> Vec<i64> {
        let mut judge = Judge::new(known.parse().unwrap(), 0, false);
        judge.look_at(rows, next_xid);
        judge.into_found()
    }

    #[test]
    fn a_row_of_its_own_transaction_or_of_a_subtransaction_is_ours() {
        let rows = [
            row(60, 110, 110),
            row(61, 110, 111),
            row(62, 110, 113),
            row(40, 90, 95),
            row(41, 101, 104),
            // Frozen at the beginning of the cluster.
            row(1, 90, 2),
        ];
        assert_eq!(found("100:100:/102/30/55", &rows, 120), Vec::<i64>::new());
    }

    #[test]
    fn rows_of_future_or_ended_transactions_are_foreign() {
        let rows = [
            row(60, 140, 110),
            row(61, 500, 111),
            row(62, 113, 112),
            row(63, 99, 114),
            row(64, 95, 130),
        ];
        assert_eq!(found("90:100:95/102/50/55", &rows, 140), [60, 61, 62, 63]);
        // Its number was drawn before its transaction began.
        assert_eq!(found("90:100:95/102/50/55", &[row(50, 104, 112)], 120), [50]);
    }

    /// Before a writer has been given away by its other rows.
    #[test]
    fn rows_are_suspected_that_may_turn_out_to_be_foreign() {
        let judge = |touched_by| Judge::new("100:100:/100/50/55".parse().unwrap(), touched_by, false);
        let suspects = |touched_by, row| judge(touched_by).suspects(&row, 120);
        // By chance it may carry the id of the transaction that has restored it,
        assert!(suspects(112, row(60, 110, 110)) && suspects(112, row(60, 112, 112)));
        // but not if the trigger was enabled before, or if the writer ended before the trigger was touched.
        assert!(!suspects(109, row(60, 110, 110)) && !suspects(112, row(60, 99, 99)));
        assert!(!suspects(0, row(60, 110, 110)));
        // It contradicts by itself.
        assert!(suspects(109, row(60, 130, 110)) && suspects(109, row(60, 99, 110)));
        assert!(!suspects(109, row(60, 110, 112)));
    }

    #[test]
    fn all_rows_of_a_writer_with_several_ids_are_foreign() {
        let rows = [
            row(60, 104, 110),
            row(62, 110, 110),
            row(70, 105, 110),
            row(71, 104, 110),
        ];
        assert_eq!(found("100:100:/100/50/55", &rows, 120), [60, 62, 70, 71]);
        // The first contradicts by itself; the second carries its writer's id by chance; the third came after them.
        let rows = [
            row(80, 112, 112),
            row(81, 99, 112),
            row(82, 122, 122),
            row(83, 122, 124),
        ];
        assert_eq!(found("100:100:/100/50/55", &rows, 130), [80, 81]);
    }

    /// Each row was inserted by its own transaction, with ids of other transactions that had run here shortly before.
    #[test]
    fn rows_from_before_the_trigger_was_enabled_again_are_foreign() {
        let rows = [
            row(60, 104, 112),
            row(61, 105, 113),
            row(62, 114, 114),
            row(63, 125, 130),
        ];
        let mut judge = Judge::new("100:100:/100/50/55".parse().unwrap(), 115, false);
        judge.look_at(&rows, 140);
        assert_eq!(judge.into_found(), [60, 61]);
        assert_eq!(found("100:100:/100/50/55", &rows, 140), Vec::<i64>::new());
    }

    #[test]
    fn single_rows_between_foreign_rows_are_foreign_too() {
        let rows = [
            row(79, 101, 108),
            row(80, 99, 110),
            row(81, 101, 112),
            row(82, 101, 115),
            row(83, 110, 130),
        ];
        assert_eq!(found("100:100:/100/50/55", &rows, 140), [79, 80, 81, 82]);
    }

    #[test]
    fn in_a_rewritten_table_only_future_ids_are_foreign() {
        let mut judge = Judge::new("100:100:/100/50/55".parse().unwrap(), 0, true);
        let rows = [row(1, 20, 110), row(2, 104, 110), row(3, 111, 110), row(4, 120, 110)];
        judge.look_at(&rows, 120);
        assert_eq!(judge.into_found(), [3, 4]);
    }

    #[test]
    fn ids_get_the_latest_possible_epoch() {
        let epoch = 1u64 << 32;
        assert_eq!(latest(7, epoch + 8), epoch + 7);
        assert_eq!(latest(8, epoch + 8), 8);
        assert_eq!(latest(u32::MAX, epoch + 8), epoch - 1);
        let rows = [row(101, epoch + 7, 7), row(102, epoch - 1, u32::MAX)];
        assert_eq!(found("100:100:/100/50/55", &rows, epoch + 8), Vec::<i64>::new());
    }
}
