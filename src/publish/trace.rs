//! Adds the trace context of the session (`outbox_relay.traceparent` and `.tracestate`) to the events that it
//! publishes.

use crate::server::guc;
use relay::event::trace::with_trace;
use std::borrow::Cow;

/// A `publisher_config` with the session's trace context, if it has one.
pub(super) fn traced(config: Option<Cow<'_, [u8]>>) -> Option<Cow<'_, [u8]>> {
    let most = guc::MAX_EVENT_SIZE_KB.get() as usize * 1_024;
    // What is too large is refused, and not copied before.
    if !guc::is_traced() || config.as_ref().is_some_and(|config| config.len() > most) {
        return config;
    }
    let (parent, state) = (guc::text(&guc::TRACEPARENT), guc::text(&guc::TRACESTATE));
    Some(Cow::Owned(with_trace(config.as_deref(), &parent, &state)))
}
