//! Routes: where events go that name no backend.

use crate::event::stream_name::{Fault, StreamName};
use wildmatch::WildMatch;

/// A row of `outbox.routes` that is enabled.
#[derive(Clone, Debug)]
pub struct Route {
    pub number: i32,
    /// `None`: any.
    pub event_type: Option<WildMatch>,
    pub source: Option<WildMatch>,
    pub backend: String,
    /// `None`: the stream that the event names, otherwise the backend's own. A fault is only possible where a trigger
    /// was switched off.
    pub stream: Option<Result<StreamName, Fault>>,
}

impl Route {
    fn matches(&self, event_type: &str, source: &str) -> bool {
        let is_of = |pattern: &Option<WildMatch>, name| pattern.as_ref().is_none_or(|p| p.matches(name));
        is_of(&self.event_type, event_type) && is_of(&self.source, source)
    }
}

/// The routes that an event takes, in the given order, each with its way. If several routes have equal ways, only the
/// first is returned. At most `most` and one more are looked for: each is compared with those before it.
pub fn taken<'r, Way: PartialEq, E>(
    routes: &'r [Route],
    event_type: &str,
    source: &str,
    most: usize,
    way_of: impl Fn(&'r Route) -> Result<Way, E>,
) -> Result<Vec<(&'r Route, Way)>, E> {
    let mut found: Vec<(&Route, Way)> = Vec::new();
    for route in routes.iter().filter(|route| route.matches(event_type, source)) {
        if found.len() > most {
            break;
        }
        let way = way_of(route)?;
        let is_there = |(other, there): &(&Route, Way)| other.backend == route.backend && *there == way;
        if !found.iter().any(is_there) {
            found.push((route, way));
        }
    }
    Ok(found)
}
