//! Inserting a row of ours is an INSERT to everybody else.
//!
//! As long as the table is as the extension made it, a row goes straight into it: tuple, indexes, no plan. This is the
//! fast way. If the table's owner has added a trigger, a constraint, a generated column, a column, a rule or a policy,
//! the row takes an INSERT statement through rewriter, planner and executor. So all of that holds for it as for any
//! other row.
//!
//! Both ways run with the caller's rights: triggers, policies and expressions of others get those of the publisher, as
//! in a plain INSERT, and never more. Two rights are checked for the tables' owner instead, since publishing needs
//! EXECUTE alone: the right to insert into the table, and the right to look its name up in the schema.
//!
//! An ERROR of other people's code passes through here unchanged, by Postgres's own jump. Therefore the functions that
//! it may cross hold nothing that needs to be dropped, and call Postgres without pgrx's guards, which would keep only a
//! part of it.

use crate::server::error::raise;
use crate::server::report;
use crate::tables::catalog::{EVENT_TYPES, Relations};
use crate::tables::row::attribute;
use crate::tables::trusted;
use crate::tables::trusted::RowKey;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use std::ffi::CStr;

/// What becomes a row, checked and numbered.
#[derive(Clone, Copy)]
pub(crate) struct NewRow {
    pub is_scheduled: bool,
    pub values: [pg_sys::Datum; attribute::SCHEDULED_AT],
    pub nulls: [bool; attribute::SCHEDULED_AT],
    pub key: RowKey,
}

/// Columns that may be null; those before them are always filled in.
const NULLABLE: std::ops::Range<usize> = attribute::DATA - 1..attribute::COUNT;

const INTO_EVENTS: &CStr =
    c"insert into outbox.events (seq, xid, created_at, event_id, backend_number, event_type, source, \
    backend, data, subject, stream, data_schema, publisher_config, max_retries) \
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)";
const INTO_SCHEDULED: &CStr =
    c"insert into outbox.scheduled_events (seq, xid, created_at, event_id, backend_number, event_type, \
    source, backend, data, subject, stream, data_schema, publisher_config, max_retries, scheduled_at) \
    values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)";

// SAFETY: the declarations of Postgres's headers. Without pgrx's guards: see above.
unsafe extern "C-unwind" {
    fn table_open(relation: pg_sys::Oid, lock: pg_sys::LOCKMODE) -> pg_sys::Relation;
    fn table_close(relation: pg_sys::Relation, lock: pg_sys::LOCKMODE);
    fn table_slot_create(relation: pg_sys::Relation, list: *mut *mut pg_sys::List) -> *mut pg_sys::TupleTableSlot;
    fn palloc0(size: usize) -> *mut std::ffi::c_void;
    fn CreateExecutorState() -> *mut pg_sys::EState;
    fn FreeExecutorState(estate: *mut pg_sys::EState);
    fn InitResultRelInfo(
        result: *mut pg_sys::ResultRelInfo,
        relation: pg_sys::Relation,
        index: pg_sys::Index,
        root: *mut pg_sys::ResultRelInfo,
        options: i32,
    );
    fn ExecOpenIndices(result: *mut pg_sys::ResultRelInfo, speculative: bool);
    fn ExecCloseIndices(result: *mut pg_sys::ResultRelInfo);
    fn ExecStoreVirtualTuple(tuple_slot: *mut pg_sys::TupleTableSlot) -> *mut pg_sys::TupleTableSlot;
    fn ExecDropSingleTupleTableSlot(tuple_slot: *mut pg_sys::TupleTableSlot);
    #[cfg(feature = "pg15")]
    fn ExecInsertIndexTuples(
        result: *mut pg_sys::ResultRelInfo,
        tuple_slot: *mut pg_sys::TupleTableSlot,
        estate: *mut pg_sys::EState,
        update: bool,
        no_duplicate_error: bool,
        conflict: *mut bool,
        arbiters: *mut pg_sys::List,
    ) -> *mut pg_sys::List;
    #[cfg(not(feature = "pg15"))]
    fn ExecInsertIndexTuples(
        result: *mut pg_sys::ResultRelInfo,
        tuple_slot: *mut pg_sys::TupleTableSlot,
        estate: *mut pg_sys::EState,
        update: bool,
        no_duplicate_error: bool,
        conflict: *mut bool,
        arbiters: *mut pg_sys::List,
        only_summarizing: bool,
    ) -> *mut pg_sys::List;
    fn GetCurrentCommandId(used: bool) -> pg_sys::CommandId;
    fn CommandCounterIncrement();
    fn PushActiveSnapshot(snapshot: pg_sys::Snapshot);
    fn PopActiveSnapshot();
    fn GetActiveSnapshot() -> pg_sys::Snapshot;
    fn GetTransactionSnapshot() -> pg_sys::Snapshot;
    fn UpdateActiveSnapshotCommandId();
    fn GetUserIdAndSecContext(user: *mut pg_sys::Oid, context: *mut i32);
    fn SetUserIdAndSecContext(user: pg_sys::Oid, context: i32);
    fn raw_parser(text: *const std::ffi::c_char, mode: pg_sys::RawParseMode::Type) -> *mut pg_sys::List;
    fn parse_analyze_fixedparams(
        statement: *mut pg_sys::RawStmt,
        text: *const std::ffi::c_char,
        types: *const pg_sys::Oid,
        count: i32,
        environment: *mut pg_sys::QueryEnvironment,
    ) -> *mut pg_sys::Query;
    fn pg_rewrite_query(query: *mut pg_sys::Query) -> *mut pg_sys::List;
    fn pg_plan_queries(
        queries: *mut pg_sys::List,
        text: *const std::ffi::c_char,
        options: i32,
        params: pg_sys::ParamListInfo,
    ) -> *mut pg_sys::List;
    fn makeParamList(count: i32) -> pg_sys::ParamListInfo;
    fn CreateQueryDesc(
        plan: *mut pg_sys::PlannedStmt,
        text: *const std::ffi::c_char,
        snapshot: pg_sys::Snapshot,
        crosscheck: pg_sys::Snapshot,
        receiver: *mut pg_sys::DestReceiver,
        params: pg_sys::ParamListInfo,
        environment: *mut pg_sys::QueryEnvironment,
        instrument: i32,
    ) -> *mut pg_sys::QueryDesc;
    fn FreeQueryDesc(query: *mut pg_sys::QueryDesc);
    fn ExecutorStart(query: *mut pg_sys::QueryDesc, flags: i32);
    #[cfg(not(feature = "pg18"))]
    fn ExecutorRun(query: *mut pg_sys::QueryDesc, direction: pg_sys::ScanDirection::Type, count: u64, once: bool);
    #[cfg(feature = "pg18")]
    fn ExecutorRun(query: *mut pg_sys::QueryDesc, direction: pg_sys::ScanDirection::Type, count: u64);
    fn ExecutorFinish(query: *mut pg_sys::QueryDesc);
    fn ExecutorEnd(query: *mut pg_sys::QueryDesc);
}

/// A table of ours that rows are inserted into. Plain memory of the current context; what is opened is closed, or given
/// back by the transaction's abort.
#[derive(Clone, Copy)]
pub(crate) struct Insertion {
    relation: pg_sys::Relation,
    way: Way,
}

#[derive(Clone, Copy)]
enum Way {
    /// The table is as the extension made it.
    Straight {
        estate: *mut pg_sys::EState,
        result: *mut pg_sys::ResultRelInfo,
        tuple_slot: *mut pg_sys::TupleTableSlot,
    },
    /// An INSERT statement, planned.
    Statement {
        text: &'static CStr,
        plans: *mut pg_sys::List,
        params: pg_sys::ParamListInfo,
    },
}

impl Insertion {
    /// # Safety
    /// Within a transaction; no frame up to Postgres's holds anything that needs to be dropped.
    pub(crate) unsafe fn open(relations: &Relations, is_scheduled: bool) -> Self {
        let (table, columns, text) = match is_scheduled {
            true => (relations.scheduled, attribute::SCHEDULED_AT, INTO_SCHEDULED),
            false => (relations.events, attribute::COUNT, INTO_EVENTS),
        };
        // SAFETY: the caller's promise. The lock is taken, so nobody changes the table from here on.
        unsafe {
            let relation = table_open(table, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
            let way = match is_ours_alone(relation, columns, &relations.triggers) {
                true => straight(relation),
                false => statement(relation, columns, text),
            };
            Self { relation, way }
        }
    }

    /// Inserts a row; false: somebody's trigger or rule has left it out.
    ///
    /// # Safety
    /// As [`Self::open`]; a row of the table that was opened.
    pub(crate) unsafe fn insert(&self, row: &NewRow) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match self.way {
                Way::Straight {
                    estate,
                    result,
                    tuple_slot,
                } => {
                    insert_straight(self.relation, estate, result, tuple_slot, row);
                    true
                }
                Way::Statement { text, plans, params } => {
                    trusted::inserting(Some(row.key));
                    let inserted = execute(self.relation, text, plans, params, row);
                    trusted::inserting(None);
                    inserted
                }
            }
        }
    }

    /// # Safety
    /// Once.
    pub(crate) unsafe fn close(self) {
        // SAFETY: closes what open() opened; the lock is kept until the end of the transaction, as any writer's.
        unsafe {
            if let Way::Straight {
                estate,
                result,
                tuple_slot,
            } = self.way
            {
                ExecDropSingleTupleTableSlot(tuple_slot);
                ExecCloseIndices(result);
                FreeExecutorState(estate);
            }
            table_close(self.relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        }
    }
}

/// Whether a table is as we made it, as far as INSERT is concerned. A few flags, and its triggers by number: see
/// [`Relations`].
///
/// # Safety
/// An open relation.
unsafe fn is_ours_alone(relation: pg_sys::Relation, columns: usize, ours: &[pg_sys::Oid]) -> bool {
    // SAFETY: the caller's promise; an open relation has all of these.
    unsafe {
        let class = &*(*relation).rd_rel;
        let is_plain = class.relkind as u8 == pg_sys::RELKIND_RELATION
            && !class.relispartition
            && !class.relrowsecurity
            && (*relation).rd_rules.is_null();
        let descriptor = (*relation).rd_att;
        let is_shaped = (*descriptor).natts as usize == columns
            && !NULLABLE.into_iter().any(|index| is_not_null(descriptor, index))
            && !has_constraints((*descriptor).constr);
        is_plain && is_shaped && !has_foreign_triggers((*relation).trigdesc, ours)
    }
}

/// # Safety
/// A valid descriptor, one of its columns (from 0).
unsafe fn is_not_null(descriptor: pg_sys::TupleDesc, index: usize) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(feature = "pg18")]
        let attribute = pg_sys::TupleDescAttr(descriptor, index as i32);
        #[cfg(not(feature = "pg18"))]
        let attribute = (*descriptor).attrs.as_ptr().add(index);
        (*attribute).attnotnull
    }
}

/// CHECK constraints and generated columns. (That our own columns are not null, we see to.)
///
/// # Safety
/// A descriptor's constraints, or null.
unsafe fn has_constraints(constraints: *const pg_sys::TupleConstr) -> bool {
    // SAFETY: the caller's promise.
    let Some(constraints) = (unsafe { constraints.as_ref() }) else {
        return false;
    };
    #[cfg(feature = "pg18")]
    if constraints.has_generated_virtual {
        return true;
    }
    constraints.num_check > 0 || constraints.has_generated_stored
}

/// Whether others' triggers would fire for an INSERT: those of foreign keys and deferred constraints are among them.
///
/// # Safety
/// A relation's triggers, or null.
pub(crate) unsafe fn has_foreign_triggers(triggers: *const pg_sys::TriggerDesc, ours: &[pg_sys::Oid]) -> bool {
    // SAFETY: the caller's promise; the array is as long as it says.
    unsafe {
        let Some(triggers) = triggers.as_ref() else {
            return false;
        };
        let triggers = std::slice::from_raw_parts(triggers.triggers, triggers.numtriggers as usize);
        triggers.iter().any(|trigger| {
            trigger.tgtype as u32 & pg_sys::TRIGGER_TYPE_INSERT != 0
                && trigger.tgenabled as u8 != pg_sys::TRIGGER_DISABLED
                && !ours.contains(&trigger.tgfoid)
        })
    }
}

/// # Safety
/// As [`Insertion::open`]; an open relation.
unsafe fn straight(relation: pg_sys::Relation) -> Way {
    // SAFETY: the executor's own steps.
    unsafe {
        let estate = CreateExecutorState();
        let result = palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
        InitResultRelInfo(result, relation, 0, std::ptr::null_mut(), 0);
        ExecOpenIndices(result, false);
        let tuple_slot = table_slot_create(relation, std::ptr::null_mut());
        Way::Straight {
            estate,
            result,
            tuple_slot,
        }
    }
}

/// # Safety
/// As [`Insertion::insert`], for a table that is ours alone.
unsafe fn insert_straight(
    relation: pg_sys::Relation,
    estate: *mut pg_sys::EState,
    result: *mut pg_sys::ResultRelInfo,
    tuple_slot: *mut pg_sys::TupleTableSlot,
    row: &NewRow,
) {
    // SAFETY: the executor's own steps for one row; the tuple slot's arrays are as long as its descriptor, which was
    // looked at. The tuple slot and the table have these functions always.
    unsafe {
        let columns = (*(*relation).rd_att).natts as usize;
        if let Some(clear) = (*(*tuple_slot).tts_ops).clear {
            clear(tuple_slot);
        }
        (*tuple_slot)
            .tts_values
            .copy_from_nonoverlapping(row.values.as_ptr(), columns);
        (*tuple_slot)
            .tts_isnull
            .copy_from_nonoverlapping(row.nulls.as_ptr(), columns);
        ExecStoreVirtualTuple(tuple_slot);
        let command = GetCurrentCommandId(true);
        if let Some(insert) = (*(*relation).rd_tableam).tuple_insert {
            insert(relation, tuple_slot, command, 0, std::ptr::null_mut());
        }
        let (none, arbiters) = (std::ptr::null_mut(), std::ptr::null_mut());
        #[cfg(feature = "pg15")]
        ExecInsertIndexTuples(result, tuple_slot, estate, false, false, none, arbiters);
        #[cfg(not(feature = "pg15"))]
        ExecInsertIndexTuples(result, tuple_slot, estate, false, false, none, arbiters, false);
    }
}

/// The types of the parameters: those of our columns.
fn types() -> [pg_sys::Oid; attribute::SCHEDULED_AT] {
    let mut types = [pg_sys::TIMESTAMPTZOID; attribute::SCHEDULED_AT];
    types[..attribute::COUNT].copy_from_slice(&EVENT_TYPES);
    types
}

/// Plans an INSERT.
///
/// # Safety
/// As [`Insertion::open`]; an open relation.
unsafe fn statement(relation: pg_sys::Relation, columns: usize, text: &'static CStr) -> Way {
    let types = types();
    // SAFETY: what SPI does; the user is put back, also by the abort after an ERROR.
    unsafe {
        let owner = (*(*relation).rd_rel).relowner;
        CommandCounterIncrement();
        PushActiveSnapshot(GetTransactionSnapshot());
        let parsed = raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
        let (mut user, mut context) = (pg_sys::InvalidOid, 0);
        GetUserIdAndSecContext(&mut user, &mut context);
        // Names are looked up in the owner's name. No code of anybody runs in that.
        SetUserIdAndSecContext(owner, context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32);
        let query = parse_analyze_fixedparams(
            item(parsed, 0).cast(),
            text.as_ptr(),
            types.as_ptr(),
            columns as i32,
            std::ptr::null_mut(),
        );
        SetUserIdAndSecContext(user, context);
        let plans = pg_plan_queries(pg_rewrite_query(query), text.as_ptr(), 0, std::ptr::null_mut());
        for index in 0..length(plans) {
            let plan = item(plans, index).cast::<pg_sys::PlannedStmt>();
            if (*plan).commandType == pg_sys::CmdType::CMD_UTILITY {
                report::guard(refuse_rule);
            }
            insert_by_right_of((*relation).rd_id, owner, plan);
        }
        PopActiveSnapshot();
        let params = makeParamList(columns as i32);
        Way::Statement { text, plans, params }
    }
}

fn refuse_rule() {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_FEATURE_NOT_SUPPORTED,
            "publish_event cannot follow a rule that runs a utility statement",
            "",
        )
        .set_detail("A table of schema outbox has a rule ON INSERT with NOTIFY.")
        .set_hint("Drop the rule; a trigger can do the same."),
    );
}

/// Has the right to insert into our table asked of its owner. All others stay as they are.
///
/// # Safety
/// A plan that nobody else uses.
unsafe fn insert_by_right_of(table: pg_sys::Oid, owner: pg_sys::Oid, plan: *mut pg_sys::PlannedStmt) {
    // SAFETY: the caller's promise; the lists are of these nodes.
    unsafe {
        #[cfg(feature = "pg15")]
        for index in 0..length((*plan).rtable) {
            let entry = item((*plan).rtable, index).cast::<pg_sys::RangeTblEntry>();
            if (*entry).relid == table && (*entry).requiredPerms & pg_sys::ACL_INSERT as pg_sys::AclMode != 0 {
                (*entry).checkAsUser = owner;
            }
        }
        #[cfg(not(feature = "pg15"))]
        for index in 0..length((*plan).permInfos) {
            let entry = item((*plan).permInfos, index).cast::<pg_sys::RTEPermissionInfo>();
            if (*entry).relid == table && (*entry).requiredPerms & pg_sys::ACL_INSERT as pg_sys::AclMode != 0 {
                (*entry).checkAsUser = owner;
            }
        }
    }
}

/// Executes an INSERT for one row, as SPI does; whether a row was inserted.
///
/// # Safety
/// As [`Insertion::insert`]; plans of such a statement.
unsafe fn execute(
    relation: pg_sys::Relation,
    text: &CStr,
    plans: *mut pg_sys::List,
    params: pg_sys::ParamListInfo,
    row: &NewRow,
) -> bool {
    let types = types();
    // SAFETY: the caller's promise; there are as many parameters as columns. An ERROR leaves the snapshot to the abort.
    unsafe {
        let count = (*params).numParams as usize;
        for (index, param) in (*params).params.as_mut_slice(count).iter_mut().enumerate() {
            param.value = row.values[index];
            param.isnull = row.nulls[index];
            param.pflags = pg_sys::PARAM_FLAG_CONST as u16;
            param.ptype = types[index];
        }
        let mut inserted = 0;
        PushActiveSnapshot(GetTransactionSnapshot());
        for index in 0..length(plans) {
            let plan = item(plans, index).cast::<pg_sys::PlannedStmt>();
            CommandCounterIncrement();
            UpdateActiveSnapshotCommandId();
            let query = CreateQueryDesc(
                plan,
                text.as_ptr(),
                GetActiveSnapshot(),
                std::ptr::null_mut(),
                pg_sys::None_Receiver,
                params,
                std::ptr::null_mut(),
                0,
            );
            ExecutorStart(query, 0);
            let forward = pg_sys::ScanDirection::ForwardScanDirection;
            #[cfg(not(feature = "pg18"))]
            ExecutorRun(query, forward, 0, true);
            #[cfg(feature = "pg18")]
            ExecutorRun(query, forward, 0);
            if is_into((*relation).rd_id, plan) {
                inserted += (*(*query).estate).es_processed;
            }
            ExecutorFinish(query);
            ExecutorEnd(query);
            FreeQueryDesc(query);
        }
        PopActiveSnapshot();
        CommandCounterIncrement();
        inserted > 0
    }
}

/// Whether a plan inserts into this table.
///
/// # Safety
/// A valid plan.
unsafe fn is_into(table: pg_sys::Oid, plan: *mut pg_sys::PlannedStmt) -> bool {
    // SAFETY: the caller's promise; result relations are counted from 1 in the range table.
    unsafe {
        (*plan).commandType == pg_sys::CmdType::CMD_INSERT && length((*plan).resultRelations) > 0 && {
            let index = (*(*(*plan).resultRelations).elements).int_value as usize;
            (*item((*plan).rtable, index - 1).cast::<pg_sys::RangeTblEntry>()).relid == table
        }
    }
}

/// # Safety
/// A list or null.
unsafe fn length(list: *const pg_sys::List) -> usize {
    // SAFETY: the caller's promise.
    unsafe { list.as_ref() }.map_or(0, |list| list.length as usize)
}

/// # Safety
/// A list of nodes that has such an element.
unsafe fn item(list: *const pg_sys::List, index: usize) -> *mut std::ffi::c_void {
    // SAFETY: the caller's promise.
    unsafe { (*(*list).elements.add(index)).ptr_value }
}
