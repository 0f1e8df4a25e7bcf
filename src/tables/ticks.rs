//! Takes ticks (a snapshot with its bounds), and flushes the WAL before anything that a tick sees may leave the server.

use crate::tables::catalog::Relations;
use crate::tables::numbers;
use crate::tables::sequence;
use pgrx::pg_sys;
use relay::reading::snapshot::{Snapshot, Tick};

/// Takes a tick, in the order that its bounds rely on (see [`Tick`]). Needs a transaction that has no id. Also returns
/// up to where the WAL must be flushed so that none of the tick's numbers can be drawn again after a crash. `None`: all
/// of it.
pub(crate) fn take(relations: &Relations) -> (Tick, Option<u64>) {
    let low_seq = numbers::highest(relations);
    let next_xid = next_xid();
    let snapshot = snapshot(next_xid);
    let high_seq = numbers::highest(relations);
    // Read after the numbers: each number was written to the page before it was returned.
    let (drawn, drawn_lsn) = sequence::last_record(relations.sequence).unzip();
    // Rows that were inserted without the trigger may have numbers that shared memory does not know.
    let high_seq = high_seq.max(drawn.unwrap_or_default());
    let tick = Tick {
        snapshot,
        next_xid,
        low_seq,
        high_seq,
    };
    (tick, drawn_lsn)
}

/// Whether anything may have happened since the tick, even if it wakes no worker. Costs next to nothing, so that an
/// idle worker stays idle.
pub(crate) fn is_outdated(tick: &Tick) -> bool {
    !tick.is_complete() || next_xid() != tick.next_xid
}

/// The next transaction id: no transaction with this id or a higher one has begun.
pub(crate) fn next_xid() -> u64 {
    // SAFETY: reads the counter under its lock.
    unsafe { pg_sys::ReadNextFullTransactionId().value }
}

/// The latest snapshot with 64-bit ids, as `pg_current_snapshot()` shows it.
fn snapshot(next_xid: u64) -> Snapshot {
    // SAFETY: a snapshot's arrays are as long as its counts say; it is static memory until the next call.
    let (xmin, xmax, running) = unsafe {
        let snapshot = pg_sys::GetLatestSnapshot();
        let running = if (*snapshot).xcnt == 0 {
            &[]
        } else {
            std::slice::from_raw_parts((*snapshot).xip, (*snapshot).xcnt as usize)
        };
        (
            (*snapshot).xmin,
            (*snapshot).xmax,
            running.iter().map(|x| x.into_inner()).collect::<Vec<u32>>(),
        )
    };
    let widen = |xid: u32| widened(xid, next_xid);
    let (xmin, xmax) = (widen(xmin.into_inner()), widen(xmax.into_inner()));
    let running = running
        .into_iter()
        .map(widen)
        .filter(|x| (xmin..xmax).contains(x))
        .collect();
    Snapshot::new(xmin, xmax, running)
}

/// A 32-bit transaction id that is less than 2^31 away from `near`, as 64 bits.
fn widened(xid: u32, near: u64) -> u64 {
    let distance = xid.wrapping_sub(near as u32) as i32;
    near.wrapping_add_signed(i64::from(distance))
}

/// Up to this many transactions that ended between two ticks are examined one by one.
const FEW: usize = 64;

/// Flushes what `tick` sees and `known`, which is durable, does not see. After a crash, ids and numbers that were not
/// flushed would be used again. Returns how far the WAL is flushed.
///
/// A commit that waits for its flush is durable before it is visible. For one that does not, the commit log knows up to
/// where the WAL must be flushed. When the commit of the latest transaction to end is durable, its id and all lower
/// ones cannot be used again; the same holds for numbers when the page of their sequence is durable. Later WAL of other
/// sessions need not be waited for.
///
/// Our own commits that did not wait for their flush (saving, purging) are flushed like others'. A tick could do
/// without them by treating them as still running. But the commit log keeps one position for 32 neighbouring ids, so it
/// would be unknown whether another session's commit below our own is durable. Hence purging starts no step while an
/// event is about to be committed: that commit would flush what purging has written.
pub(crate) fn flush_seen((tick, drawn_lsn): &(Tick, Option<u64>), known: &Snapshot) -> u64 {
    let (Some(ended), Some(mut needed)) = (tick.snapshot.ended_since(known, FEW), *drawn_lsn) else {
        return flush();
    };
    let latest = tick.snapshot.xmax() - 1;
    for xid in ended {
        let id = pg_sys::TransactionId::from(xid as u32);
        // SAFETY: look-ups of transactions that ended a moment ago.
        unsafe {
            if pg_sys::TransactionIdDidCommit(id) {
                needed = needed.max(pg_sys::TransactionIdGetCommitLSN(id));
            } else if xid == latest {
                // The position of an abort in the WAL is not known.
                return flush();
            }
        }
    }
    flush_to(needed);
    flushed()
}

/// How far the WAL is flushed.
fn flushed() -> u64 {
    // SAFETY: reads a position.
    unsafe { pg_sys::GetFlushRecPtr(std::ptr::null_mut()) }
}

/// Flushes the WAL up to `position`, where a record ends, unless it is flushed already.
fn flush_to(position: u64) {
    if flushed() < position {
        // SAFETY: waits for the WAL.
        unsafe { pg_sys::XLogFlush(position) };
    }
}

/// Flushes everything that any earlier snapshot sees and everything that this process has written. Costs nothing if the
/// WAL is already flushed. Returns how far it is flushed.
pub(crate) fn flush() -> u64 {
    /// The sizes of a WAL page's header and of a segment's first header.
    const SHORT_HEADER: u64 = 24;
    const LONG_HEADER: u64 = 40;
    // SAFETY: reads positions and waits for the WAL; the segment size is set at start.
    unsafe {
        let mut position = pg_sys::GetXLogInsertRecPtr();
        // Nothing is inserted directly behind a page's header yet, and a flush up to there would be an ERROR.
        let in_segment = position % pg_sys::wal_segment_size as u64;
        let in_page = position % u64::from(pg_sys::XLOG_BLCKSZ);
        if in_segment == LONG_HEADER {
            position -= LONG_HEADER;
        } else if in_page == SHORT_HEADER && in_segment > u64::from(pg_sys::XLOG_BLCKSZ) {
            position -= SHORT_HEADER;
        }
        flush_to(position);
        position
    }
}

/// The position that entries carry, for events whose ticks needed the WAL `flushed` up to here. A standby that has
/// replayed up to this position shows what the events' transactions have written, because none of their commit records
/// ends after it:
/// - A transaction that waits for its flush, and each COMMIT PREPARED, is visible to snapshots only when its commit
///   record is flushed; the flushed position is read after the snapshot was taken.
/// - The commit of a transaction that does not wait (synchronous_commit = off) is flushed by [`flush_seen`] before its
///   tick counts.
/// - What an earlier tick has seen was flushed then. What an earlier run of the server has seen was flushed before this
///   run started.
///
/// A standby applies a record before it reports it as replayed.
///
/// Under heavy writing the flushed position is often the beginning of a page, and a record may cross that point. A
/// standby gets past it only when the rest is flushed, which an idle server has no reason to do. In that case
/// everything is flushed. The same holds for position 0: this process has flushed nothing yet.
pub(crate) fn replayable(flushed: u64) -> u64 {
    match flushed.is_multiple_of(u64::from(pg_sys::XLOG_BLCKSZ)) {
        true => flushed.max(flush()),
        false => flushed,
    }
}

/// The server's position in the WAL; on a standby, how far it has replayed.
pub(crate) fn here() -> u64 {
    // SAFETY: reads a position.
    match unsafe { pg_sys::RecoveryInProgress() } {
        // SAFETY: as before.
        true => unsafe { pg_sys::GetXLogReplayRecPtr(std::ptr::null_mut()) },
        false => flushed(),
    }
}

/// Whether the synchronous standbys have flushed the WAL up to `position`. True if there are none to wait for.
pub(crate) fn standbys_have(position: u64) -> bool {
    /// Among the positions that sessions wait for, the one up to which standbys have flushed (syncrep.h).
    const SYNC_REP_WAIT_FLUSH: usize = 1;
    // SAFETY: shared memory that lives as long as the server; a position is read atomically.
    unsafe {
        let names = pg_sys::SyncRepStandbyNames;
        if names.is_null() || *names == 0 {
            return true;
        }
        let flushed = &raw const (*pg_sys::WalSndCtl).lsn[SYNC_REP_WAIT_FLUSH];
        flushed.read_volatile() >= position
    }
}
