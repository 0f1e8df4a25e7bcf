//! When the readers of backends that do not send pass rows of others. How they do: `passing_by.rs`.

use relay::time::Now;

#[derive(Default)]
pub(super) struct Passed {
    /// A poll has come, and not all such readers have come to the newest tick or to a row of their own.
    pub(super) is_due: bool,
    /// The next piece is not before this time.
    pub(super) rests_until: Now,
}
