//! What a reader of events is for.

/// What a reader does with the rows that it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A backend with its Redis, or one of its lanes: it sends them.
    Redis,
    /// Looks for hash slots of a cluster that have no lane yet; it sends nothing.
    Finder,
    /// A backend that was deleted: its events fail.
    Deleted,
    /// Looks at all rows, and takes care of events whose backend does not exist.
    Strays,
}
