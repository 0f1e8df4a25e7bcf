//! Where events go that name no stream: `stream_name` of their backend, or of the settings. Mostly that is one stream,
//! the backend's own, and their rows name none. If it is a template, each row names the stream that the template has
//! given when the event was published. So a template can be changed at any time, and whoever reads rows knows nothing
//! of it.
//!
//! A row that names none although there is a template was published before that, and stays in the stream that was the
//! backend's own then: column `own_stream`, or what the worker has noted of the setting (`outbox.common_stream()`).

use crate::server::encoding::{has_utf8_form, utf8};
use crate::server::guc;
use once_cell::unsync::OnceCell;
use pgrx::pg_sys;
use relay::event::stream_name::{Fault, StreamName, Template};
use std::cell::RefCell;
use std::ffi::CStr;
use std::rc::Rc;

/// The default of `outbox_relay.redis_stream_name`.
pub(crate) const DEFAULT_STREAM: &str = "events";

/// What becomes of events that name no stream.
#[derive(Clone)]
pub(crate) enum Unnamed {
    /// Their rows name none: they are in the backend's own.
    Own,
    Template(Rc<Template>),
    /// Only where a trigger was switched off, or at the server's start.
    Unusable(Fault),
}

impl Unnamed {
    pub(crate) fn of(name: Result<StreamName, Fault>) -> Self {
        match name {
            Ok(StreamName::Plain(_)) => Self::Own,
            Ok(StreamName::Template(template)) => Self::Template(Rc::new(template)),
            Err(fault) => Self::Unusable(fault),
        }
    }

    /// By the setting, which is parsed once.
    pub(crate) fn of_setting() -> Self {
        thread_local! {
            static PARSED: RefCell<(String, Unnamed)> = const { RefCell::new((String::new(), Unnamed::Own)) };
        }
        if !guc::has_braces_in_stream_name() {
            return Self::Own;
        }
        let text = guc::text(&guc::REDIS_STREAM_NAME);
        PARSED.with_borrow_mut(|(of, parsed)| {
            if *of != text {
                (*parsed, *of) = (Self::of(StreamName::parse(&text)), text);
            }
            parsed.clone()
        })
    }
}

/// The setting's one stream, if it names one.
pub(crate) fn plain_setting() -> Option<String> {
    let text = guc::text(&guc::REDIS_STREAM_NAME);
    if !guc::has_braces_in_stream_name() {
        return Some(text);
    }
    StreamName::parse(&text).ok()?.plain().map(str::to_owned)
}

/// Why the setting cannot be used, if it cannot.
pub(crate) fn fault_of_setting() -> Option<Fault> {
    match Unnamed::of_setting() {
        Unnamed::Unusable(fault) => Some(fault),
        Unnamed::Own | Unnamed::Template(_) => None,
    }
}

/// The name of the database, which nobody can change while this session is there.
pub(crate) fn database() -> Rc<str> {
    thread_local! {
        static NAME: OnceCell<Rc<str>> = const { OnceCell::new() };
    }
    NAME.with(|name| {
        name.get_or_init(|| {
            // SAFETY: a catalog look-up in a transaction; the text is copied.
            let name = unsafe {
                let name = pg_sys::get_database_name(pg_sys::MyDatabaseId);
                (!name.is_null()).then(|| CStr::from_ptr(name).to_bytes())
            };
            let name = name.unwrap_or_default();
            match has_utf8_form(name) {
                // SAFETY: it has a UTF-8 form.
                Ok(()) => unsafe { utf8(name) }.into(),
                // It may have been named in a database of another encoding.
                Err(_) => String::from_utf8_lossy(name).into(),
            }
        })
        .clone()
    })
}
