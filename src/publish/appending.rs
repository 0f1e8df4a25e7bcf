//! From a checked request to its rows: one row, or several if the event goes to several streams.

use crate::publish::destinations::{Destination, check};
use crate::publish::doubts;
use crate::publish::repeated_id::{self, OnRepeat, Sought};
use crate::publish::request::Request;
use crate::server::datum::text_datum;
use crate::server::encoding::to_server;
use crate::server::txn;
use crate::server::uuid;
use crate::tables::catalog::Relations;
use crate::tables::insertion::Insertion;
use crate::tables::missing;
use crate::tables::numbers::draw_numbers;
use crate::tables::row::attribute;
use crate::tables::trusted::{NewRow, RowKey};
use pgrx::pg_sys;

/// The rows of an event, in plain memory of the current context.
#[derive(Clone, Copy)]
pub(super) struct Prepared {
    pub first: NewRow,
    pub further: Branches,
}

/// All rows of an event except the first.
#[derive(Clone, Copy)]
pub(super) struct Branches {
    first: *const Branch,
    count: usize,
}

/// The values in which one of these rows differs from the first.
#[derive(Clone, Copy)]
pub(super) struct Branch {
    seq: i64,
    backend_number: i32,
    backend: pg_sys::Datum,
    stream: Option<pg_sys::Datum>,
}

impl Branches {
    pub(super) const NONE: Self = Self {
        first: std::ptr::null(),
        count: 0,
    };

    /// The rows for these destinations, with these numbers. `named`: the stream that the event names.
    pub(super) fn of<'d>(
        destinations: impl ExactSizeIterator<Item = (i64, &'d Destination)>,
        named: Option<&[u8]>,
    ) -> Self {
        let count = destinations.len();
        if count == 0 {
            return Self::NONE;
        }
        let named = named.map(text_datum);
        // SAFETY: memory of the current context, of sufficient size.
        unsafe {
            let first = pg_sys::palloc(size_of::<Branch>() * count).cast::<Branch>();
            for (index, (seq, destination)) in destinations.enumerate() {
                first.add(index).write(Branch {
                    seq,
                    backend_number: destination.backend_number,
                    backend: text_datum(&to_server(&destination.backend)),
                    stream: destination.stream.as_ref().map(|s| text_datum(&to_server(s))).or(named),
                });
            }
            Self { first, count }
        }
    }

    /// One of these rows (counted from 0). All other values are those of the first row.
    fn row(&self, index: usize, first: &NewRow) -> NewRow {
        // SAFETY: the index is below the number of rows.
        let branch = unsafe { *self.first.add(index) };
        let mut row = *first;
        row.set(attribute::SEQ, Some(pg_sys::Datum::from(branch.seq)));
        row.set(
            attribute::BACKEND_NUMBER,
            Some(pg_sys::Datum::from(branch.backend_number)),
        );
        row.set(attribute::BRANCH, Some(pg_sys::Datum::from(index as i16 + 1)));
        row.set(attribute::BACKEND, Some(branch.backend));
        row.set(attribute::STREAM, branch.stream);
        row.key.seq = branch.seq;
        row.key.backend_number = branch.backend_number;
        row
    }
}

/// Checks an event and makes its rows. The result needs no drop, because other people's code may run from here on, and
/// its ERRORs may pass.
pub(super) fn prepared(request: &Request<'_>, relations: &Relations) -> Prepared {
    expect_writable();
    let destinations = check(request).unwrap_or_else(|e| e.raise());
    let checked = &destinations.first;
    doubts::say(request);
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    let scheduled_at = request.scheduled_at.filter(|at| *at > now);
    if scheduled_at.is_some() && relations.scheduled == pg_sys::InvalidOid {
        missing::table(c"scheduled_events");
    }
    let event_id = request.event_id.unwrap_or_else(|| uuid::new_v7(now));
    if request.event_id.is_some() {
        let sought = Sought::Event(&event_id);
        repeated_id::is_new(relations, sought, scheduled_at.is_some(), OnRepeat::Refusing);
    }
    let (xid, seq) = draw_numbers(relations);
    let key = RowKey {
        xid,
        seq,
        backend_number: checked.backend_number,
        event_id,
    };

    let mut values = [pg_sys::Datum::from(0); attribute::SCHEDULED_AT];
    let mut nulls = [true; attribute::SCHEDULED_AT];
    let mut set = |attribute: usize, datum: pg_sys::Datum| {
        values[attribute - 1] = datum;
        nulls[attribute - 1] = false;
    };
    set(attribute::SEQ, pg_sys::Datum::from(seq));
    set(attribute::XID, pg_sys::Datum::from(xid));
    let created_at = request.created_at.unwrap_or(now);
    set(attribute::CREATED_AT, pg_sys::Datum::from(created_at));
    set(attribute::EVENT_ID, uuid_datum(&event_id));
    set(attribute::BACKEND_NUMBER, pg_sys::Datum::from(key.backend_number));
    set(attribute::PUBLISHED_BY, pg_sys::Datum::from(publisher()));
    set(attribute::BRANCH, pg_sys::Datum::from(0i16));
    set(attribute::BACKEND, text_datum(&to_server(&checked.backend)));
    for (attribute, text) in texts_of(request) {
        if let Some(text) = text {
            set(attribute, text_datum(text));
        }
    }
    if let Some(stream) = &checked.stream {
        set(attribute::STREAM, text_datum(&to_server(stream)));
    }
    if let Some(n) = request.max_retries {
        set(attribute::MAX_RETRIES, pg_sys::Datum::from(n));
    }
    match scheduled_at {
        Some(at) => {
            set(attribute::SCHEDULED_AT, pg_sys::Datum::from(at));
            txn::scheduled();
        }
        None => txn::published(),
    }
    let further = destinations.further.iter().map(|to| (draw_numbers(relations).1, to));
    Prepared {
        first: NewRow {
            is_scheduled: scheduled_at.is_some(),
            values,
            nulls,
            key,
        },
        further: Branches::of(further, request.stream.as_deref()),
    }
}

/// Raises the standard ERROR if the transaction may not write.
fn expect_writable() {
    // SAFETY: each raises an ERROR or does nothing.
    unsafe {
        pg_sys::PreventCommandIfReadOnly(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandDuringRecovery(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandIfParallelMode(c"outbox.publish_event()".as_ptr());
    }
}

/// The role that publishes: that of the session or of SET ROLE. Within a SECURITY DEFINER function it is still the
/// caller.
pub(super) fn publisher() -> pg_sys::Oid {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetOuterUserId() }
}

/// The texts that the row stores unchanged.
fn texts_of<'a>(request: &'a Request<'_>) -> [(usize, Option<&'a [u8]>); 7] {
    [
        (attribute::EVENT_TYPE, request.event_type.as_deref()),
        (attribute::SOURCE, request.source.as_deref()),
        (attribute::DATA, request.data.as_deref()),
        (attribute::SUBJECT, request.subject.as_deref()),
        (attribute::STREAM, request.stream.as_deref()),
        (attribute::DATA_SCHEMA, request.data_schema.as_deref()),
        (attribute::PUBLISHER_CONFIG, request.publisher_config.as_deref()),
    ]
}

fn uuid_datum(id: &[u8; 16]) -> pg_sys::Datum {
    // SAFETY: memory of the current context, of sufficient size.
    unsafe {
        let copy = pg_sys::palloc(id.len()).cast::<[u8; 16]>();
        *copy = *id;
        pg_sys::Datum::from(copy)
    }
}

/// The tables that events go into. Each is opened when its first event comes.
#[derive(Clone, Copy, Default)]
pub(super) struct Tables {
    events: Option<Insertion>,
    scheduled: Option<Insertion>,
}

impl Tables {
    /// Inserts an event's rows. False: a trigger or rule has left out the first row, and so the whole event.
    ///
    /// # Safety
    /// As [`Insertion::insert`].
    pub(super) unsafe fn insert(&mut self, relations: &Relations, rows: &Prepared) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            let inserted = self.insert_row(relations, &rows.first);
            if inserted {
                self.insert_further(relations, rows);
            }
            inserted
        }
    }

    /// Inserts all rows except the first. A user's trigger may leave one out.
    ///
    /// # Safety
    /// As [`Insertion::insert`].
    pub(super) unsafe fn insert_further(&mut self, relations: &Relations, rows: &Prepared) {
        for index in 0..rows.further.count {
            // SAFETY: the caller's promise.
            unsafe { self.insert_row(relations, &rows.further.row(index, &rows.first)) };
        }
    }

    /// # Safety
    /// As [`Insertion::insert`].
    unsafe fn insert_row(&mut self, relations: &Relations, row: &NewRow) -> bool {
        let table = match row.is_scheduled {
            true => &mut self.scheduled,
            false => &mut self.events,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let opened = match *table {
                Some(opened) => opened,
                None => Insertion::open(relations, row.is_scheduled),
            };
            *table = Some(opened);
            opened.insert(row)
        }
    }

    /// # Safety
    /// As [`Insertion::close`].
    pub(super) unsafe fn close(self) {
        for table in [self.events, self.scheduled].into_iter().flatten() {
            // SAFETY: the caller's promise.
            unsafe { table.close() };
        }
    }
}
