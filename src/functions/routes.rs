//! What SQL needs for routes: the trigger that refuses a stream which is not a valid template, and pattern matching.

use crate::server::datum::bytes_of;
use crate::server::encoding::utf8_in_context;
use crate::server::error::{raise, strict_arguments};
use crate::server::trigger_call::{When, expect_trigger, new_and_old};
use crate::tables::catalog;
use crate::tables::whole_table::Columns;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_sys};
use relay::event::stream_name::{Fault, StreamName};
use wildmatch::WildMatch;

crate::sql_function!(check_route, pg_finfo_check_route);

/// `outbox.check_route()`, trigger of `outbox.routes`, before each row is inserted or updated
fn check_route(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let routes = catalog::expect_relations().routes;
    // SAFETY: called by Postgres; a trigger of this kind has a row, and an update the new one too.
    unsafe {
        let trigger = expect_trigger(fcinfo, "check_route", When::BeforeRow, &[routes]);
        (*fcinfo).isnull = false;
        let (new, _) = new_and_old(trigger);
        let columns = Columns::of(trigger.tg_relation, &["stream"]);
        let row = columns.take_apart(new);
        row.expect_short();
        let stream = row.text("stream");
        if let Some(Err(fault)) = stream.map(|stream| StreamName::parse(&stream)) {
            refuse(&fault);
        }
        pg_sys::Datum::from(new)
    }
}

fn refuse(fault: &Fault) -> ! {
    raise(
        ErrorReport::new(
            PgSqlErrorCode::ERRCODE_CHECK_VIOLATION,
            format!("stream of the route {fault}"),
            "",
        )
        .set_detail(fault.detail())
        .set_hint(fault.hint()),
    )
}

crate::sql_function!(matches, pg_finfo_matches);

/// `outbox.matches(name, pattern)`, strict
fn matches(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let Some(texts) = strict_arguments::<2>(fcinfo) else {
        return pg_sys::Datum::from(0);
    };
    // SAFETY: arguments of type text.
    let [name, pattern] = texts.map(|text| unsafe { utf8_in_context(bytes_of(text)) });
    pg_sys::Datum::from(WildMatch::new(pattern).matches(name))
}
