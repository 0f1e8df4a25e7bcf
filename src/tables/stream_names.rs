//! Where events go that name no stream: `stream_name` of their backend or of the settings. Usually that is one stream,
//! the backend's own, and the rows do not store it. If it is a template, each row stores the stream that the template
//! gave when the event was published. So a template can be changed at any time, and the code that reads rows does not
//! depend on it.
//!
//! A row without a stream, although there is a template now, was published before the template was set. It stays in the
//! stream that was the backend's own then: column `own_stream`, or what the worker has noted of the setting
//! (`outbox.common_stream()`).

use crate::server::encoding::{has_utf8_form, utf8};
use crate::server::guc;
use crate::server::place;
use once_cell::unsync::OnceCell;
use relay::event::stream_name::{Fault, StreamName, Template};
use std::cell::RefCell;
use std::rc::Rc;

/// The default of `outbox_relay.redis_stream_name`.
pub(crate) const DEFAULT_STREAM: &str = "events";

/// Where events go that name no stream.
#[derive(Clone)]
pub(crate) enum Unnamed {
    /// To the backend's own stream, which their rows do not store.
    Own,
    Template(Rc<Template>),
    /// Nowhere: the template is invalid. Only possible where a trigger was switched off, or with the settings at the
    /// server's start.
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

    /// As the setting says. The setting is parsed once.
    pub(crate) fn of_setting() -> Self {
        thread_local! {
            static PARSED: RefCell<(String, Unnamed)> = const { RefCell::new((String::new(), Unnamed::Own)) };
        }
        if !guc::has_special_stream_name() {
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

/// The setting's stream, if it is not a template.
pub(crate) fn plain_setting() -> Option<String> {
    let text = guc::text(&guc::REDIS_STREAM_NAME);
    if !guc::has_special_stream_name() {
        return Some(text);
    }
    StreamName::parse(&text).ok()?.plain().map(str::to_owned)
}

/// Why the setting cannot be used; `None` if it can.
pub(crate) fn fault_of_setting() -> Option<Fault> {
    match Unnamed::of_setting() {
        Unnamed::Unusable(fault) => Some(fault),
        Unnamed::Own | Unnamed::Template(_) => None,
    }
}

/// The name of the database. It cannot be renamed while this session is connected.
pub(crate) fn database() -> Rc<str> {
    thread_local! {
        static NAME: OnceCell<Rc<str>> = const { OnceCell::new() };
    }
    NAME.with(|name| {
        name.get_or_init(|| {
            let name = place::database().unwrap_or_default();
            let name = name.to_bytes();
            match has_utf8_form(name) {
                // SAFETY: the line above has checked that the name has a UTF-8 form.
                Ok(()) => unsafe { utf8(name) }.into(),
                // The database may have been named in a session with another encoding.
                Err(_) => String::from_utf8_lossy(name).into(),
            }
        })
        .clone()
    })
}
