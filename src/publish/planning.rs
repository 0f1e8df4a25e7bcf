//! INSERTs with RETURNING or ON CONFLICT that the hooks of [`returning`](super::returning) and
//! [`on_conflict`](super::on_conflict) have missed.
//!
//! They miss the first statement of a session if the library is not preloaded. Planning that statement loads it: the
//! default of `branch` is a function whose support function is ours, and the planner calls that when it simplifies
//! expressions. The planner's last hook, here, runs after that, but before the planner looks for the index of ON CONFLICT
//! and before it copies the rights that the statement needs. The hooks also miss statements on a view or with a rule,
//! which were analysed as statements on another table.

use crate::publish::{on_conflict, returning};
use crate::server::error::strict_arguments;
use crate::server::report;
use pgrx::pg_sys;
use std::ffi::c_void;

static mut PREVIOUS_HOOK: pg_sys::create_upper_paths_hook_type = None;

/// Called once, when the library is loaded.
pub(crate) fn install() {
    // SAFETY: a process loads its libraries in its one thread.
    unsafe {
        PREVIOUS_HOOK = pg_sys::create_upper_paths_hook;
        pg_sys::create_upper_paths_hook = Some(on_planned);
    }
}

// No pg_guard: an ERROR of another library's hook passes; nothing here needs to be dropped.
// SAFETY: called by Postgres alone, with a query that is its own to change.
unsafe extern "C-unwind" fn on_planned(
    root: *mut pg_sys::PlannerInfo,
    stage: pg_sys::UpperRelationKind::Type,
    input: *mut pg_sys::RelOptInfo,
    output: *mut pg_sys::RelOptInfo,
    extra: *mut c_void,
) {
    // SAFETY: what Postgres gave us.
    unsafe {
        if let Some(previous) = PREVIOUS_HOOK {
            previous(root, stage, input, output, extra);
        }
        let query = (*root).parse;
        if stage == pg_sys::UpperRelationKind::UPPERREL_FINAL
            && (*query).commandType == pg_sys::CmdType::CMD_INSERT
            && !((*query).returningList.is_null() && (*query).onConflict.is_null())
        {
            returning::permit(query);
            on_conflict::complete(query);
        }
    }
}

crate::sql_function!(plan_first_branch, pg_finfo_plan_first_branch);

/// Support function of `outbox.first_branch()`: the planner replaces its call by the constant.
// No pg_guard: as the other functions that are declared by hand.
#[unsafe(no_mangle)]
extern "C-unwind" fn plan_first_branch(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    report::guard(|| {
        // Other requests of the planner get no answer.
        let nothing = pg_sys::Datum::from(0);
        let Some([request]) = strict_arguments(fcinfo) else {
            return nothing;
        };
        // SAFETY: the tag of the planner's request names its type. SQL cannot pass an argument of type internal.
        unsafe {
            if (*request.cast_mut_ptr::<pg_sys::Node>()).type_ != pg_sys::NodeTag::T_SupportRequestSimplify {
                return nothing;
            }
            let zero = pg_sys::Datum::from(0i16);
            let constant = pg_sys::makeConst(pg_sys::INT2OID, -1, pg_sys::InvalidOid, 2, zero, false, true);
            pg_sys::Datum::from(constant)
        }
    })
}
