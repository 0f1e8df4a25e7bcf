//! Who reads events.

/// What a reader does with the rows that it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A backend with its Redis, or one of its lanes: it sends them.
    Redis,
    /// Looks for hash slots of a cluster that have no lane yet; it sends nothing.
    Finder,
    /// A backend that was deleted: its events fail.
    Deleted,
    /// Looks at the rows of all: events of backends that nobody knows are in its care.
    Strays,
}
