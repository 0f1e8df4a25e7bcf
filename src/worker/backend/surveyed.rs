//! What is saved about the consumer groups of a backend's streams, and what was logged about them.

use crate::server::process::repeat_log_after;
use relay::consumers::group::{GroupName, Surveyed};
use relay::consumers::readership::Interest;
use relay::time::Now;
use std::sync::Arc;
use std::time::Duration;

/// How many groups are remembered whose silence was recently logged.
const MOST_LOGGED: usize = 100;

/// A result that does not change is saved again after this time. outbox.consumer_health() believes it twice as long.
const SAVE_AGAIN_AFTER: Duration = Duration::from_secs(30 * 60);

#[derive(Default)]
pub(super) struct LastSurvey {
    /// Whether the streams that were watched before are known.
    pub(super) knows_streams: bool,
    /// The result of the last survey, until it is saved.
    found: Option<Vec<Surveyed>>,
    /// What was last saved.
    saved: Vec<Surveyed>,
    saved_at: Option<Now>,
    logged: Vec<(Arc<str>, GroupName, Now)>,
}

impl LastSurvey {
    pub(super) fn found(&mut self, found: Vec<Surveyed>) {
        self.found = Some(found);
    }

    /// What has to be saved: for the view everything, because it shows the time, otherwise changes, so that a probe
    /// writes no WAL on an idle server.
    pub(super) fn unsaved(&self, interest: Interest, now: Now) -> Option<&[Surveyed]> {
        let found = self.found.as_deref()?;
        let is_old = || self.saved_at.is_some_and(|at| now >= at + SAVE_AGAIN_AFTER);
        (interest == Interest::View || found != self.saved || is_old()).then_some(found)
    }

    pub(super) fn is_saved(&mut self, now: Now) {
        if let Some(found) = self.found.take() {
            (self.saved, self.saved_at) = (found, Some(now));
        }
    }

    /// Whether to log the silence of a group, at most once a minute.
    pub(super) fn is_news(&mut self, stream: &Arc<str>, group: &GroupName, now: Now) -> bool {
        self.logged.retain(|(_, _, at)| now < *at + repeat_log_after());
        let is_known = self.logged.iter().any(|(s, g, _)| s == stream && g == group);
        let is_news = !is_known && self.logged.len() < MOST_LOGGED;
        if is_news {
            self.logged.push((stream.clone(), group.clone(), now));
        }
        is_news
    }
}
