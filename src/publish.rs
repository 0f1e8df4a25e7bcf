//! Publishing: an event becomes a row of `outbox.events` in the caller's transaction. Nothing here depends on the worker.
//!
//! `publish_event` inserts through the table's access method, not the executor: it needs no rights on the table, and no plan.
//! A plain INSERT comes by the trigger `complete_event`. Both check the same things and draw the same numbers, the transaction id
//! *before* the sequence number: the reader's bounds rely on it (see `relay::snapshot::Tick`).

use crate::catalog::{self, Relations};
use crate::error::PublishError;
use crate::request::{Request, check, decoded};
use crate::rows::{attribute, bytes_of, to_server};
use crate::txn;
use crate::uuid;
use pgrx::iter::SetOfIterator;
use pgrx::{pg_extern, pg_guard, pg_sys};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;

// SAFETY: the declaration of sequence.h.
unsafe extern "C-unwind" {
    /// Draws the next number of a sequence (commands/sequence.h; not in pgrx's bindings).
    fn nextval_internal(relid: pg_sys::Oid, check_permissions: bool) -> i64;
}

/// The caller's transaction id, then the next number: in this order, always.
pub fn draw_numbers(relations: &Relations) -> (u64, i64) {
    // SAFETY: within a transaction that may write; the sequence belongs to the extension.
    unsafe {
        let xid = pg_sys::GetTopFullTransactionId().value;
        let seq = pg_sys::ffi::pg_guard_ffi_boundary(|| nextval_internal(relations.sequence, false));
        (xid, seq)
    }
}

/// Checks and inserts one event; returns its id.
fn publish(request: &Request<'_>, tables: &mut Tables) -> [u8; 16] {
    // SAFETY: each raises the standard ERROR when the transaction may not write.
    unsafe {
        pg_sys::PreventCommandIfReadOnly(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandDuringRecovery(c"outbox.publish_event()".as_ptr());
        pg_sys::PreventCommandIfParallelMode(c"outbox.publish_event()".as_ptr());
    }
    let checked = check(request).unwrap_or_else(|e| e.raise());
    let relations = catalog::expect_relations();
    // SAFETY: reads the clock.
    let now = unsafe { pg_sys::GetCurrentTimestamp() };
    let scheduled_at = request.scheduled_at.filter(|at| *at > now);
    let event_id = request.event_id.unwrap_or_else(|| uuid::new_v7(now));
    if request.event_id.is_some() {
        refuse_repeated_id(&relations, &event_id, scheduled_at.is_some());
    }
    let (xid, seq) = draw_numbers(&relations);

    let mut values = [pg_sys::Datum::from(0); attribute::SCHEDULED_AT];
    let mut nulls = [true; attribute::SCHEDULED_AT];
    let mut set = |attribute: usize, datum: pg_sys::Datum| {
        values[attribute - 1] = datum;
        nulls[attribute - 1] = false;
    };
    set(attribute::SEQ, pg_sys::Datum::from(seq));
    set(attribute::XID, pg_sys::Datum::from(xid));
    set(attribute::CREATED_AT, pg_sys::Datum::from(now));
    set(attribute::EVENT_ID, pg_sys::Datum::from(event_id.as_ptr()));
    set(attribute::BACKEND_NUMBER, pg_sys::Datum::from(checked.backend_number));
    set(attribute::BACKEND, text_datum(&to_server(&checked.backend)));
    let texts = [
        (attribute::EVENT_TYPE, &request.event_type),
        (attribute::SOURCE, &request.source),
        (attribute::DATA, &request.data),
        (attribute::SUBJECT, &request.subject),
        (attribute::STREAM, &request.stream),
        (attribute::DATA_SCHEMA, &request.data_schema),
        (attribute::PUBLISHER_CONFIG, &request.publisher_config),
    ];
    for (attribute, text) in texts {
        if let Some(text) = text {
            set(attribute, text_datum(text));
        }
    }
    if let Some(n) = request.max_retries {
        set(attribute::MAX_RETRIES, pg_sys::Datum::from(n));
    }
    match scheduled_at {
        Some(at) => {
            set(attribute::SCHEDULED_AT, pg_sys::Datum::from(at));
            let table = tables
                .scheduled
                .get_or_insert_with(|| Insertion::open(relations.scheduled));
            // SAFETY: the values are those of the table's columns, in its order.
            unsafe { table.insert(&values, &nulls) };
            txn::scheduled();
        }
        None => {
            let count = attribute::COUNT;
            let table = tables.events.get_or_insert_with(|| Insertion::open(relations.events));
            // SAFETY: as above.
            unsafe { table.insert(&values[..count], &nulls[..count]) };
            txn::published();
        }
    }
    event_id
}

pub fn text_datum(text: &[u8]) -> pg_sys::Datum {
    // SAFETY: copies the bytes into a varlena of the current memory context; json has the same form as text.
    unsafe {
        pg_sys::Datum::from(pg_sys::cstring_to_text_with_len(
            text.as_ptr().cast(),
            text.len() as i32,
        ))
    }
}

/// The tables that events go into, opened when the first comes.
#[derive(Default)]
struct Tables {
    events: Option<Insertion>,
    scheduled: Option<Insertion>,
}

impl Tables {
    fn close(self) {
        self.events.into_iter().chain(self.scheduled).for_each(Insertion::close);
    }
}

/// A table that rows are inserted into, with their index entries, as INSERT does.
struct Insertion {
    relation: pg_sys::Relation,
    estate: *mut pg_sys::EState,
    result: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
}

impl Insertion {
    fn open(relation: pg_sys::Oid) -> Self {
        // SAFETY: the executor's own steps; what is opened is closed, or given back by the transaction's abort.
        unsafe {
            let relation = pg_sys::table_open(relation, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
            let estate = pg_sys::CreateExecutorState();
            let result = pg_sys::palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
            pg_sys::InitResultRelInfo(result, relation, 0, std::ptr::null_mut(), 0);
            pg_sys::ExecOpenIndices(result, false);
            Self {
                relation,
                estate,
                result,
                slot: pg_sys::table_slot_create(relation, std::ptr::null_mut()),
            }
        }
    }

    /// # Safety
    /// The values are those of all the table's columns, in order.
    unsafe fn insert(&mut self, values: &[pg_sys::Datum], nulls: &[bool]) {
        let Self {
            relation,
            estate,
            result,
            slot,
        } = *self;
        // SAFETY: the executor's own steps for one row: the slot's arrays are as long as its descriptor, which is checked.
        unsafe {
            let descriptor = (*relation).rd_att;
            let columns = (*descriptor).natts as usize;
            if columns < values.len() {
                crate::error::internal("a table of outbox_relay does not have the columns that this version knows");
            }
            pg_sys::ExecClearTuple(slot);
            (*slot)
                .tts_values
                .copy_from_nonoverlapping(values.as_ptr(), values.len());
            (*slot).tts_isnull.copy_from_nonoverlapping(nulls.as_ptr(), nulls.len());
            for index in values.len()..columns {
                let default = added_column(relation, index as i32 + 1, estate);
                *(*slot).tts_values.add(index) = default.unwrap_or(pg_sys::Datum::from(0));
                *(*slot).tts_isnull.add(index) = default.is_none();
            }
            pg_sys::ExecStoreVirtualTuple(slot);
            if columns > values.len() && !(*descriptor).constr.is_null() {
                pg_sys::ExecConstraints(result, slot, estate);
            }
            let command = pg_sys::GetCurrentCommandId(true);
            pg_sys::table_tuple_insert(relation, slot, command, 0, std::ptr::null_mut());
            insert_index_entries(result, slot, estate);
        }
    }

    fn close(self) {
        // SAFETY: closes what open() opened, once.
        unsafe {
            pg_sys::ExecDropSingleTupleTableSlot(self.slot);
            pg_sys::ExecCloseIndices(self.result);
            pg_sys::FreeExecutorState(self.estate);
            // The lock is kept until the end of the transaction, as any writer's.
            pg_sys::table_close(self.relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        }
    }
}

/// The default of a column that somebody has added to a table of ours.
///
/// # Safety
/// An open relation, one of its columns, and the state of the insertion.
unsafe fn added_column(rel: pg_sys::Relation, attribute: i32, estate: *mut pg_sys::EState) -> Option<pg_sys::Datum> {
    // SAFETY: the caller's promise; an expression without variables needs no row to be evaluated.
    unsafe {
        if pg_sys::get_atttype((*rel).rd_id, attribute as i16) == pg_sys::InvalidOid {
            // It was dropped again.
            return None;
        }
        let default = pg_sys::build_column_default(rel, attribute);
        if default.is_null() {
            return None;
        }
        if pg_sys::contain_var_clause(default) {
            crate::error::internal("a table of outbox_relay has a generated column");
        }
        let expression = pg_sys::ExecPrepareExpr(default.cast(), estate);
        let evaluate = (*expression).evalfunc?;
        let context = pg_sys::MakePerTupleExprContext(estate);
        let mut is_null = false;
        let value = pg_sys::ffi::pg_guard_ffi_boundary(|| evaluate(expression, context, &mut is_null));
        (!is_null).then_some(value)
    }
}

/// # Safety
/// The indexes of `result` are open and `slot` holds the row just inserted.
unsafe fn insert_index_entries(
    result: *mut pg_sys::ResultRelInfo,
    slot: *mut pg_sys::TupleTableSlot,
    estate: *mut pg_sys::EState,
) {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(feature = "pg15")]
        pg_sys::ExecInsertIndexTuples(
            result,
            slot,
            estate,
            false,
            false,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        );
        #[cfg(any(feature = "pg16", feature = "pg17", feature = "pg18"))]
        pg_sys::ExecInsertIndexTuples(
            result,
            slot,
            estate,
            false,
            false,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            false,
        );
    }
}

/// An id that a publisher chose must not wait in the other table. (Within one table its unique index decides.)
pub fn refuse_repeated_id(relations: &Relations, event_id: &[u8; 16], scheduled: bool) {
    let (table, key) = if scheduled {
        (relations.events, c"events_event_id_idx")
    } else {
        (relations.scheduled, c"scheduled_events_pkey")
    };
    // SAFETY: an index look-up by an equality key of the column's type, under the latest snapshot.
    let found = unsafe {
        let schema = pg_sys::get_namespace_oid(c"outbox".as_ptr(), false);
        let index = pg_sys::get_relname_relid(key.as_ptr(), schema);
        let lock = pg_sys::AccessShareLock as pg_sys::LOCKMODE;
        let rel = pg_sys::table_open(table, lock);
        let snapshot = pg_sys::RegisterSnapshot(pg_sys::GetLatestSnapshot());
        let mut entry: pg_sys::ScanKeyData = std::mem::zeroed();
        pg_sys::ScanKeyInit(
            &mut entry,
            attribute::EVENT_ID as i16,
            pg_sys::BTEqualStrategyNumber as u16,
            pg_sys::Oid::from(pg_sys::F_UUID_EQ),
            pg_sys::Datum::from(event_id.as_ptr()),
        );
        let scan = pg_sys::systable_beginscan(rel, index, true, snapshot, 1, &mut entry);
        let found = !pg_sys::systable_getnext(scan).is_null();
        pg_sys::systable_endscan(scan);
        pg_sys::UnregisterSnapshot(snapshot);
        pg_sys::table_close(rel, lock);
        found
    };
    if found {
        let id = String::from_utf8_lossy(&relay::encode::hyphenated(event_id)).into_owned();
        PublishError::RepeatedId(id).raise();
    }
}

crate::sql_function!(publish_event, pg_finfo_publish_event);

/// `outbox.publish_event(...)`
#[pg_guard]
#[unsafe(no_mangle)]
extern "C-unwind" fn publish_event(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    // SAFETY: Postgres calls this with the eleven arguments of the SQL declaration.
    let arguments = unsafe { (*fcinfo).args.as_slice(11) };
    let get = |index: usize| (!arguments[index].isnull).then_some(arguments[index].value);
    // SAFETY: arguments 0, 1, 3, 4, 8, 9 are text, 2 and 7 jsonb, 10 uuid.
    let (text, json) = unsafe {
        (
            |index: usize| get(index).map(|d| Cow::Borrowed(bytes_of(d))),
            |index: usize| get(index).map(|d| Cow::Borrowed(rendered_jsonb(d))),
        )
    };
    let request = Request {
        event_type: text(0),
        source: text(1),
        data: json(2),
        subject: text(3),
        backend: text(4),
        scheduled_at: get(5).map(|d| d.value() as i64),
        max_retries: get(6).map(|d| d.value() as i32),
        publisher_config: json(7),
        stream: text(8),
        data_schema: text(9),
        // SAFETY: a uuid datum points to 16 bytes.
        event_id: get(10).map(|d| unsafe { *d.cast_mut_ptr::<[u8; 16]>() }),
    };
    let mut tables = Tables::default();
    let event_id = publish(&request, &mut tables);
    tables.close();
    // SAFETY: the result lives in the caller's memory context; not null.
    unsafe {
        (*fcinfo).isnull = false;
        let result = pg_sys::palloc(event_id.len()).cast::<[u8; 16]>();
        *result = event_id;
        pg_sys::Datum::from(result)
    }
}

/// The text of a jsonb, as `::text` shows it.
///
/// # Safety
/// The datum is a jsonb; the slice lives as long as the current memory context.
unsafe fn rendered_jsonb<'a>(datum: pg_sys::Datum) -> &'a [u8] {
    // SAFETY: the caller's promise; the result is zero-terminated and a JSON text holds no zero byte.
    unsafe {
        let jsonb = pg_sys::pg_detoast_datum(datum.cast_mut_ptr()).cast::<pg_sys::Jsonb>();
        let length = pgrx::varlena::varsize(jsonb.cast());
        let text = pg_sys::JsonbToCString(std::ptr::null_mut(), &raw mut (*jsonb).root, length as i32);
        std::ffi::CStr::from_ptr(text).to_bytes()
    }
}

/// One object of `publish_events`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Item<'a> {
    #[serde(borrow, default)]
    event_type: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    source: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    data: Option<&'a RawValue>,
    #[serde(borrow, default)]
    subject: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    backend: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    scheduled_at: Option<Cow<'a, str>>,
    #[serde(default)]
    max_retries: Option<i32>,
    #[serde(borrow, default)]
    publisher_config: Option<&'a RawValue>,
    #[serde(borrow, default)]
    stream: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    data_schema: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    event_id: Option<Cow<'a, str>>,
}

/// `outbox.publish_events(jsonb)`
#[pg_extern(sql = false)]
fn publish_events(events: pgrx::AnyElement) -> SetOfIterator<'static, pgrx::Uuid> {
    // SAFETY: the SQL declaration says jsonb, and strict.
    let text = decoded(unsafe { rendered_jsonb(events.datum()) });
    let items: Vec<&RawValue> = serde_json::from_str(&text).unwrap_or_else(|_| PublishError::NotAnArray.raise());
    let mut tables = Tables::default();
    let ids: Vec<pgrx::Uuid> = items
        .iter()
        .enumerate()
        .map(|(index, item)| {
            let item: Item<'_> = serde_json::from_str(item.get()).unwrap_or_else(|e| {
                let message = e.to_string();
                let message = message.split(" at line").next().unwrap_or_default().to_owned();
                PublishError::BadItem { index, message }.raise()
            });
            pgrx::Uuid::from_bytes(publish(&request_of(&item, index), &mut tables))
        })
        .collect();
    tables.close();
    SetOfIterator::new(ids)
}

fn request_of<'a>(item: &'a Item<'a>, index: usize) -> Request<'a> {
    let bytes = |text: &'a Option<Cow<'a, str>>| text.as_deref().map(to_server);
    let raw = |value: Option<&'a RawValue>| value.map(|v| to_server(v.get()));
    Request {
        event_type: bytes(&item.event_type),
        source: bytes(&item.source),
        data: raw(item.data),
        subject: bytes(&item.subject),
        backend: bytes(&item.backend),
        scheduled_at: item.scheduled_at.as_deref().map(parse_timestamp),
        max_retries: item.max_retries,
        publisher_config: raw(item.publisher_config),
        stream: bytes(&item.stream),
        data_schema: bytes(&item.data_schema),
        event_id: item.event_id.as_deref().map(|text| {
            uuid::parse(text).unwrap_or_else(|| {
                PublishError::BadItem {
                    index,
                    message: "event_id is not a UUID".into(),
                }
                .raise()
            })
        }),
    }
}

/// A time as `timestamptz` takes it, with its errors.
fn parse_timestamp(text: &str) -> i64 {
    let text = std::ffi::CString::new(text).unwrap_or_default();
    let arguments = [
        Some(pg_sys::Datum::from(text.as_ptr())),
        Some(pg_sys::Datum::from(pg_sys::TIMESTAMPTZOID)),
        Some(pg_sys::Datum::from(-1i32)),
    ];
    // SAFETY: the input function's three arguments: text, type, no precision.
    let datum = unsafe { pgrx::direct_function_call_as_datum(pg_sys::timestamptz_in, &arguments) };
    datum.map_or(0, |d| d.value() as i64)
}
