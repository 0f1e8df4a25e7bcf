//! Consumer groups of a backend's streams: what is known about them, and what may be trimmed.
//!
//! With `trim = 'length'`, XADD trims each stream to `max_len`, whether or not its entries were read. With `trim =
//! 'read'`, nothing is trimmed by length. Once a second the sender surveys some of the backend's streams:
//!
//! ```text
//! worker: due ──(order Survey: streams, each with what to trim)──▶ sender, between two batches
//!                                  EVAL trim script ▶ XLEN, XINFO GROUPS, last id ▶ XPENDING, XINFO CONSUMERS
//! worker: Readership::surveyed ◀──(report Surveyed: lengths, groups)────┘
//!    ├─ rows of outbox.consumer_groups, for outbox.consumers and outbox.health()
//!    ├─ what all groups have acknowledged: the goal of the next trimming
//!    └─ how many entries each stream has room for: without room, the backend waits (`full`)
//! ```
//!
//! - [`group`] what Redis reports about a stream and its groups; [`trim`] what may be trimmed as a result
//! - [`readership`] all streams of one backend: which are surveyed next, how full they are, which groups hold them back
//!
//! A group has acknowledged the entries before its oldest pending one, and before the one that was delivered last. If
//! it was set ahead of the stream's end (XGROUP SETID), that is the last entry at the time of the survey. The lowest of
//! all groups counts, and that entry itself stays. So a stream never becomes empty, and a search for the last batch's
//! events can tell by the newest entry whether others were added behind it.
//!
//! **No group loses an entry.** Groups may be created or set back during a survey. Therefore the script examines the
//! groups once more, and trims in the same step or not at all.
//!
//! **Recovery finds what it needs.** Recovery looks for the events of the last batch that the guard names. A survey at
//! batch `n` sees entries of batches up to `n`, and its goal is trimmed to only after the guard names a later batch. So
//! in every state that Redis may come back with, the entries of the batch that its guard names are there. An idle
//! backend sends an empty batch to move the guard on.
//!
//! **Full.** Not only the stream waits, but the whole backend (in a cluster, the lane): the reader stops before the
//! event that has no room, as it does when the window is full. This keeps the order without a record of each waiting
//! event. The length of a stream is at most what the survey found plus what was sent since. For a stream that was not
//! surveyed yet only a part of `max_len` is assumed to be free, and the backend's own stream is surveyed first.
//!
//! Bounds: [`readership::ASKED_AT_ONCE`] streams a second, [`group::MOST_GROUPS`] groups of each stream, and
//! [`group::MOST_GROUPS_AT_ONCE`] of all of them. A stream with more groups is not trimmed; streams for whose groups
//! there was no room are asked about in the next second.

pub mod group;
pub mod readership;
pub mod trim;
