//! Event ids: UUIDs of version 7 (RFC 9562). They ascend, so their index grows at one end.

use crate::server::datum::EPOCH_SHIFT_US;
use crate::server::random;
use std::cell::RefCell;

/// Random bytes are drawn for this many ids at once: one system call for each id would cost more than the rest of the
/// id.
const POOLED_IDS: usize = 64;
const RANDOM_BYTES: usize = 8;

struct Pool {
    bytes: [u8; POOLED_IDS * RANDOM_BYTES],
    used: usize,
    /// The process that filled the pool. A fork must not use its parent's bytes.
    pid: u32,
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { bytes: [0; POOLED_IDS * RANDOM_BYTES], used: POOLED_IDS * RANDOM_BYTES, pid: 0 }) };
}

/// A new id for the time `now` (microseconds since 2000): 48 bits of milliseconds, 12 bits of their fraction, 62 random
/// bits.
pub(crate) fn new_v7(now: i64) -> [u8; 16] {
    let us = now.saturating_add(EPOCH_SHIFT_US).max(0) as u64;
    let (ms, fraction) = (us / 1_000, (us % 1_000) * 4_096 / 1_000);
    let mut id = [0; 16];
    id[..6].copy_from_slice(&ms.to_be_bytes()[2..]);
    id[6..8].copy_from_slice(&(0x7000 | fraction as u16).to_be_bytes());
    id[8..].copy_from_slice(&random());
    id[8] = 0x80 | (id[8] & 0x3f);
    id
}

fn random() -> [u8; RANDOM_BYTES] {
    POOL.with_borrow_mut(|pool| {
        let pid = std::process::id();
        if pool.used == pool.bytes.len() || pool.pid != pid {
            pool.bytes = random::bytes();
            (pool.used, pool.pid) = (0, pid);
        }
        let mut taken = [0; RANDOM_BYTES];
        taken.copy_from_slice(&pool.bytes[pool.used..pool.used + RANDOM_BYTES]);
        pool.used += RANDOM_BYTES;
        taken
    })
}
