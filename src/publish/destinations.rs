//! Where an event goes: to the backend that it names; otherwise where the routes send it, to one backend or several;
//! and if no route matches, to the default backend. Each destination must allow the event.

use crate::publish::error::PublishError;
use crate::publish::placing;
use crate::publish::request::{Addressed, Request, check_config, check_itself, decoded};
use crate::server::encoding::{has_utf8_form, to_server};
use crate::server::guc;
use crate::tables::catalog;
use crate::tables::known_backends::KnownBackend;
use crate::tables::routes;
use relay::event::routes::{Route, taken};
use relay::event::stream_name::StreamName;
use std::borrow::Cow;
use std::ffi::CStr;
use std::rc::Rc;

/// The most rows that one event may become. More would be a mistake in the routes.
const MOST_DESTINATIONS: usize = 1_000;

/// A stream of a backend that an event goes to.
pub(super) struct Destination {
    pub backend: String,
    pub backend_number: i32,
    /// The stream that a route or the backend's template gives, which the row stores instead of the event's own.
    pub stream: Option<String>,
}

/// Where an event goes, in the order of its rows. Usually there is one destination.
pub(super) struct Destinations {
    pub first: Destination,
    pub further: Vec<Destination>,
}

/// All refusals, in one place for all ways to publish. Returns where the event goes if nothing refuses it.
pub(super) fn check(request: &Request<'_>) -> Result<Destinations, PublishError> {
    check_itself(request)?;
    of(request)
}

/// The request with the default backend if it names none, so that routes do not apply.
pub(super) fn with_backend(mut request: Request<'_>) -> Request<'_> {
    if request.backend.is_none() {
        request.backend = Some(Cow::Owned(to_server(&default_backend()).into_owned()));
    }
    request
}

fn of(request: &Request<'_>) -> Result<Destinations, PublishError> {
    if let Some(name) = request.backend.as_deref() {
        let name = decoded(name).into_owned();
        let known = catalog::backend(&name);
        return one(request, name, known);
    }
    let name = default_backend();
    // This look-up processes pending invalidations, which is also needed before routes are read.
    let known = catalog::backend(&name);
    match routes::all() {
        None => one(request, name, known),
        Some(routes) => routed(request, routes)?.map_or_else(|| one(request, name, known), Ok),
    }
}

fn one(request: &Request<'_>, backend: String, known: Option<Rc<KnownBackend>>) -> Result<Destinations, PublishError> {
    let Some(known) = known else {
        return Err(PublishError::UnknownBackend(backend));
    };
    check_config(request, known.own_fields)?;
    let stream = placing::placed(&request.addressed(), &backend, &known)?;
    let first = Destination {
        backend,
        backend_number: known.number,
        stream,
    };
    let further = Vec::new();
    Ok(Destinations { first, further })
}

/// Where the routes send an event. `None`: no route matches.
#[cold]
fn routed(request: &Request<'_>, mut routes: Rc<[Route]>) -> Result<Option<Destinations>, PublishError> {
    loop {
        let generation = catalog::generation();
        match try_routed(request, &routes) {
            // A backend was renamed after the routes were read.
            Err(PublishError::UnknownBackend(_)) if catalog::generation() != generation => match routes::all() {
                Some(changed) => routes = changed,
                None => return Ok(None),
            },
            result => return result,
        }
    }
}

fn try_routed(request: &Request<'_>, routes: &[Route]) -> Result<Option<Destinations>, PublishError> {
    let event = request.addressed();
    let (event_type, source) = (
        decoded(event.event_type.unwrap_or_default()),
        decoded(event.source.unwrap_or_default()),
    );
    let taken = taken(routes, &event_type, &source, MOST_DESTINATIONS, |route| {
        Way::of(route, &event).map_err(|error| error.by_route(route))
    })?;
    if taken.len() > MOST_DESTINATIONS {
        return Err(PublishError::TooManyRoutes(MOST_DESTINATIONS));
    }
    let mut found = taken.into_iter().map(|(route, way)| {
        let destination = way.allowed(route, request);
        destination.map_err(|error| error.by_route(route))
    });
    let Some(first) = found.next().transpose()? else {
        return Ok(None);
    };
    let further = found.collect::<Result<_, _>>()?;
    Ok(Some(Destinations { first, further }))
}

/// A destination that a route gives an event.
struct Way {
    known: Rc<KnownBackend>,
    /// See [`Destination::stream`].
    instead: Option<String>,
    /// The name of the stream that results.
    stream: String,
}

impl PartialEq for Way {
    /// Two ways are equal if backend and stream are, however the stream got its name.
    fn eq(&self, other: &Self) -> bool {
        self.stream == other.stream
    }
}

impl Way {
    fn of(route: &Route, event: &Addressed<'_>) -> Result<Self, PublishError> {
        let Some(known) = catalog::backend(&route.backend) else {
            return Err(PublishError::UnknownBackend(route.backend.clone()));
        };
        let instead = match (&route.stream, event.stream) {
            (Some(Err(fault)), _) => {
                return Err(PublishError::UnusableStreamName {
                    backend: route.backend.clone(),
                    fault: fault.clone(),
                });
            }
            (Some(Ok(StreamName::Plain(name))), _) => Some(name.clone()),
            (Some(Ok(StreamName::Template(template))), _) => {
                Some(placing::from_template(template, event, &route.backend)?)
            }
            (None, Some(_)) => None,
            (None, None) => placing::of_template(event, &route.backend, &known)?,
        };
        let named = instead
            .clone()
            .or_else(|| event.stream.map(|name| decoded(name).into_owned()));
        let stream = named.unwrap_or_else(|| known.own_stream().into_owned());
        Ok(Self { known, instead, stream })
    }

    fn allowed(self, route: &Route, request: &Request<'_>) -> Result<Destination, PublishError> {
        check_config(request, self.known.own_fields)?;
        let is_named = self.instead.is_some() || request.stream.is_some();
        let named = is_named.then_some(Cow::Borrowed(self.stream.as_str()));
        placing::expect_allowed(&route.backend, &self.known, named)?;
        Ok(Destination {
            backend: route.backend.clone(),
            backend_number: self.known.number,
            stream: self.instead,
        })
    }
}

/// The backend of the setting. Its bytes may be in the database's encoding (if set in a session, for a role or for a
/// database) or in that of postgresql.conf, which is usually UTF-8.
fn default_backend() -> String {
    // A name has at most 63 characters, each of at most four bytes. More than that is not copied, for want of memory.
    const LONG: usize = 256;
    // SAFETY: the value of the setting is a zero-terminated text or null, and nothing below sets it.
    let name = unsafe {
        let value = *guc::DEFAULT_BACKEND.as_ptr();
        if value.is_null() { c"" } else { CStr::from_ptr(value) }
    };
    if name.count_bytes() > LONG {
        return String::from_utf8_lossy(&name.to_bytes()[..LONG]).into_owned();
    }
    let in_file = name.to_str().ok().map(str::to_owned);
    match in_file {
        Some(name) if name.is_ascii() => return name,
        _ => {}
    }
    let in_database = has_utf8_form(name.to_bytes())
        .ok()
        .map(|()| decoded(name.to_bytes()).into_owned());
    let is_there = |name: &&String| catalog::backend(name).is_some();
    let names = [in_database, in_file];
    let known = names.iter().flatten().find(is_there).or(names.iter().flatten().next());
    known.cloned().unwrap_or_default()
}
