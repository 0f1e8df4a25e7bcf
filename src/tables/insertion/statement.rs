//! Inserts a row by an INSERT statement through rewriter, planner and executor, so that all triggers, rules,
//! constraints and policies of the table apply.

use crate::server::error::raise;
use crate::server::query_tree::{Rights, all_rights, item, length};
use crate::server::report;
use crate::tables::lent_numbers;
use crate::tables::row::{EVENT_COLUMNS, attribute};
use crate::tables::trusted::NewRow;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use std::ffi::{CStr, CString};
use std::sync::LazyLock;

// SAFETY: the declarations of Postgres's headers. Without pgrx's guards: see the module above.
unsafe extern "C-unwind" {
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

static INTO_EVENTS: LazyLock<CString> = LazyLock::new(|| text("events", attribute::COUNT));
static INTO_SCHEDULED: LazyLock<CString> = LazyLock::new(|| text("scheduled_events", attribute::SCHEDULED_AT));

/// An INSERT into the first `count` columns of a table, with their values as parameters.
fn text(table: &str, count: usize) -> CString {
    let names: Vec<&str> = EVENT_COLUMNS[..count].iter().map(|column| column.name).collect();
    let values: Vec<String> = (1..=count).map(|number| format!("${number}")).collect();
    let (names, values) = (names.join(", "), values.join(", "));
    CString::new(format!("insert into outbox.{table} ({names}) values ({values})")).unwrap_or_default()
}

/// An INSERT, planned. Plain memory of the current context.
#[derive(Clone, Copy)]
pub(super) struct Statement {
    text: &'static CStr,
    plans: *mut pg_sys::List,
    params: pg_sys::ParamListInfo,
}

impl Statement {
    /// # Safety
    /// As [`super::Insertion::open`]; an open relation.
    pub(super) unsafe fn plan(relation: pg_sys::Relation, is_scheduled: bool) -> Self {
        let (text, columns) = match is_scheduled {
            true => (INTO_SCHEDULED.as_c_str(), attribute::SCHEDULED_AT),
            false => (INTO_EVENTS.as_c_str(), attribute::COUNT),
        };
        let types = EVENT_COLUMNS.each_ref().map(|column| column.kind);
        // SAFETY: the same steps as SPI; the user is restored here, or by the abort after an ERROR.
        unsafe {
            let owner = (*(*relation).rd_rel).relowner;
            CommandCounterIncrement();
            PushActiveSnapshot(GetTransactionSnapshot());
            let parsed = raw_parser(text.as_ptr(), pg_sys::RawParseMode::RAW_PARSE_DEFAULT);
            let (mut user, mut context) = (pg_sys::InvalidOid, 0);
            GetUserIdAndSecContext(&mut user, &mut context);
            // Names are looked up with the owner's rights. No user's code runs during that.
            SetUserIdAndSecContext(owner, context | pg_sys::SECURITY_LOCAL_USERID_CHANGE as i32);
            let query = parse_analyze_fixedparams(
                item(parsed, 0).cast(),
                text.as_ptr(),
                types.as_ptr(),
                columns as i32,
                std::ptr::null_mut(),
            );
            SetUserIdAndSecContext(user, context);
            let queries = pg_rewrite_query(query);
            // Before they are planned: the planner's hook refuses what publishers have no right to.
            for index in 0..length(queries) {
                let query = item(queries, index).cast::<pg_sys::Query>();
                insert_by_right_of((*relation).rd_id, owner, all_rights(query));
            }
            let plans = pg_plan_queries(queries, text.as_ptr(), 0, std::ptr::null_mut());
            for index in 0..length(plans) {
                let plan = item(plans, index).cast::<pg_sys::PlannedStmt>();
                if (*plan).commandType == pg_sys::CmdType::CMD_UTILITY {
                    report::guard(refuse_rule);
                }
            }
            PopActiveSnapshot();
            let params = makeParamList(columns as i32);
            Self { text, plans, params }
        }
    }

    /// Executes it for one row, as SPI does. Returns whether a row was inserted.
    ///
    /// # Safety
    /// As [`super::Insertion::insert`].
    pub(super) unsafe fn insert(&self, relation: pg_sys::Relation, row: &NewRow) -> bool {
        // SAFETY: the caller's promise; there are as many parameters as columns. An ERROR leaves the snapshot to the
        // abort.
        unsafe {
            let count = (*self.params).numParams as usize;
            for (index, param) in (*self.params).params.as_mut_slice(count).iter_mut().enumerate() {
                param.value = row.values[index];
                param.isnull = row.nulls[index];
                param.pflags = pg_sys::PARAM_FLAG_CONST as u16;
                param.ptype = EVENT_COLUMNS[index].kind;
            }
            let mut inserted = 0;
            PushActiveSnapshot(GetTransactionSnapshot());
            for index in 0..length(self.plans) {
                let plan = item(self.plans, index).cast::<pg_sys::PlannedStmt>();
                CommandCounterIncrement();
                UpdateActiveSnapshotCommandId();
                let query = CreateQueryDesc(
                    plan,
                    self.text.as_ptr(),
                    GetActiveSnapshot(),
                    std::ptr::null_mut(),
                    pg_sys::None_Receiver,
                    self.params,
                    std::ptr::null_mut(),
                    0,
                );
                lent_numbers::without_lender(|| ExecutorStart(query, 0));
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

/// Has the right to insert into our table checked for its owner. All other rights are still checked for the caller.
///
/// # Safety
/// The list of a query that nobody else uses.
unsafe fn insert_by_right_of(table: pg_sys::Oid, owner: pg_sys::Oid, rights: *mut pg_sys::List) {
    // SAFETY: the caller's promise; the list is of these nodes.
    unsafe {
        for index in 0..length(rights) {
            let entry = item(rights, index).cast::<Rights>();
            if (*entry).relid == table && (*entry).requiredPerms & pg_sys::ACL_INSERT as pg_sys::AclMode != 0 {
                (*entry).checkAsUser = owner;
            }
        }
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
