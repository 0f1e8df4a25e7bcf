//! How a delivery's connection is, and what a user sees of the delivery.
//!
//! Three types tell of one connection, each on the side that knows it: [`ConnectionState`], in the worker, when to
//! connect and whether batches may be sent; the stage of a [recovery](../../recovery/index.html), what is done between
//! *connecting* and *up* with exactly_once; the state of a [conversation](../../sender/conversation/index.html), in the
//! sender's thread, what was said to Redis and what may be said next.

use crate::time::Now;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectionState {
    /// There is no connection; the next is opened at this time.
    Down { retry_at: Now },
    /// A sender was started. With exactly_once it stays so until the guard is ours and what it says was taken in.
    Connecting,
    /// Batches may be sent.
    Up,
    /// A reply blamed the backend. The replies that are still to come are read, then the connection goes down.
    Draining { retry_at: Now },
    /// Something was refused (exactly_once). It must be written down before another batch is sent.
    Stopped,
}

/// What a user sees as `state` in `outbox.backend_status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Idle,
    Sending,
    Backoff,
    Misconfigured,
    Fenced,
    Copy,
    Full,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Sending => "sending",
            Self::Backoff => "backoff",
            Self::Misconfigured => "misconfigured",
            Self::Fenced => "fenced",
            Self::Copy => "copy",
            Self::Full => "full",
        }
    }
}
