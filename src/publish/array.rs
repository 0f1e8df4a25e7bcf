//! `outbox.publish_events`: an array of objects with the keys of `publish_event`.

use crate::publish::appending::{Prepared, Tables, prepared};
use crate::publish::error::PublishError;
use crate::publish::json;
use crate::publish::lent_rights::expect_own_right;
use crate::publish::request::{Request, attempts, event_id, time};
use crate::server::encoding::{has_utf8_form, to_server, utf8_in_context};
use crate::server::error::expect_arguments;
use crate::server::report;
use crate::server::scoped;
use crate::tables::catalog::{self, Relations};
use crate::tables::row::attribute;
use pgrx::pg_sys;
use relay::event::binary;
use relay::event::doubts::holds_json;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt;

// SAFETY: the declarations of tuplestore.h and elog.h.
unsafe extern "C-unwind" {
    /// Declared without pgrx's guard, because it is called where other people's ERRORs may pass.
    fn tuplestore_putvalues(
        state: *mut pg_sys::Tuplestorestate,
        descriptor: pg_sys::TupleDesc,
        values: *const pg_sys::Datum,
        nulls: *const bool,
    );
    fn set_errcontext_domain(domain: *const c_char) -> c_int;
    fn errcontext_msg(format: *const c_char, ...) -> c_int;
}

crate::function_info!(pg_finfo_publish_events);

/// `outbox.publish_events(jsonb)`, strict
// No pg_guard, for the same reason as publish_event.
#[unsafe(no_mangle)]
extern "C-unwind" fn publish_events(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    let read = || {
        expect_arguments(fcinfo, 1);
        (catalog::expect_relations(), items_of_call(fcinfo))
    };
    // SAFETY: this frame, which Postgres calls, has nothing to be dropped.
    let (relations, items) = unsafe { report::guard(read) };
    let mut tables = Tables::default();
    let mut index: c_int = 0;
    // SAFETY: within a call by Postgres. The body of the guard has made the set of results and the list of items. The
    // callback gets the index that it expects; nothing here unwinds.
    unsafe {
        let results = (*fcinfo).resultinfo.cast::<pg_sys::ReturnSetInfo>();
        let at_element = &raw mut index;
        scoped::with_error_callback(say_element, at_element.cast(), || {
            for at in 0..items.count {
                at_element.write_volatile(at as c_int);
                let rows = report::guard(|| prepared_item(&items, at, &relations));
                let inserted = tables.insert(&relations, &rows);
                let (value, is_null) = (rows.first.values[attribute::EVENT_ID - 1], !inserted);
                tuplestore_putvalues((*results).setResult, (*results).setDesc, &value, &is_null);
            }
            tables.close();
        });
        (*fcinfo).isnull = true;
    }
    pg_sys::Datum::from(0)
}

/// Adds to the CONTEXT of any report which element it is about, as COPY does with its line.
// No pg_guard: it must not unwind. What it calls can fail only for want of memory; Postgres then reports that instead.
// SAFETY: only Postgres calls this, with the index that belongs to the entry.
unsafe extern "C-unwind" fn say_element(index: *mut c_void) {
    const WORDS: &CStr = c"publish_events, element %d of the array, counted from 0";
    // SAFETY: the index outlives the entry; the text is copied.
    unsafe {
        set_errcontext_domain(std::ptr::null());
        errcontext_msg(WORDS.as_ptr(), index.cast::<c_int>().read_volatile());
    }
}

/// The elements of an array as texts, in the memory of the call: there may be millions.
#[derive(Clone, Copy)]
struct Items {
    first: *mut (*const u8, usize),
    count: usize,
    room: usize,
}

impl Items {
    fn none() -> Self {
        const FIRST: usize = 64;
        // SAFETY: memory of the call.
        let first = unsafe { pg_sys::palloc(size_of::<(*const u8, usize)>() * FIRST) }.cast();
        let (count, room) = (0, FIRST);
        Items { first, count, room }
    }

    fn push(&mut self, text: &str) {
        // SAFETY: there is room for as many.
        unsafe {
            if self.count == self.room {
                self.room *= 2;
                let size = size_of::<(*const u8, usize)>() * self.room;
                self.first = pg_sys::repalloc_huge(self.first.cast(), size).cast();
            }
            *self.first.add(self.count) = (text.as_ptr(), text.len());
        }
        self.count += 1;
    }
}

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Array;
        impl<'de> Visitor<'de> for Array {
            type Value = Items;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Items, A::Error> {
                let mut items = Items::none();
                while let Some(element) = elements.next_element::<&'de RawValue>()? {
                    items.push(element.get());
                }
                Ok(items)
            }
        }
        deserializer.deserialize_seq(Array)
    }
}

/// The elements of the argument, and a place for the results.
fn items_of_call(fcinfo: pg_sys::FunctionCallInfo) -> Items {
    // SAFETY: one argument of type jsonb, by the SQL declaration, which is strict. If somebody has declared the
    // function without STRICT, a null is checked for.
    unsafe {
        let argument = &(*fcinfo).args.as_slice(1)[0];
        if argument.isnull {
            refuse_other_json("null");
        }
        #[cfg(feature = "pg15")]
        pg_sys::SetSingleFuncCall(fcinfo, pg_sys::MAT_SRF_USE_EXPECTED_DESC);
        #[cfg(not(feature = "pg15"))]
        pg_sys::InitMaterializedSRF(fcinfo, pg_sys::MAT_SRF_USE_EXPECTED_DESC);
        let rendered = json::rendered(argument.value);
        if let Err(why) = has_utf8_form(rendered) {
            PublishError::NoUtf8Form { field: "events", why }.raise();
        }
        let text = utf8_in_context(rendered);
        serde_json::from_str(text).unwrap_or_else(|_| refuse_other_json(text))
    }
}

fn refuse_other_json(text: &str) -> ! {
    let is_encoded_twice = holds_json(text);
    PublishError::NotAnArray { is_encoded_twice }.raise()
}

fn prepared_item(items: &Items, index: usize, relations: &Relations) -> Prepared {
    // SAFETY: an element of the list. It is UTF-8, as the whole text is.
    let text = unsafe {
        let (start, length) = *items.first.add(index);
        std::str::from_utf8_unchecked(std::slice::from_raw_parts(start, length))
    };
    json::expect_parsable(text.as_bytes());
    let request = match serde_json::from_str::<Item<'_>>(text) {
        Err(_) => Err("it is not a JSON object".to_owned()),
        Ok(Item { unknown: Some(key), .. }) => Err(format!("key \"{key}\" is unknown")),
        Ok(item) => request_of(&item),
    };
    let request = request.unwrap_or_else(|message| PublishError::BadItem { index, message }.raise());
    let rows = prepared(&request.without_empty().traced(), relations);
    expect_own_right();
    rows
}

const KEYS: [&str; 12] = [
    "event_type",
    "source",
    "data",
    "subject",
    "backend",
    "scheduled_at",
    "max_retries",
    "publisher_config",
    "stream",
    "data_schema",
    "event_id",
    "data_base64",
];

/// One element: its values by [`KEYS`], as JSON texts. JSON null counts as absent.
#[derive(Default)]
struct Item<'a> {
    values: [Option<&'a str>; KEYS.len()],
    unknown: Option<String>,
}

/// A JSON string, borrowed if it has no escapes.
#[derive(Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Item<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Item<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut item = Item::default();
                while let Some((Text(key), value)) = map.next_entry::<Text<'de>, &'de RawValue>()? {
                    match KEYS.iter().position(|known| *known == key) {
                        Some(place) => item.values[place] = Some(value.get()).filter(|text| *text != "null"),
                        None => item.unknown = Some(key.into_owned()),
                    }
                }
                Ok(item)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// The request of an element, or what is wrong with the element's shape.
fn request_of<'a>(item: &Item<'a>) -> Result<Request<'a>, String> {
    let given = |key: &str| {
        KEYS.iter()
            .position(|known| *known == key)
            .and_then(|place| item.values[place])
    };
    let string = |key: &str| -> Result<Option<Cow<'a, str>>, String> {
        let text = given(key).map(|value| serde_json::from_str::<Text<'a>>(value).map(|text| text.0));
        text.transpose().map_err(|_| format!("{key} must be a string"))
    };
    let text = |key: &str| Ok::<_, String>(string(key)?.map(in_server));
    let raw = |key: &str| given(key).map(to_server);
    let max_retries = match given("max_retries") {
        Some(value) if value.starts_with('"') => string("max_retries")?,
        Some(value) if value.starts_with(['-', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']) => Some(value.into()),
        Some(_) => return Err("max_retries must be a number".to_owned()),
        None => None,
    };
    let bytes = string("data_base64")?.map(|base64| {
        let bytes = binary::of_base64(&base64).map(|data| Cow::Owned(data.into_bytes()));
        bytes.ok_or("data_base64 must be base64, with padding and without line breaks")
    });
    let data = match (raw("data"), bytes.transpose()?) {
        (Some(_), Some(_)) => PublishError::TwoPayloads("data_base64").raise(),
        (data, bytes) => data.or(bytes),
    };
    Ok(Request {
        event_type: text("event_type")?,
        source: text("source")?,
        data,
        subject: text("subject")?,
        backend: text("backend")?,
        scheduled_at: text("scheduled_at")?.map(|text| time(&text)),
        max_retries: max_retries.map(|text| attempts(text.as_bytes()).unwrap_or_else(|e| e.raise())),
        publisher_config: raw("publisher_config"),
        stream: text("stream")?,
        data_schema: text("data_schema")?,
        event_id: text("event_id")?.map(|text| event_id(&text)),
        created_at: None,
        keeps_stream: false,
    })
}

fn in_server(text: Cow<'_, str>) -> Cow<'_, [u8]> {
    match text {
        Cow::Borrowed(text) => to_server(text),
        Cow::Owned(text) => Cow::Owned(to_server(&text).into_owned()),
    }
}
