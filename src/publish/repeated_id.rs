//! Event ids that are already used. Scheduled events have their ids in another table, so one index alone cannot tell.
//! Whichever table has the id, the error is that of the unique index of `outbox.events`.

use crate::server::report::{self, Constraint};
use crate::tables::catalog::{self, Relations};
use crate::tables::missing::{self, Index};
use crate::tables::row::attribute;
use pgrx::{PgSqlErrorCode, pg_sys};
use relay::fault::{self, Point};
use std::ffi::CStr;

/// What to do with a row whose id, chosen by its publisher, is already used.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum OnRepeat {
    /// Published by one of our functions, by COPY, or by an INSERT without ON CONFLICT: a repeated id is refused.
    Refusing,
    /// Published by an INSERT with ON CONFLICT DO NOTHING: the row is left out.
    LeavingOut,
    /// The statement is not known. If the id is in the same table, that table's index decides.
    Unknown,
}

/// What to look for: an event, or one row of it.
#[derive(Clone, Copy)]
pub(super) enum Sought<'a> {
    Event(&'a [u8; 16]),
    /// A row by id and branch: events that were published before may come back row by row.
    Row(&'a [u8; 16], i16),
}

impl Sought<'_> {
    fn event_id(&self) -> &[u8; 16] {
        let (Self::Event(id) | Self::Row(id, _)) = self;
        id
    }
}

/// False: the id is already used, and the row is to be left out. Raises an ERROR if it is to be refused.
pub(super) fn is_new(relations: &Relations, sought: Sought<'_>, scheduled: bool, on_repeat: OnRepeat) -> bool {
    if relations.scheduled == pg_sys::InvalidOid {
        missing::table(c"scheduled_events");
    }
    let events = (relations.events, Index::EventId);
    let waiting = (relations.scheduled, Index::ScheduledEventId);
    // Both must be there, whichever is asked first.
    for (_, index) in [events, waiting] {
        id_index(relations, index);
    }
    let (own, other) = if scheduled {
        (waiting, events)
    } else {
        (events, waiting)
    };
    let is_used = is_in(other, sought)
        || match (on_repeat, sought) {
            (OnRepeat::Unknown, Sought::Row(..)) => false,
            // The index refuses only the first row of an event. Other rows may be left although the first is gone.
            (OnRepeat::Unknown, Sought::Event(id)) => is_in(own, sought) && !is_in(own, Sought::Row(id, 0)),
            (OnRepeat::Refusing | OnRepeat::LeavingOut, _) => is_in(own, sought),
        };
    if !is_used {
        return true;
    }
    if on_repeat != OnRepeat::LeavingOut {
        refuse(relations, sought.event_id());
    }
    false
}

/// Whether a table has such a row, committed or of this transaction. Usually this reads only the index.
fn is_in((table, index): (pg_sys::Oid, Index), sought: Sought<'_>) -> bool {
    // SAFETY: an index look-up by equality keys of the columns' types. The snapshot is a constant, which also sees
    // rows that the present command has inserted.
    unsafe {
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        fault::reach(Point::BeforeIdLock);
        let (rel, relations) = catalog::open_table(table, lock);
        let key = id_index(&relations, index);
        let mut entries: [pg_sys::ScanKeyData; 2] = std::mem::zeroed();
        let mut equals = |place: usize, column: usize, function: u32, value: pg_sys::Datum| {
            let function = pg_sys::Oid::from(function);
            let equal = pg_sys::BTEqualStrategyNumber as u16;
            pg_sys::ScanKeyInit(&mut entries[place], column as i16, equal, function, value);
        };
        let id = pg_sys::Datum::from(sought.event_id().as_ptr());
        equals(0, attribute::EVENT_ID, pg_sys::F_UUID_EQ, id);
        let count = match sought {
            Sought::Event(_) => 1,
            Sought::Row(_, branch) => {
                equals(1, attribute::BRANCH, pg_sys::F_INT2EQ, pg_sys::Datum::from(branch));
                2
            }
        };
        let snapshot = &raw mut pg_sys::SnapshotSelfData;
        let scan = pg_sys::systable_beginscan(rel, key, true, snapshot, count, entries.as_mut_ptr());
        let found = !pg_sys::systable_getnext(scan).is_null();
        pg_sys::systable_endscan(scan);
        pg_sys::table_close(rel, lock);
        found
    }
}

/// The index of ids. Raises an ERROR if there is none.
pub(super) fn id_index(relations: &Relations, index: Index) -> pg_sys::Oid {
    let key = match index {
        Index::ScheduledEventId => relations.scheduled_id_key,
        _ => relations.events_id_key,
    };
    if key == pg_sys::InvalidOid {
        index.refuse();
    }
    key
}

/// With the message of Postgres's own error, which sessions get that use an id at the same time.
fn refuse(relations: &Relations, event_id: &[u8; 16]) -> ! {
    let id = String::from_utf8_lossy(&relay::event::text::hyphenated(event_id)).into_owned();
    // SAFETY: a catalog look-up; the name lives in the current memory context. The index exists: it has just been used.
    let index = unsafe {
        let name = pg_sys::get_rel_name(relations.events_id_key);
        if name.is_null() {
            c"events_event_id_idx"
        } else {
            CStr::from_ptr(name)
        }
    };
    report::raise_for_constraint(
        PgSqlErrorCode::ERRCODE_UNIQUE_VIOLATION,
        &format!(
            "duplicate key value violates unique constraint \"{}\"",
            index.to_string_lossy()
        ),
        &format!("Key (event_id)=({id}) already exists."),
        "If this is the same event, do not publish it again. Otherwise omit event_id: the event then gets a new one.",
        &Constraint {
            schema: c"outbox",
            table: c"events",
            name: index,
        },
    )
}

/// Which kind of statement inserts the row that this table's trigger was called for.
pub(super) fn way_of_statement(table: pg_sys::Oid) -> OnRepeat {
    // SAFETY: plain calls; the session's running portal, if any, and its plans live as long as it runs.
    unsafe {
        let depth = pgrx::direct_function_call::<i32>(pg_sys::pg_trigger_depth, &[]);
        let portal = pg_sys::ActivePortal;
        // A row that a trigger or a function inserts does not belong to the portal's statement.
        if depth != Some(1) || portal.is_null() {
            return OnRepeat::Unknown;
        }
        if (*portal).commandTag == pg_sys::CommandTag::CMDTAG_COPY {
            return OnRepeat::Refusing;
        }
        let statement = match (*portal).stmts.as_ref() {
            Some(statements) if statements.length == 1 => {
                (*statements.elements).ptr_value.cast::<pg_sys::PlannedStmt>()
            }
            _ => return OnRepeat::Unknown,
        };
        let plan = (*statement).planTree.cast::<pg_sys::ModifyTable>();
        if (*statement).commandType != pg_sys::CmdType::CMD_INSERT
            || plan.is_null()
            || (*plan).plan.type_ != pg_sys::NodeTag::T_ModifyTable
            || !inserts_into(statement, plan, table)
        {
            return OnRepeat::Unknown;
        }
        match (*plan).onConflictAction {
            pg_sys::OnConflictAction::ONCONFLICT_NONE => OnRepeat::Refusing,
            pg_sys::OnConflictAction::ONCONFLICT_NOTHING => OnRepeat::LeavingOut,
            _ => OnRepeat::Unknown,
        }
    }
}

/// # Safety
/// A valid plan of this statement.
unsafe fn inserts_into(
    statement: *const pg_sys::PlannedStmt,
    plan: *const pg_sys::ModifyTable,
    table: pg_sys::Oid,
) -> bool {
    // SAFETY: the caller's promise; relations are counted from 1 in the range table.
    unsafe {
        let index = (*plan).nominalRelation as usize;
        let entries = (*statement).rtable;
        index > 0
            && index <= (*entries).length as usize
            && (*(*(*entries).elements.add(index - 1))
                .ptr_value
                .cast::<pg_sys::RangeTblEntry>())
            .relid
                == table
    }
}
