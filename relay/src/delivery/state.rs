//! The state of a delivery's connection, and the state of the delivery that a user sees.
//!
//! Three types describe one connection, each from one side. [`ConnectionState`], in the worker, says when to connect
//! and whether batches may be sent. The stage of a [recovery](../../recovery/index.html) is the progress between
//! *connecting* and *up* with exactly_once. The state of a [conversation](../../sender/conversation/index.html), in the
//! sender's thread, is what was said to Redis and what may be said next.

use crate::time::Now;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ConnectionState {
    /// There is no connection; the next one is opened at this time.
    Down { retry_at: Now },
    /// A sender was started. With exactly_once it stays in this state until this server owns the guard and has
    /// processed what it says.
    Connecting,
    /// Batches may be sent.
    Up,
    /// A reply blamed the backend. The remaining replies are read, then the connection goes down.
    Draining { retry_at: Now },
    /// Something was refused (exactly_once). It must be written down before another batch is sent.
    Stopped,
}

/// The column `state` in `outbox.backend_status`.
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
