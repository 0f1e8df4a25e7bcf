//! Consumer groups of a backend's streams: what is known of them, and what may be trimmed.
//!
//! With `trim = 'length'` XADD trims each stream to `max_len`, whoever has read what. With `trim = 'read'` nothing is
//! trimmed by length. Once a second the sender surveys some of the backend's streams:
//!
//! ```text
//! worker: due ──(order Survey: streams, each with what to trim)──▶ sender, between two batches
//!                                              EVAL trim script ▶ XLEN, XINFO GROUPS ▶ XPENDING, XINFO CONSUMERS
//! worker: Readership::surveyed ◀──(report Surveyed: lengths, groups)────┘
//!    ├─ rows of outbox.consumer_groups, for the view
//!    ├─ what all groups have acknowledged: the goal of the next trimming
//!    └─ how many entries each stream has room for: without room, the backend waits (`full`)
//! ```
//!
//! - [`group`] what Redis says of a stream and its groups; [`trim`] what may be trimmed because of that
//! - [`readership`] all streams of one backend: which are asked next, how full they are, who holds them back
//!
//! What a group has acknowledged are the entries before the oldest one that is pending, and before the one that was
//! delivered last. The lowest of all groups counts; that entry itself stays. So a stream never becomes empty, and a
//! search for the last batch's events can tell by the newest entry whether others were added behind it.
//!
//! **No group loses an entry.** Groups are made, and set back, while a survey is under way. Therefore the script looks
//! at the groups once more, and trims in the same step or not at all.
//!
//! **Recovery finds what it needs.** It looks for the events of the last batch that the guard names. A survey at batch
//! `n` sees entries of batches up to `n`, and its goal is trimmed to after the guard names a later batch. So no state
//! that Redis may come back with lacks entries of the batch that its own guard names. An idle backend sends an empty
//! batch for that.
//!
//! **Full.** The whole backend waits, or in a cluster the lane, not the stream alone: the reader stops before the event
//! that has no room, as it does when the window is full. This keeps the order without a record of each event that
//! waits. A stream has at most `max_len` entries: those that the survey found, and those that were sent since. Of a
//! stream that was not surveyed yet only a part of that is assumed, and the backend's own stream is surveyed first.
//!
//! Bounds: [`readership::ASKED_AT_ONCE`] streams a second; of a stream [`group::MOST_GROUPS`] groups; if a stream has
//! more, it is not trimmed.

pub mod group;
pub mod readership;
pub mod trim;
