//! Checks how a trigger function of ours was called.

use crate::server::error::raise;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};

/// When a trigger of ours may be called.
#[derive(Clone, Copy)]
pub(crate) enum When {
    BeforeInsertOfRow,
    /// Before or after the insertion.
    InsertOfRow,
    BeforeRow,
    AfterStatement,
}

/// How many triggers are running, including the one that calls this. A trigger's WHEN is not counted yet.
pub(crate) fn depth() -> i32 {
    // SAFETY: a plain call.
    unsafe { pgrx::direct_function_call::<i32>(pg_sys::pg_trigger_depth, &[]) }.unwrap_or_default()
}

/// The new row of a trigger before each row, and the old row that an update replaces.
pub(crate) fn new_and_old(trigger: &pg_sys::TriggerData) -> (pg_sys::HeapTuple, Option<pg_sys::HeapTuple>) {
    match trigger.tg_event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_UPDATE {
        true => (trigger.tg_newtuple, Some(trigger.tg_trigtuple)),
        false => (trigger.tg_trigtuple, None),
    }
}

/// The data of a trigger, if a trigger of this kind has called the function, on one of these tables (on any table if
/// the list is empty). Otherwise raises an ERROR: a row of another table has other columns, and a statement has no row.
///
/// # Safety
/// Called by Postgres.
pub(crate) unsafe fn expect_trigger<'a>(
    fcinfo: pg_sys::FunctionCallInfo,
    name: &str,
    when: When,
    tables: &[pg_sys::Oid],
) -> &'a pg_sys::TriggerData {
    let refuse = |how: &str| -> ! {
        raise(
            ErrorReport::new(
                PgSqlErrorCode::ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED,
                format!("{name}() can only be called as {how}"),
                "",
            )
            .set_hint("The function belongs to triggers that the extension creates. Drop the trigger that called it."),
        )
    };
    // SAFETY: in a call as a trigger, the context is its TriggerData; other calls are refused.
    unsafe {
        let data = (*fcinfo).context.cast::<pg_sys::TriggerData>();
        if data.is_null() || (*data).type_ != pg_sys::NodeTag::T_TriggerData {
            refuse("a trigger");
        }
        let data = &*data;
        let is_of_row = data.tg_event & pg_sys::TRIGGER_EVENT_ROW != 0;
        let timing = data.tg_event & pg_sys::TRIGGER_EVENT_TIMINGMASK;
        match when {
            When::BeforeInsertOfRow => {
                let is_insert = data.tg_event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_INSERT;
                if !is_insert || !is_of_row || timing != pg_sys::TRIGGER_EVENT_BEFORE {
                    refuse("a trigger before insert, for each row");
                }
            }
            When::InsertOfRow => {
                let is_insert = data.tg_event & pg_sys::TRIGGER_EVENT_OPMASK == pg_sys::TRIGGER_EVENT_INSERT;
                if !is_insert || !is_of_row {
                    refuse("a trigger of insert, for each row");
                }
            }
            When::BeforeRow => {
                if !is_of_row || timing != pg_sys::TRIGGER_EVENT_BEFORE {
                    refuse("a trigger before each row");
                }
            }
            When::AfterStatement => {
                if is_of_row || timing != 0 {
                    refuse("a trigger after a statement");
                }
            }
        }
        if !tables.is_empty() && !tables.contains(&(*data.tg_relation).rd_id) {
            refuse("the trigger of its own tables");
        }
        data
    }
}
