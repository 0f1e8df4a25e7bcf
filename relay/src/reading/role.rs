//! What a reader of events is for.

/// What a reader does with its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It belongs to a backend with its Redis, or to one of its lanes, and sends the rows.
    Redis,
    /// Looks for hash slots of a cluster that have no lane yet; it sends nothing.
    Finder,
    /// It belongs to a deleted backend, and fails its events.
    Deleted,
    /// It looks at all rows, and takes care of events whose backend does not exist.
    Strays,
}

impl Role {
    /// Whether no backend exists that its rows could be sent to, so they fail.
    pub fn fails_its_rows(self) -> bool {
        matches!(self, Role::Deleted | Role::Strays)
    }
}
