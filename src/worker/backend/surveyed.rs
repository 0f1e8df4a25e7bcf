//! What is saved about the consumer groups of a backend's streams, and what was logged about them.

use crate::server::process::repeat_log_after;
use relay::consumers::group::{GroupName, Surveyed};
use relay::time::Now;
use std::sync::Arc;

/// How many groups are remembered whose silence was recently logged.
const MOST_LOGGED: usize = 100;

#[derive(Default)]
pub(super) struct LastSurvey {
    /// The result of the last survey, until it is saved.
    found: Option<Vec<Surveyed>>,
    /// What was last saved.
    saved: Vec<Surveyed>,
    logged: Vec<(Arc<str>, GroupName, Now)>,
}

impl LastSurvey {
    pub(super) fn found(&mut self, found: Vec<Surveyed>) {
        self.found = Some(found);
    }

    /// What has to be saved: everything if somebody looks at the view, otherwise only changes.
    pub(super) fn unsaved(&self, is_viewed: bool) -> Option<&[Surveyed]> {
        let found = self.found.as_deref()?;
        (is_viewed || found != self.saved).then_some(found)
    }

    pub(super) fn is_saved(&mut self) {
        if let Some(found) = self.found.take() {
            self.saved = found;
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
