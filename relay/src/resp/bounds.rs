//! How large a reply may be. A larger one cannot be Redis's answer to that command; it ends the connection, and no
//! memory is allocated for it.
//!
//! A reply's bytes, items and depth are counted as they arrive, starting with the sizes in its headers. The replies of
//! a search (entries of any size) are not kept as a whole but taken in pieces.

use std::sync::atomic::{AtomicUsize, Ordering};

/// How long a line may be, in any reply. Redis's errors have some hundred bytes.
pub const MAX_LINE: usize = 16 * 1024;
/// In pieces, this many bytes of a string are kept. Names of hosts and groups, and what a search needs, are shorter, or
/// at the beginning.
pub const KEPT_STRING: usize = 256;

/// A guard may name the 10,000 events of a batch, and be of a server with more connections.
const LEAST_GUARD_BYTES: usize = 256 * 1024;
static GUARD_BYTES: AtomicUsize = AtomicUsize::new(0);

/// How many transactions may run at the same time in this server. Must be called before a guard is read.
pub fn expect_running(transactions: usize) {
    /// Two positions with two snapshots each, with ids of up to 15 digits and a comma.
    const OF_EACH: usize = 4 * 16;
    GUARD_BYTES.store(transactions.saturating_mul(OF_EACH), Ordering::Relaxed);
}

/// The limits of the reply to one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// The command, for error messages.
    pub to: &'static str,
    /// The number of received bytes.
    pub bytes: usize,
    /// The number of items in all of its arrays.
    pub items: usize,
    /// The depth of nested arrays.
    pub depth: usize,
    /// Taken piece by piece: the header of an array, a string, a line; for a long string, its header and its beginning.
    /// The rest is not kept.
    pub in_pieces: bool,
}

impl Bounds {
    const fn new(to: &'static str, bytes: usize, items: usize, depth: usize) -> Self {
        Self {
            to,
            bytes,
            items,
            depth,
            in_pieces: false,
        }
    }

    /// A status, a number or an error.
    pub const fn line(to: &'static str) -> Self {
        Self::new(to, MAX_LINE, 0, 0)
    }

    /// Unlimited: for replies that have been received completely.
    pub const ANY: Self = Self::new("a command", usize::MAX, usize::MAX, usize::MAX);
    /// An entry's id.
    pub const XADD: Self = Self::line("XADD");
    pub const TOKEN: Self = Self::new("HMGET of the guard", MAX_LINE + 64, 1, 1);
    pub const CLAIM: Self = Self::new("EXEC of a claim", 4 * MAX_LINE, 3, 1);
    /// It lists modules, each with its arguments.
    pub const HELLO: Self = Self::new("HELLO", 64 * 1024, 2_048, 6);
    pub const MASTER: Self = Self::new("SENTINEL GET-MASTER-ADDR-BY-NAME", MAX_LINE + 64, 2, 1);
    /// A range of slots with a master and four replicas has 500 to 700 bytes, and each slot may be a range.
    pub const SLOTS: Self = Self {
        in_pieces: true,
        ..Self::new("CLUSTER SLOTS", 16 * 1024 * 1024, 2 * 1024 * 1024, 6)
    };
    pub const ENTRIES: Self = Self::pieces("XREVRANGE");
    pub const INFO: Self = Self::pieces("XINFO STREAM");
    pub const GROUPS: Self = Self::pieces("XINFO GROUPS");
    pub const PENDING: Self = Self::pieces("XPENDING");
    pub const CONSUMERS: Self = Self::pieces("XINFO CONSUMERS");

    /// Fields and values. A position lists running transactions, so it may be as long as is possible in this server.
    pub fn guard() -> Self {
        let bytes = GUARD_BYTES.load(Ordering::Relaxed).max(LEAST_GUARD_BYTES);
        Self::new("HGETALL of the guard", bytes, 64, 1)
    }

    /// The reply to a batch: an entry id or an error for each entry, and a number.
    pub const fn executed(commands: usize) -> Self {
        /// An error contains at most a key.
        const OF_EACH: usize = 512;
        Self::new("EXEC", MAX_LINE / 2 + commands * OF_EACH, commands + 1, 1)
    }

    const fn pieces(to: &'static str) -> Self {
        /// Two hundred entries of a few MB each.
        const BYTES: usize = 1 << 30;
        Self {
            in_pieces: true,
            ..Self::new(to, BYTES, usize::MAX, 6)
        }
    }
}
