//! A backend of a database that is a copy of another one: it sends nothing.

use crate::tables::copies::Original;
use crate::worker::backend::Backend;
use relay::failure::{Failure, Trouble};
use relay::time::Now;
use std::time::Duration;

/// Nothing is to be done before somebody says so.
const FOR_LONG: Duration = Duration::from_secs(24 * 3_600);

impl Backend {
    fn original(&self) -> Option<&Original> {
        let original = self.row.as_ref().and_then(|row| row.original.as_ref());
        original.filter(|original| original.counts())
    }

    /// Whether it is another's, of whose database this one is a copy.
    pub fn is_copy(&self) -> bool {
        self.original().is_some()
    }

    /// Whether it connects nowhere, since there is no guard that could say whose its streams are.
    pub fn is_withheld(&self) -> bool {
        let row = self.row.as_ref();
        let is_guarded = row.is_some_and(|row| row.delivery == "exactly_once");
        self.original()
            .is_some_and(|original| original.is_database || !is_guarded)
    }

    /// Shows that.
    pub fn withhold(&mut self, now: Now) {
        let is_shown = self.delivery.trouble().is_some_and(|f| f.trouble == Trouble::Copied);
        let Some(original) = self.original().filter(|_| self.is_withheld() && !is_shown) else {
            return;
        };
        let what = if original.is_database { "database" } else { "server" };
        let text = format!("this {what} is a copy of {}", original.words);
        self.hold_off(Failure::of(Trouble::Copied, text), FOR_LONG, now);
    }
}
