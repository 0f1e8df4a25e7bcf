//! Reports which of our objects is missing, because somebody has dropped or renamed it. Whatever needs the object is
//! refused or waits; everything else goes on.

use crate::server::error::raise;
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys::panic::ErrorReport;
use std::ffi::CStr;

fn refuse(message: String, detail: &str, hint: String) -> ! {
    let code = PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE;
    raise(ErrorReport::new(code, message, "").set_detail(detail).set_hint(hint))
}

pub(crate) fn extension() -> ! {
    refuse(
        "extension outbox_relay is not installed in this database".to_owned(),
        "There is no schema outbox with its tables.",
        "Run CREATE EXTENSION outbox_relay.".to_owned(),
    )
}

const NOT_WHOLE: &str = "The extension outbox_relay is installed, but an object that belongs to it is missing.";

pub(crate) fn table(name: &CStr) -> ! {
    let name = name.to_string_lossy();
    refuse(
        format!("table outbox.{name} is missing"),
        NOT_WHOLE,
        format!("If it was renamed, restore its name: ALTER TABLE ... RENAME TO {name}."),
    )
}

pub(crate) fn sequence() -> ! {
    refuse(
        "sequence outbox.events_seq_seq is missing".to_owned(),
        NOT_WHOLE,
        "If it was renamed, restore its name: ALTER SEQUENCE ... RENAME TO events_seq_seq.".to_owned(),
    )
}

/// The row of `outbox.installation`. Somebody has emptied all tables, as test frameworks do.
pub(crate) fn installation() -> ! {
    refuse(
        "outbox.installation is empty".to_owned(),
        "Its id is part of the names of guards.",
        "Run INSERT INTO outbox.installation (database) SELECT oid FROM pg_database WHERE datname = current_database();"
            .to_owned(),
    )
}

/// An index that the relay needs.
#[derive(Clone, Copy)]
pub(crate) enum Index {
    Seq,
    Xid,
    EventId,
    ScheduledEventId,
}

impl Index {
    pub(crate) fn refuse(self) -> ! {
        let (message, detail, statement) = match self {
            Self::Seq => (
                "outbox.events has no index on (seq)",
                "The worker reads events through it.",
                "ALTER TABLE outbox.events ADD PRIMARY KEY (seq) INCLUDE (backend_number)",
            ),
            Self::Xid => (
                "outbox.events has no index on (xid, seq)",
                "Events are read by it.",
                "CREATE INDEX events_xid_idx ON outbox.events (xid, seq) INCLUDE (backend_number)",
            ),
            Self::EventId => (
                "outbox.events has no unique index on (event_id, branch)",
                "Without it a repeated event_id would not be noticed.",
                "CREATE UNIQUE INDEX events_event_id_idx ON outbox.events (event_id, branch)",
            ),
            Self::ScheduledEventId => (
                "outbox.scheduled_events has no unique index on (event_id, branch)",
                "Without it a repeated event_id would not be noticed.",
                "ALTER TABLE outbox.scheduled_events ADD PRIMARY KEY (event_id, branch)",
            ),
        };
        refuse(message.to_owned(), detail, format!("Run {statement};"))
    }
}
