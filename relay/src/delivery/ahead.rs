//! Rows behind the acknowledged position that must not be sent if they are read again: they were accepted although the
//! backend refused an earlier one, or they are written down. They are forgotten when the acknowledged position has
//! passed them.

use std::collections::BTreeSet;

#[derive(Default)]
pub(super) struct Ahead {
    rows: BTreeSet<i64>,
    /// Those of them that were read since the last batch: before the current piece, and in it.
    aside: Vec<i64>,
    piece: Vec<i64>,
    /// Those of them that were found in their streams. That is not written down, so the next owner must look again.
    found: BTreeSet<i64>,
}

impl Ahead {
    pub(super) fn insert(&mut self, seq: i64) {
        self.rows.insert(seq);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    pub(super) fn contains(&self, seq: i64) -> bool {
        self.rows.contains(&seq)
    }

    /// These were found in their streams. Those that were found earlier may be gone.
    pub(super) fn find(&mut self, seqs: impl IntoIterator<Item = i64>) {
        for seq in std::mem::take(&mut self.found) {
            self.rows.remove(&seq);
        }
        self.found.extend(seqs);
        self.rows.extend(&self.found);
    }

    pub(super) fn has_found(&self) -> bool {
        !self.found.is_empty()
    }

    /// A row was read and is not sent.
    pub(super) fn skip(&mut self, seq: i64) {
        self.rows.insert(seq);
        self.piece.push(seq);
    }

    /// The current piece was read.
    pub(super) fn end_piece(&mut self) {
        self.aside.append(&mut self.piece);
    }

    /// A batch takes along what was read since the last one. See [`Self::forget`].
    pub(super) fn take_aside(&mut self) -> Vec<i64> {
        std::mem::take(&mut self.aside)
    }

    /// What was read since the last batch will be read again.
    pub(super) fn rewind(&mut self) {
        self.aside.clear();
        self.piece.clear();
    }

    /// The acknowledged position has passed these.
    pub(super) fn forget(&mut self, seqs: &[i64]) {
        for seq in seqs {
            self.rows.remove(seq);
            self.found.remove(seq);
        }
    }

    /// Forgets which rows there are.
    pub(super) fn clear(&mut self) {
        self.rows.clear();
        self.found.clear();
    }
}
