//! Reads replies about groups and consumers, piece by piece: there may be any number of them, with fields that are
//! unknown so far.

use crate::consumers::group::{EntryId, Group, GroupName, MOST_GROUPS};
use crate::resp::place::Place;
use crate::resp::read::{Piece, Reply};

/// Groups with longer names are not examined.
const LONGEST_NAME: usize = 128;

/// The rows of an array, each with pairs of a field and its value.
struct Rows {
    place: Place,
    field: Option<Vec<u8>>,
}

impl Rows {
    fn of(items: u64) -> Self {
        Self {
            place: Place::of(items),
            field: None,
        }
    }

    /// Calls `on_row` when a row begins, and `on_value` with each field. Returns whether the array has ended.
    fn take<S>(
        &mut self,
        piece: Piece<'_>,
        state: &mut S,
        on_row: fn(&mut S),
        on_value: fn(&mut S, &[u8], Piece<'_>),
    ) -> bool {
        match self.place.depth() {
            1 => {
                self.field = None;
                on_row(state);
            }
            2 => match self.field.take() {
                Some(field) => on_value(state, &field, piece),
                None => {
                    self.field = Some(match piece {
                        Piece::String { text: Some(name), .. } => name.to_vec(),
                        _ => Vec::new(),
                    });
                }
            },
            // Inside the value of a field.
            _ => {}
        }
        self.place.pass(piece)
    }
}

/// A count. A server can send any number; sums of these fit into a bigint.
fn count(piece: Piece<'_>) -> Option<i64> {
    match piece {
        Piece::Line(line) => Reply::new(line).number().map(counted),
        _ => None,
    }
}

/// The number as a count that a server can have.
pub(super) fn counted(number: i64) -> i64 {
    const MOST: i64 = i64::MAX / 4;
    number.clamp(0, MOST)
}

fn id(piece: Piece<'_>) -> Option<EntryId> {
    match piece {
        Piece::String { text: Some(text), .. } => std::str::from_utf8(text).ok()?.parse().ok(),
        _ => None,
    }
}

/// The reply to XINFO GROUPS.
pub(super) struct Groups {
    rows: Rows,
    found: Found,
}

#[derive(Default)]
struct Found {
    groups: Vec<Group>,
    has_more: bool,
}

impl Groups {
    pub(super) fn of(items: u64) -> Self {
        Self {
            rows: Rows::of(items),
            found: Found::default(),
        }
    }

    pub(super) fn take(&mut self, piece: Piece<'_>) -> bool {
        self.rows.take(piece, &mut self.found, Found::begin, Found::note)
    }

    /// The groups, and whether there are more.
    pub(super) fn into_groups(self) -> (Vec<Group>, bool) {
        (self.found.groups, self.found.has_more)
    }
}

impl Found {
    fn begin(&mut self) {
        if self.groups.len() >= MOST_GROUPS {
            self.has_more = true;
            return;
        }
        self.groups.push(Group {
            name: GroupName::Known(Vec::new()),
            consumers: 0,
            pending: 0,
            lag: None,
            last_delivered: EntryId::FIRST,
            oldest_pending: None,
            idle: None,
        });
    }

    fn note(&mut self, field: &[u8], piece: Piece<'_>) {
        let Some(group) = self.groups.last_mut().filter(|_| !self.has_more) else {
            return;
        };
        match field {
            b"name" => {
                if let Piece::String { size, text, .. } = piece {
                    group.name = match text.filter(|name| name.len() <= LONGEST_NAME) {
                        Some(name) => GroupName::Known(name.to_vec()),
                        None => GroupName::TooLong(size),
                    };
                }
            }
            b"consumers" => group.consumers = count(piece).unwrap_or_default(),
            b"pending" => group.pending = count(piece).unwrap_or_default(),
            b"lag" => group.lag = count(piece),
            b"last-delivered-id" => group.last_delivered = id(piece).unwrap_or_default(),
            _ => {}
        }
    }
}

/// The reply to XPENDING: the count, the first, the last, and the count of each consumer.
pub(super) struct Pending {
    place: Place,
    index: usize,
    count: i64,
    oldest: Option<EntryId>,
}

impl Pending {
    pub(super) fn of(items: u64) -> Self {
        Self {
            place: Place::of(items),
            index: 0,
            count: 0,
            oldest: None,
        }
    }

    pub(super) fn take(&mut self, piece: Piece<'_>) -> bool {
        if self.place.depth() == 1 {
            match self.index {
                0 => self.count = count(piece).unwrap_or_default(),
                1 => self.oldest = id(piece),
                _ => {}
            }
            self.index += 1;
        }
        self.place.pass(piece)
    }

    pub(super) fn into_parts(self) -> (i64, Option<EntryId>) {
        (self.count, self.oldest)
    }
}

/// The reply to XINFO CONSUMERS.
pub(super) struct Consumers {
    rows: Rows,
    least: Option<u64>,
}

impl Consumers {
    pub(super) fn of(items: u64) -> Self {
        Self {
            rows: Rows::of(items),
            least: None,
        }
    }

    pub(super) fn take(&mut self, piece: Piece<'_>) -> bool {
        let note = |least: &mut Option<u64>, field: &[u8], piece: Piece<'_>| {
            if let (b"idle", Some(idle)) = (field, count(piece)) {
                let idle = idle.max(0) as u64;
                *least = Some(least.map_or(idle, |least| least.min(idle)));
            }
        };
        self.rows.take(piece, &mut self.least, |_| {}, note)
    }

    /// For how long the most recently active consumer has been silent.
    pub(super) fn least_idle_ms(&self) -> Option<u64> {
        self.least
    }
}
