//! INSERTs with RETURNING or ON CONFLICT that the hooks of [`returning`](super::returning) and
//! [`on_conflict`](super::on_conflict) have missed.
//!
//! They miss the first statement of a session if the library is not preloaded. Planning that statement loads it: the
//! default of `branch` is a function whose support function is ours, and the planner calls that when it simplifies
//! expressions. The planner's last hook runs after that, but before the planner looks for the index of ON CONFLICT
//! and before it copies the rights that the statement needs. The hooks also miss statements on a view or with a rule,
//! which were analysed as statements on another table.

use crate::publish::{on_conflict, returning};
use crate::server::error::strict_arguments;
use pgrx::pg_sys;

/// Does with a query that is planned what those hooks do. Both leave alone what they have seen before.
///
/// # Safety
/// A valid query that may be changed, in a frame that holds nothing.
pub(crate) unsafe fn catch_up(query: *mut pg_sys::Query) {
    // SAFETY: the caller's promise.
    unsafe {
        returning::permit(query);
        on_conflict::complete(query);
    }
}

crate::sql_function!(plan_first_branch, pg_finfo_plan_first_branch);

/// Support function of `outbox.first_branch()`: the planner replaces its call by the constant.
fn plan_first_branch(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
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
}
