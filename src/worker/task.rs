//! What a worker does in a round, and how patient it is with each.

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
    /// Save what is unsaved of all.
    Save,
    SaveOf(Whose),
    Claim(Whose),
    FinishLanes,
    AddLane(Whose),
    Retry(Whose),
    Move,
    RecordTicks,
    PurgePublished(Whose),
    PurgeFailed,
}

impl Task {
    pub(super) fn waits(self) -> Waits {
        let waits = |first_ms, longest_ms| Waits {
            first: Duration::from_millis(first_ms),
            longest: Duration::from_millis(longest_ms),
        };
        match self {
            // What all wait for is looked at again and again.
            Self::Read => waits(10, 20),
            Self::Load => waits(20, 500),
            Self::ReadFor(_) => waits(50, 2_000),
            Self::Save | Self::SaveOf(_) | Self::Retry(_) | Self::Move => waits(100, 5_000),
            Self::Claim(_) | Self::FinishLanes | Self::AddLane(_) => waits(100, 5_000),
            Self::RecordTicks | Self::PurgePublished(_) | Self::PurgeFailed => waits(1_000, 60_000),
        }
    }

    pub(super) fn whose(self) -> Option<Whose> {
        match self {
            Self::ReadFor(whose) | Self::SaveOf(whose) | Self::Claim(whose) | Self::AddLane(whose) => Some(whose),
            Self::Retry(whose) | Self::PurgePublished(whose) => Some(whose),
            _ => None,
        }
    }

    /// What it was at, as a sentence begins.
    pub(super) fn doing(self) -> &'static str {
        match self {
            Self::Load => "It was loading the backends",
            Self::Read | Self::ReadFor(_) => "It was reading events",
            Self::Save | Self::SaveOf(_) => "It was saving cursors and what was refused",
            Self::Claim(_) => "It was claiming the guard",
            Self::FinishLanes | Self::AddLane(_) => "It was looking after the lanes of a cluster",
            Self::Retry(_) => "It was trying refused events again",
            Self::Move => "It was moving scheduled events that are due",
            Self::RecordTicks => "It was recording what has been delivered, for retention",
            Self::PurgePublished(_) => "It was purging published events",
            Self::PurgeFailed => "It was purging failed events",
        }
    }

    pub(super) fn hint(self) -> &'static str {
        match self {
            Self::Load => "Backends are served as they were known last. It tries again shortly.",
            Self::Read | Self::ReadFor(_) => "Events wait. It tries again shortly.",
            Self::Claim(_) => "Its events wait. It tries again shortly.",
            _ => "Other events are delivered meanwhile. It tries again shortly.",
        }
    }
}

/// Whether it may be over in a moment.
pub(super) fn is_lock(error: &Aborted) -> bool {
    [
        PgSqlErrorCode::ERRCODE_LOCK_NOT_AVAILABLE,
        PgSqlErrorCode::ERRCODE_T_R_DEADLOCK_DETECTED,
        PgSqlErrorCode::ERRCODE_QUERY_CANCELED,
    ]
    .contains(&error.code)
}
