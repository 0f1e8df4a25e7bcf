//! The tasks of a worker's round, and how long each waits after a failure.

use crate::server::process::Aborted;
use crate::worker::backend::Whose;
use pgrx::PgSqlErrorCode;
use relay::time::patience::Waits;
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Task {
    Load,
    /// Take ticks, and open the table of events.
    Read,
    /// Read for one backend.
    ReadFor(Whose),
    /// Pass rows of others for backends that do not send.
    PassBy,
    /// Save what is unsaved of all backends.
    Save,
    SaveOf(Whose),
    Claim(Whose),
    FinishLanes,
    AddLane(Whose),
    Retry(Whose),
    Move,
    RecordTicks,
    PurgeSent(Whose),
    PurgeFailed,
    PurgeInbox,
    SaveConsumers,
    /// Read which streams were watched before.
    KnowStreams,
    /// Record the stream of the settings.
    NoteStream,
    /// Delete the cursors of deleted backends.
    Forget,
}

impl Task {
    pub(super) fn waits(self) -> Waits {
        let waits = |first_ms, longest_ms| Waits {
            first: Duration::from_millis(first_ms),
            longest: Duration::from_millis(longest_ms),
        };
        match self {
            // All backends wait for this task, so it is tried again soon.
            Self::Read => waits(10, 20),
            Self::Load => waits(20, 500),
            Self::ReadFor(_) => waits(50, 2_000),
            Self::Save | Self::SaveOf(_) | Self::Retry(_) | Self::Move => waits(100, 5_000),
            Self::Claim(_) | Self::FinishLanes | Self::AddLane(_) => waits(100, 5_000),
            Self::PassBy | Self::RecordTicks | Self::SaveConsumers | Self::KnowStreams => waits(1_000, 60_000),
            Self::NoteStream | Self::Forget => waits(1_000, 60_000),
            Self::PurgeSent(_) | Self::PurgeFailed | Self::PurgeInbox => waits(1_000, 60_000),
        }
    }

    pub(super) fn whose(self) -> Option<Whose> {
        match self {
            Self::ReadFor(whose) | Self::SaveOf(whose) | Self::Claim(whose) | Self::AddLane(whose) => Some(whose),
            Self::Retry(whose) | Self::PurgeSent(whose) => Some(whose),
            _ => None,
        }
    }

    /// What the worker was doing, as the beginning of a sentence.
    pub(super) fn doing(self) -> &'static str {
        match self {
            Self::Load => "The worker was loading the backends",
            Self::Read | Self::ReadFor(_) | Self::PassBy => "The worker was reading events",
            Self::Save | Self::SaveOf(_) => "The worker was saving cursors and refused events",
            Self::Claim(_) => "The worker was claiming the guard",
            Self::FinishLanes | Self::AddLane(_) => "The worker was creating or completing the lanes of a cluster",
            Self::Retry(_) => "The worker was sending refused events again",
            Self::Move => "The worker was moving scheduled events that are due",
            Self::RecordTicks => "The worker was recording what was delivered, for retention",
            Self::PurgeSent(_) => "The worker was purging sent events",
            Self::PurgeFailed => "The worker was purging failed events",
            Self::PurgeInbox => "The worker was purging the inbox",
            Self::Forget => "The worker was deleting the cursors of deleted backends",
            Self::SaveConsumers => "The worker was saving information about consumer groups",
            Self::KnowStreams => "The worker was looking up streams with consumer groups",
            Self::NoteStream => "The worker was recording the stream for backends that name none",
        }
    }

    /// Whether events wait for it, or may be repeated without it.
    pub(super) fn is_vital(self) -> bool {
        match self {
            Self::Load | Self::Read | Self::ReadFor(_) | Self::Save | Self::SaveOf(_) | Self::Claim(_) => true,
            Self::FinishLanes | Self::AddLane(_) | Self::Retry(_) | Self::Move => true,
            Self::PassBy | Self::RecordTicks | Self::SaveConsumers | Self::KnowStreams => false,
            Self::NoteStream | Self::Forget => false,
            Self::PurgeSent(_) | Self::PurgeFailed | Self::PurgeInbox => false,
        }
    }

    pub(super) fn hint(self) -> &'static str {
        match self {
            Self::Load => "The backends go on with the settings that were loaded last. The worker tries again shortly.",
            Self::Read | Self::ReadFor(_) => "Events wait. The worker tries again shortly.",
            Self::Claim(_) => "The backend's events wait. The worker tries again shortly.",
            _ => "The worker delivers other events meanwhile, and tries again shortly.",
        }
    }
}

/// Whether the error may be gone in a moment.
pub(super) fn is_lock(error: &Aborted) -> bool {
    [
        PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
        PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED,
        PgSqlErrorCode::ERRCODE_QUERY_CANCELED,
    ]
    .contains(&error.code)
}
