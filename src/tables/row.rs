//! Rows of our tables, read without SQL.

use crate::server::datum::{EPOCH_SHIFT_US, bytes_of, utf8_of};
use crate::server::encoding::{has_utf8_form, utf8};
use pgrx::{pg_sys, varlena};
use relay::event::Event;
use relay::reading::range::Key;
use relay::redis::hash_slot::hash_slot_of;
use std::borrow::Cow;

/// Attribute numbers of `outbox.events`, in the order of the SQL script. The first ones are the same in
/// `scheduled_events` and `failed_events`.
pub(crate) mod attribute {
    pub(crate) const SEQ: usize = 1;
    pub(crate) const XID: usize = 2;
    pub(crate) const CREATED_AT: usize = 3;
    pub(crate) const EVENT_ID: usize = 4;
    pub(crate) const BACKEND_NUMBER: usize = 5;
    pub(crate) const PUBLISHED_BY: usize = 6;
    pub(crate) const BRANCH: usize = 7;
    pub(crate) const EVENT_TYPE: usize = 8;
    pub(crate) const SOURCE: usize = 9;
    pub(crate) const BACKEND: usize = 10;
    pub(crate) const DATA: usize = 11;
    pub(crate) const SUBJECT: usize = 12;
    pub(crate) const STREAM: usize = 13;
    pub(crate) const DATA_SCHEMA: usize = 14;
    pub(crate) const PUBLISHER_CONFIG: usize = 15;
    pub(crate) const MAX_RETRIES: usize = 16;
    pub(crate) const COUNT: usize = 16;
    /// Only in `scheduled_events`.
    pub(crate) const SCHEDULED_AT: usize = 17;
}

/// A column that the code relies on.
pub(crate) struct EventColumn {
    pub name: &'static str,
    pub kind: pg_sys::Oid,
}

/// These columns in the order of their numbers. Their values are read and written without asking the catalog.
pub(crate) const EVENT_COLUMNS: [EventColumn; attribute::SCHEDULED_AT] = [
    column("seq", pg_sys::INT8OID),
    column("xid", pg_sys::XID8OID),
    column("created_at", pg_sys::TIMESTAMPTZOID),
    column("event_id", pg_sys::UUIDOID),
    column("backend_number", pg_sys::INT4OID),
    column("published_by", pg_sys::OIDOID),
    column("branch", pg_sys::INT2OID),
    column("event_type", pg_sys::TEXTOID),
    column("source", pg_sys::TEXTOID),
    column("backend", pg_sys::TEXTOID),
    column("data", pg_sys::JSONOID),
    column("subject", pg_sys::TEXTOID),
    column("stream", pg_sys::TEXTOID),
    column("data_schema", pg_sys::TEXTOID),
    column("publisher_config", pg_sys::JSONOID),
    column("max_retries", pg_sys::INT4OID),
    column("scheduled_at", pg_sys::TIMESTAMPTZOID),
];

const fn column(name: &'static str, kind: pg_sys::Oid) -> EventColumn {
    EventColumn { name, kind }
}

/// The most columns that any of our tables may have, including those that users add.
const MAX_COLUMNS: usize = 64;

/// The values of one row, valid as long as the row's buffer is pinned.
pub(crate) struct Row {
    pub(super) values: [pg_sys::Datum; MAX_COLUMNS],
    pub(super) nulls: [bool; MAX_COLUMNS],
    /// The transaction that has written it (the system column xmin); 0 in tables that are read by other means.
    pub(super) written_by: u32,
}

impl Row {
    pub(super) fn empty() -> Self {
        Self {
            values: [pg_sys::Datum::from(0); MAX_COLUMNS],
            nulls: [true; MAX_COLUMNS],
            written_by: 0,
        }
    }

    pub(crate) fn written_by(&self) -> u32 {
        self.written_by
    }

    /// Reads the values of a heap tuple.
    ///
    /// # Safety
    /// `tuple` is a valid tuple of `descriptor`'s table, and stays so for as long as the row is used.
    pub(crate) unsafe fn of(tuple: pg_sys::HeapTuple, descriptor: pg_sys::TupleDesc) -> Self {
        let mut row = Self::empty();
        // SAFETY: the caller's promise; the arrays have room for all columns.
        unsafe {
            Self::expect_room(descriptor);
            pg_sys::heap_deform_tuple(tuple, descriptor, row.values.as_mut_ptr(), row.nulls.as_mut_ptr());
        }
        row
    }

    /// Raises an ERROR if somebody has added more columns to a table than a row can hold.
    ///
    /// # Safety
    /// A valid descriptor.
    pub(super) unsafe fn expect_room(descriptor: pg_sys::TupleDesc) {
        // SAFETY: the caller's promise.
        if unsafe { (*descriptor).natts } as usize > MAX_COLUMNS {
            crate::server::error::internal("a table of outbox_relay has too many columns");
        }
    }

    /// The value of an attribute (from 1), unless it is null.
    pub(crate) fn get(&self, attribute: usize) -> Option<pg_sys::Datum> {
        (!self.nulls[attribute - 1]).then(|| self.values[attribute - 1])
    }

    pub(crate) fn i64(&self, attribute: usize) -> Option<i64> {
        self.get(attribute).map(|d| d.value() as i64)
    }

    pub(crate) fn i32(&self, attribute: usize) -> Option<i32> {
        self.get(attribute).map(|d| d.value() as i32)
    }

    pub(crate) fn uuid(&self, attribute: usize) -> Option<[u8; 16]> {
        // SAFETY: a uuid datum points to 16 bytes.
        self.get(attribute).map(|d| unsafe { *d.cast_mut_ptr::<[u8; 16]>() })
    }

    pub(crate) fn key(&self) -> Key {
        Key {
            xid: self.get(attribute::XID).map_or(0, |d| d.value() as u64),
            seq: self.i64(attribute::SEQ).unwrap_or_default(),
        }
    }

    /// When it was published, in microseconds since 1970.
    pub(crate) fn created_at_us(&self) -> i64 {
        self.i64(attribute::CREATED_AT)
            .unwrap_or_default()
            .saturating_add(EPOCH_SHIFT_US)
    }

    /// A text in UTF-8: the row's own bytes, or a copy if it was compressed, stored out of line or converted.
    pub(crate) fn text(&self, attribute: usize) -> Option<Cow<'_, str>> {
        // SAFETY: the attribute is of a varlena type in the database's encoding, valid as long as the row.
        self.get(attribute).map(|d| unsafe { utf8_of(d) })
    }

    /// Whether its data are too large to be stored in the row itself.
    pub(crate) fn is_large(&self) -> bool {
        // SAFETY: a datum of a varlena type.
        self.get(attribute::DATA)
            .is_some_and(|d| unsafe { varlena::varatt_is_1b_e(d.cast_mut_ptr()) })
    }

    /// Which of its event's rows this is. 0: the first.
    pub(crate) fn branch(&self) -> i16 {
        self.get(attribute::BRANCH).map_or(0, |d| d.value() as i16)
    }

    pub(crate) fn backend_number(&self) -> i32 {
        self.i32(attribute::BACKEND_NUMBER).unwrap_or_default()
    }

    /// The hash slot of its stream, which is the backend's own if the row names none. The name may be expanded into the
    /// current memory context.
    pub(crate) fn hash_slot(&self, own_stream: &str) -> u16 {
        // SAFETY: the attribute is of type text.
        let named = self
            .get(attribute::STREAM)
            .map(|d| unsafe { hash_slot_of_text(bytes_of(d)) });
        named.unwrap_or_else(|| hash_slot_of(own_stream.as_bytes()))
    }

    /// Calls `f` with the row as an event.
    pub(crate) fn with_event<R>(&self, f: impl FnOnce(&Event<'_>) -> R) -> R {
        let texts = EventTexts {
            event_type: self.text(attribute::EVENT_TYPE),
            source: self.text(attribute::SOURCE),
            subject: self.text(attribute::SUBJECT),
            data: self.text(attribute::DATA),
            stream: self.text(attribute::STREAM),
            data_schema: self.text(attribute::DATA_SCHEMA),
            publisher_config: self.text(attribute::PUBLISHER_CONFIG),
        };
        f(&texts.event(self.uuid(attribute::EVENT_ID).unwrap_or_default(), self.created_at_us()))
    }
}

/// The columns of an event that are texts.
pub(crate) struct EventTexts<'a> {
    pub event_type: Option<Cow<'a, str>>,
    pub source: Option<Cow<'a, str>>,
    pub subject: Option<Cow<'a, str>>,
    pub data: Option<Cow<'a, str>>,
    pub stream: Option<Cow<'a, str>>,
    pub data_schema: Option<Cow<'a, str>>,
    pub publisher_config: Option<Cow<'a, str>>,
}

impl EventTexts<'_> {
    pub(crate) fn event(&self, event_id: [u8; 16], created_at_us: i64) -> Event<'_> {
        Event {
            event_id,
            created_at_us,
            event_type: self.event_type.as_deref().unwrap_or_default(),
            source: self.source.as_deref().unwrap_or_default(),
            subject: self.subject.as_deref(),
            data: self.data.as_deref(),
            data_schema: self.data_schema.as_deref(),
            publisher_config: self.publisher_config.as_deref(),
            stream: self.stream.as_deref(),
        }
    }
}

/// The hash slot of a stream's name in the database's encoding. A name that has no UTF-8 form cannot be a stream, but
/// gets a hash slot too, so that a view or a dump does not fail because of it.
pub(crate) fn hash_slot_of_text(name: &[u8]) -> u16 {
    match has_utf8_form(name) {
        // SAFETY: text of a row, in the database's encoding.
        Ok(()) => hash_slot_of(unsafe { utf8(name) }.as_bytes()),
        Err(_) => hash_slot_of(name),
    }
}

/// The elements of a `text[]`, in UTF-8; nulls are left out.
///
/// # Safety
/// The datum is a valid `text[]`.
pub(crate) unsafe fn texts_of_array(datum: pg_sys::Datum) -> Vec<String> {
    // SAFETY: the caller's promise; text is of variable length and int-aligned.
    unsafe {
        let array = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast();
        let (mut values, mut nulls, mut count) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
        pg_sys::deconstruct_array(
            array,
            pg_sys::TEXTOID,
            -1,
            false,
            pg_sys::TYPALIGN_INT as _,
            &mut values,
            &mut nulls,
            &mut count,
        );
        (0..count as usize)
            .filter(|i| !*nulls.add(*i))
            .map(|i| utf8_of(*values.add(i)).into_owned())
            .collect()
    }
}
