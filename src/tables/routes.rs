//! Routes (`outbox.routes`): where events go that name no backend.
//!
//! Most databases have none: then a publisher only compares two numbers. Otherwise each session caches what it has read
//! until our tables change.

use crate::tables::catalog;
use crate::tables::missing;
use crate::tables::whole_table::each_row;
use pgrx::pg_sys;
use relay::event::routes::Route;
use relay::event::stream_name::StreamName;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use wildmatch::WildMatch;

thread_local! {
    /// [`catalog::generation`] when the table was last read and was empty.
    static NONE_AT: Cell<Option<u64>> = const { Cell::new(None) };
    /// The rows, and [`catalog::generation`] when they were read.
    static KNOWN: RefCell<Option<(u64, Rc<[Route]>)>> = const { RefCell::new(None) };
}

/// The enabled routes in the order of their numbers; `None`: there are none. Needs a transaction that has processed
/// pending invalidations.
pub(crate) fn all() -> Option<Rc<[Route]>> {
    match NONE_AT.get() == Some(catalog::generation()) {
        true => None,
        false => looked_up(),
    }
}

#[cold]
fn looked_up() -> Option<Rc<[Route]>> {
    let table = catalog::expect_relations().routes;
    if table == pg_sys::InvalidOid {
        missing::table(c"routes");
    }
    // Opening the table processes invalidations, which may change this: then the next use reads the table once more.
    let generation = catalog::generation();
    let known = KNOWN.with_borrow(|known| known.clone());
    let routes = match known {
        Some((read_at, routes)) if read_at == generation => routes,
        _ => {
            let routes: Rc<[Route]> = read(table).into();
            NONE_AT.set(routes.is_empty().then_some(generation));
            KNOWN.with_borrow_mut(|known| *known = Some((generation, routes.clone())));
            routes
        }
    };
    (!routes.is_empty()).then_some(routes)
}

fn read(table: pg_sys::Oid) -> Vec<Route> {
    const COLUMNS: [&str; 6] = ["number", "event_type", "source", "backend", "stream", "enabled"];
    let mut found = Vec::new();
    each_row(table, &COLUMNS, |row| {
        let pattern = |column| row.text(column).map(|text| WildMatch::new(&text));
        let is_enabled = row.bool("enabled") == Some(true);
        if let (Some(number), Some(backend), true) = (row.i32("number"), row.text("backend"), is_enabled) {
            found.push(Route {
                number,
                event_type: pattern("event_type"),
                source: pattern("source"),
                backend,
                stream: row.text("stream").map(|stream| StreamName::parse(&stream)),
            });
        }
    });
    found.sort_by_key(|route| route.number);
    found
}
