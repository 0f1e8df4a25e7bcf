//! The states of a conversation. Each holds only what exists in that state.
//!
//! ```text
//! Unclaimed ── claim ──▶ Claiming ── our token ──▶ Armed ◀───────── all found ─────────── Searching
//!                                                  │ ▲ └──────────── look ───────────────────▲
//!                                                batch └───────────── our token ───────────┐
//!                                                  ▼                                       │
//! (Surveying: as searching)
//!              Executing ── executed ──▶ (Replicating ── enough replicas ──▶) ──────▶ Rearming
//!                  └──── something was refused ──▶ Stopped ── resume ────────────────────▶─┘
//! ```

use crate::delivery::flight::Refusal;
use crate::sender::orders::Batch;
use crate::sender::survey::Survey;
use crate::sender::tails::Search;

#[derive(Default)]
pub(super) enum ConversationState {
    /// The guard is being read, or was reported and a claim is expected.
    #[default]
    Unclaimed,
    /// The claim was sent. The guard is ours when this token is read back.
    Claiming { token: String },
    /// The token was read under WATCH and is ours. Nothing is in flight, so the next EXEC may be sent.
    Armed { token: String },
    /// As armed; events are being looked for.
    Searching { token: String, search: Box<Search> },
    /// As armed; Redis is being asked about consumer groups.
    Surveying { token: String, survey: Box<Survey> },
    /// The EXEC of a batch was sent.
    Executing {
        token: String,
        batch: WrittenBatch,
        next: Next,
    },
    /// The batch is appended and waits for replicas. Nothing may follow it, because a further WAIT would be queued.
    Replicating {
        token: String,
        batch: WrittenBatch,
        refused: Vec<Refusal>,
    },
    /// WATCH and HMGET for the token were sent: no EXEC may be sent before the answer.
    Rearming { token: String, next: Next },
    /// Something was refused: nothing is sent before [`Order::Resume`](crate::sender::orders::Order::Resume).
    Stopped { token: String },
}

impl ConversationState {
    /// The token of our claim.
    pub(super) fn token(&self) -> Option<&str> {
        match self {
            Self::Unclaimed => None,
            Self::Claiming { token }
            | Self::Armed { token }
            | Self::Searching { token, .. }
            | Self::Surveying { token, .. }
            | Self::Executing { token, .. }
            | Self::Replicating { token, .. }
            | Self::Rearming { token, .. }
            | Self::Stopped { token } => Some(token),
        }
    }

    /// Batches that were written and are not finished.
    pub(super) fn batches(&self) -> impl Iterator<Item = &WrittenBatch> {
        let (batch, next) = match self {
            Self::Executing { batch, next, .. } => (Some(batch), Some(next)),
            Self::Replicating { batch, .. } => (Some(batch), None),
            Self::Rearming { next, .. } => (None, Some(next)),
            Self::Unclaimed
            | Self::Claiming { .. }
            | Self::Armed { .. }
            | Self::Searching { .. }
            | Self::Surveying { .. }
            | Self::Stopped { .. } => (None, None),
        };
        let queued = next.and_then(|next| match next {
            Next::Batch(batch) => Some(batch),
            Next::Nothing | Next::Search(_) | Next::Survey(_) => None,
        });
        batch.into_iter().chain(queued)
    }
}

/// What begins when the token has been read again.
pub(super) enum Next {
    Nothing,
    /// Its commands are queued in Redis; its EXEC is not sent yet.
    Batch(WrittenBatch),
    Search(Box<Search>),
    Survey(Box<Survey>),
}

/// A batch whose commands were written.
pub(super) struct WrittenBatch {
    pub(super) batch: Batch,
    pub(super) kind: Kind,
    /// Errors of commands that were not queued.
    pub(super) unqueued: Vec<Refusal>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Batch,
    Beat,
    Release,
}

/// What the next reply answers.
pub(super) enum Expect {
    /// The HSET that takes the guard from its owner.
    Ousting,
    Watch,
    Guard,
    /// MULTI of a claim, or a command queued for it: only an error matters.
    Claiming,
    ClaimExec,
    Token,
    /// Command number `next` of a batch of `commands`: MULTI, then the entries, then HSET.
    Queued {
        next: usize,
        commands: usize,
    },
    Exec,
    /// WAIT, and what was reported when it found too few replicas before.
    Replicas {
        reported: Option<String>,
    },
    Discard,
    Search,
    Survey,
}
