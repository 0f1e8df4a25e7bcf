//! What a session caches about backends, by name.
//!
//! It is read with the *latest* snapshot, not the transaction's. So it includes a backend that was made since the
//! transaction began, also by the session's own transaction. It is marked valid before it is read, so that a change in
//! between marks it invalid again.

use crate::tables::row::texts_of_array;
use crate::tables::stream_names::{self, Unnamed};
use crate::tables::whole_table::each_row;
use pgrx::pg_sys;
use relay::event::format::Format;
use relay::event::stream_name::{RESERVED, StreamName};
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use wildmatch::WildMatch;

/// A backend as a publisher needs it.
pub(crate) struct KnownBackend {
    pub number: i32,
    /// Fields that each of its entries has.
    pub own_fields: &'static [&'static str],
    /// Where events go that name no stream; `None`: the setting decides.
    unnamed: Option<Unnamed>,
    /// The backend's own stream; `None`: that of the setting.
    own_stream: Option<String>,
    /// Patterns of allowed streams; `None`: any stream is allowed.
    allowed_streams: Option<Vec<WildMatch>>,
}

impl KnownBackend {
    pub(crate) fn allows(&self, stream: &str) -> bool {
        if stream.starts_with(RESERVED) {
            return false;
        }
        self.allowed_streams
            .as_ref()
            .is_none_or(|patterns| patterns.iter().any(|p| p.matches(stream)))
    }

    /// Where events go that name no stream.
    pub(crate) fn unnamed(&self) -> Unnamed {
        self.unnamed.clone().unwrap_or_else(Unnamed::of_setting)
    }

    /// The current stream of events whose rows name none.
    pub(crate) fn own_stream(&self) -> Cow<'_, str> {
        match &self.own_stream {
            Some(stream) => Cow::Borrowed(stream),
            None => stream_names::plain_setting().map_or(Cow::Borrowed(stream_names::DEFAULT_STREAM), Cow::Owned),
        }
    }
}

thread_local! {
    static VALID: Cell<bool> = const { Cell::new(false) };
    static BACKENDS: RefCell<HashMap<String, Rc<KnownBackend>>> = RefCell::new(HashMap::new());
}

/// Marks the cache as invalid, because backends have changed. Touches only variables of this thread.
pub(super) fn forget() {
    VALID.set(false);
}

/// A backend of this table by name. Costs only a look-up, unless backends have changed.
pub(super) fn find(table: pg_sys::Oid, name: &str) -> Option<Rc<KnownBackend>> {
    if !VALID.get() {
        VALID.set(true);
        let _guard = InvalidOnError;
        let filled = read(table);
        BACKENDS.with_borrow_mut(|known| *known = filled);
    }
    BACKENDS.with_borrow(|known| known.get(name).cloned())
}

/// Marks the cache as invalid if reading ends in an ERROR, because its content is still the earlier one.
struct InvalidOnError;

impl Drop for InvalidOnError {
    fn drop(&mut self) {
        if std::thread::panicking() {
            VALID.set(false);
        }
    }
}

/// Reads the current rows of `outbox.backends`.
fn read(table: pg_sys::Oid) -> HashMap<String, Rc<KnownBackend>> {
    let mut found = HashMap::new();
    const COLUMNS: [&str; 7] = [
        "name",
        "number",
        "stream_name",
        "own_stream",
        "allowed_streams",
        "format",
        "include_lsn",
    ];
    // Opening the table processes pending invalidations, which may mark the cache invalid again: then the next use
    // reads it once more.
    each_row(table, &COLUMNS, |row| {
        let (Some(name), Some(number), Some(streams)) =
            (row.text("name"), row.i32("number"), row.datum("allowed_streams"))
        else {
            return;
        };
        // SAFETY: the column is a text[].
        let patterns = unsafe { texts_of_array(streams) };
        let any = patterns.iter().any(|p| p == "*");
        let allowed_streams = (!any).then(|| patterns.iter().map(|p| WildMatch::new(p)).collect());
        let format = row.text("format").and_then(|word| Format::named(&word));
        let format = format.unwrap_or_default();
        found.insert(
            name,
            Rc::new(KnownBackend {
                number,
                unnamed: row
                    .text("stream_name")
                    .map(|name| Unnamed::of(StreamName::parse(&name))),
                own_stream: row.text("own_stream"),
                own_fields: format.own_fields(row.bool("include_lsn").unwrap_or_default()),
                allowed_streams,
            }),
        );
    });
    found
}
