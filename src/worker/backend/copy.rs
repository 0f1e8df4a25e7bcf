//! Backends that must not connect until somebody changes something: backends of a database that is a copy of another
//! one, and backends whose row holds an option that cannot be used.

use crate::tables::copies::Original;
use crate::worker::backend::Backend;
use relay::delivery::Guarantee;
use relay::failure::{Failure, Trouble};
use relay::time::Now;
use std::time::Duration;

/// How long such a backend waits at most; a change ends the wait.
const FOR_LONG: Duration = Duration::from_secs(24 * 3_600);

impl Backend {
    fn original(&self) -> Option<&Original> {
        let original = self.row().and_then(|row| row.original.as_ref());
        original.filter(|original| original.counts())
    }

    /// Whether this database or server is a copy, and the backend belongs to the original.
    pub(crate) fn is_copy(&self) -> bool {
        self.original().is_some()
    }

    /// The original, if there is no guard that tells who owns the streams.
    fn unguarded_original(&self) -> Option<&Original> {
        let options = self.options();
        let is_guarded = options.is_some_and(|options| options.delivery == Ok(Guarantee::ExactlyOnce));
        self.original().filter(|original| original.is_database || !is_guarded)
    }

    /// Whether it must not connect.
    pub(crate) fn is_withheld(&self) -> bool {
        self.duty.unusable().is_some() || self.unguarded_original().is_some()
    }

    /// Sets the failure that says why it does not connect.
    pub(crate) fn withhold(&mut self, now: Now) {
        let shown = self.delivery.trouble().map(|failure| failure.trouble);
        let failure = match (self.duty.unusable(), self.unguarded_original()) {
            (Some(unusable), _) if shown != Some(Trouble::UnusableOption) => {
                Failure::of(Trouble::UnusableOption, unusable.to_string())
            }
            (None, Some(original)) if shown != Some(Trouble::Copied) => {
                let what = if original.is_database { "database" } else { "server" };
                Failure::of(Trouble::Copied, format!("this {what} is a copy of {}", original.words))
            }
            _ => return,
        };
        self.hold_off(failure, FOR_LONG, now);
    }
}
