//! Postgres's hooks. Each is a variable of the process that holds one function, so this module takes each of them once.
//! It calls what another library had put there, and what our modules do there, which `_PG_init` lists.
//!
//! No hook here has pgrx's guard: an ERROR of Postgres, of another library's hook or of ours passes through unchanged.
//! So nothing that is called here may hold anything that needs to be dropped when an ERROR leaves it.

use pgrx::pg_sys;
use std::ffi::{c_char, c_int, c_void};

/// What a module does with a statement, or with a part of one.
pub(crate) type OnQuery = unsafe fn(*mut pg_sys::Query);

/// Whether a module lets a statement begin that needs these rights, which Postgres has checked. If not, and if the flag
/// is set, it raises an ERROR.
pub(crate) type OnRights = unsafe fn(*mut pg_sys::List, bool) -> bool;

/// What our modules do with the statements of a session, in this order.
#[derive(Clone, Copy)]
pub(crate) struct StatementHooks {
    /// With a statement that was just analysed. Nobody else uses it yet.
    pub analysed: &'static [OnQuery],
    /// With a statement before it is planned. It may be changed.
    pub planning: &'static [OnQuery],
    /// With each query of a statement whose last paths are about to be made. Its expressions are simplified, its rights
    /// are not copied yet.
    pub planned: &'static [OnQuery],
    /// With the rights that a statement needs, when it begins.
    pub beginning: &'static [OnRights],
}

/// What our modules do in a server that has preloaded the library.
#[derive(Clone, Copy)]
pub(crate) struct ServerHooks {
    /// When shared memory may be requested.
    pub shmem_request: unsafe fn(),
    /// When shared memory exists.
    pub shmem_startup: unsafe fn(),
    /// When an object is created, altered or dropped: with the kind of access, the object's catalog and its OID.
    pub object_access: unsafe fn(pg_sys::ObjectAccessType::Type, pg_sys::Oid, pg_sys::Oid),
}

static mut STATEMENT_HOOKS: StatementHooks = StatementHooks {
    analysed: &[],
    planning: &[],
    planned: &[],
    beginning: &[],
};
static mut SERVER_HOOKS: Option<ServerHooks> = None;

// What other libraries had put there.
static mut ANALYSED_BEFORE: pg_sys::post_parse_analyze_hook_type = None;
static mut PLANNING_BEFORE: pg_sys::planner_hook_type = None;
static mut PLANNED_BEFORE: pg_sys::create_upper_paths_hook_type = None;
static mut BEGINNING_BEFORE: pg_sys::ExecutorCheckPerms_hook_type = None;
static mut SHMEM_REQUEST_BEFORE: pg_sys::shmem_request_hook_type = None;
static mut SHMEM_STARTUP_BEFORE: pg_sys::shmem_startup_hook_type = None;
static mut OBJECT_ACCESS_BEFORE: pg_sys::object_access_hook_type = None;

// SAFETY: the declaration of optimizer/planner.h. Without pgrx's guard: ERRORs pass through.
unsafe extern "C-unwind" {
    fn standard_planner(
        query: *mut pg_sys::Query,
        text: *const c_char,
        options: c_int,
        params: pg_sys::ParamListInfo,
    ) -> *mut pg_sys::PlannedStmt;
}

/// Called once, when the library is loaded.
pub(crate) fn install_for_statements(hooks: StatementHooks) {
    // SAFETY: a process loads its libraries in its one thread.
    unsafe {
        STATEMENT_HOOKS = hooks;
        ANALYSED_BEFORE = pg_sys::post_parse_analyze_hook;
        pg_sys::post_parse_analyze_hook = Some(on_analysed);
        PLANNING_BEFORE = pg_sys::planner_hook;
        pg_sys::planner_hook = Some(on_planning);
        PLANNED_BEFORE = pg_sys::create_upper_paths_hook;
        pg_sys::create_upper_paths_hook = Some(on_planned);
        BEGINNING_BEFORE = pg_sys::ExecutorCheckPerms_hook;
        pg_sys::ExecutorCheckPerms_hook = Some(on_beginning);
    }
}

/// The postmaster calls this once, when it preloads the library. Its children inherit the hooks.
pub(crate) fn install_for_server(hooks: ServerHooks) {
    // SAFETY: the postmaster has one thread, and no child yet.
    unsafe {
        SERVER_HOOKS = Some(hooks);
        SHMEM_REQUEST_BEFORE = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(on_shmem_request);
        SHMEM_STARTUP_BEFORE = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(on_shmem_startup);
        OBJECT_ACCESS_BEFORE = pg_sys::object_access_hook;
        pg_sys::object_access_hook = Some(on_object_access);
    }
}

// SAFETY: only Postgres calls this, with a query that was just made.
unsafe extern "C-unwind" fn on_analysed(
    state: *mut pg_sys::ParseState,
    query: *mut pg_sys::Query,
    jumble: *mut pg_sys::JumbleState,
) {
    // SAFETY: Postgres passes a valid query. The variables were set before this hook was.
    unsafe {
        if let Some(before) = ANALYSED_BEFORE {
            before(state, query, jumble);
        }
        for ours in STATEMENT_HOOKS.analysed {
            ours(query);
        }
    }
}

// SAFETY: only Postgres calls this, with a query that may be changed.
unsafe extern "C-unwind" fn on_planning(
    query: *mut pg_sys::Query,
    text: *const c_char,
    options: c_int,
    params: pg_sys::ParamListInfo,
) -> *mut pg_sys::PlannedStmt {
    // SAFETY: as above. Ours come first, because the call of the other hook is the planning.
    unsafe {
        for ours in STATEMENT_HOOKS.planning {
            ours(query);
        }
        match PLANNING_BEFORE {
            Some(before) => before(query, text, options, params),
            None => standard_planner(query, text, options, params),
        }
    }
}

// SAFETY: only Postgres calls this, with a query that it plans.
unsafe extern "C-unwind" fn on_planned(
    root: *mut pg_sys::PlannerInfo,
    stage: pg_sys::UpperRelationKind::Type,
    input: *mut pg_sys::RelOptInfo,
    output: *mut pg_sys::RelOptInfo,
    extra: *mut c_void,
) {
    // SAFETY: what Postgres gave us. The last stage is reached for each query of a statement that changes data.
    unsafe {
        if let Some(before) = PLANNED_BEFORE {
            before(root, stage, input, output, extra);
        }
        if stage == pg_sys::UpperRelationKind::UPPERREL_FINAL {
            for ours in STATEMENT_HOOKS.planned {
                ours((*root).parse);
            }
        }
    }
}

// SAFETY: only Postgres calls this, with the tables of a statement that begins.
#[cfg(feature = "pg15")]
unsafe extern "C-unwind" fn on_beginning(tables: *mut pg_sys::List, raises: bool) -> bool {
    // SAFETY: Postgres passes a valid list. Its tables hold the rights.
    unsafe { BEGINNING_BEFORE.is_none_or(|before| before(tables, raises)) && may_begin(tables, raises) }
}

// SAFETY: as above.
#[cfg(not(feature = "pg15"))]
unsafe extern "C-unwind" fn on_beginning(tables: *mut pg_sys::List, rights: *mut pg_sys::List, raises: bool) -> bool {
    // SAFETY: Postgres passes valid lists.
    unsafe { BEGINNING_BEFORE.is_none_or(|before| before(tables, rights, raises)) && may_begin(rights, raises) }
}

/// Whether all of our modules let a statement begin.
///
/// # Safety
/// A valid list of the rights that it needs.
unsafe fn may_begin(rights: *mut pg_sys::List, raises: bool) -> bool {
    // SAFETY: the caller's promise. The variable was set before this hook was.
    unsafe {
        let all = STATEMENT_HOOKS.beginning;
        all.iter().all(|ours| ours(rights, raises))
    }
}

// SAFETY: only Postgres calls this, at the only time when space may be requested.
unsafe extern "C-unwind" fn on_shmem_request() {
    // SAFETY: as above.
    unsafe {
        if let Some(before) = SHMEM_REQUEST_BEFORE {
            before();
        }
        if let Some(ours) = SERVER_HOOKS {
            (ours.shmem_request)();
        }
    }
}

// SAFETY: only Postgres calls this, when its shared memory exists.
unsafe extern "C-unwind" fn on_shmem_startup() {
    // SAFETY: as above.
    unsafe {
        if let Some(before) = SHMEM_STARTUP_BEFORE {
            before();
        }
        if let Some(ours) = SERVER_HOOKS {
            (ours.shmem_startup)();
        }
    }
}

// SAFETY: only Postgres calls this, within a transaction.
unsafe extern "C-unwind" fn on_object_access(
    access: pg_sys::ObjectAccessType::Type,
    class: pg_sys::Oid,
    object: pg_sys::Oid,
    part: c_int,
    argument: *mut c_void,
) {
    // SAFETY: the arguments that Postgres gave us, passed on unchanged.
    unsafe {
        if let Some(before) = OBJECT_ACCESS_BEFORE {
            before(access, class, object, part, argument);
        }
        if let Some(ours) = SERVER_HOOKS {
            (ours.object_access)(access, class, object);
        }
    }
}
