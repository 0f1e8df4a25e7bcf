//! Numbers that a statement of ours draws for the rows that it publishes again.

use crate::server::txn;
use crate::tables::catalog;
use crate::tables::numbers::draw_numbers;
use crate::tables::row::Row;
use pgrx::{pg_extern, pg_sys};
use std::cell::Cell;

thread_local! {
    /// The lowest and the highest number that `draw_seq` has drawn in the transaction with this id.
    static DRAWN: Cell<(u64, i64, i64)> = const { Cell::new((0, 0, 0)) };
}

/// `outbox.draw_seq()`
#[pg_extern(sql = false)]
fn draw_seq() -> i64 {
    let (xid, seq) = draw_numbers(&catalog::expect_relations());
    let (of, lowest, highest) = DRAWN.get();
    DRAWN.set(match of == xid {
        true => (xid, lowest.min(seq), highest.max(seq)),
        false => (xid, seq, seq),
    });
    txn::published();
    seq
}

/// Whether this transaction has drawn the row's numbers for it.
pub(super) fn has_numbers(row: &Row) -> bool {
    let (xid, lowest, highest) = DRAWN.get();
    let key = row.key();
    // SAFETY: a plain read. A transaction that has drawn numbers has an id.
    let current = unsafe { pg_sys::GetTopFullTransactionIdIfAny().value };
    xid != 0 && key.xid == xid && xid == current && (lowest..=highest).contains(&key.seq)
}
