//! Reads replies to a search, piece by piece: there may be many large entries, with millions of fields. Of each entry,
//! only what identifies its event is kept.

use crate::event::format::name_in_json;
use crate::event::wanted::EventName;
use crate::failure::Failure;
use crate::resp::read::{Piece, Reply};

/// The bytes of its length in digits, and of line ends.
const AROUND_A_STRING: u64 = 8;

/// An entry that has been read.
pub(super) struct Entry {
    pub id: Vec<u8>,
    /// `None`: a relay has not written this entry.
    pub name: Option<EventName>,
}

/// The reply to XREVRANGE.
pub(super) struct Page {
    /// How many entries it has,
    pub entries: usize,
    /// and how many of them are still to come.
    left: u64,
    /// The approximate size of all of their fields.
    pub bytes: u64,
    next: EntryPart,
    /// The id of the current entry.
    id: Vec<u8>,
    event_id: Option<[u8; 36]>,
    time: Option<[u8; 32]>,
}

/// The part of an entry that comes next.
#[derive(Clone, Copy)]
enum EntryPart {
    Entry,
    Id,
    Fields,
    /// This many names and values are to come.
    Name(u64),
    Value(u64, Option<KnownField>),
}

/// A field that identifies the event.
#[derive(Clone, Copy)]
enum KnownField {
    EventId,
    Time,
    /// JSON that may begin with id and time.
    Json,
}

impl Page {
    pub(super) fn of(entries: u64) -> Self {
        Self {
            entries: entries as usize,
            left: entries,
            bytes: 0,
            next: EntryPart::Entry,
            id: Vec::new(),
            event_id: None,
            time: None,
        }
    }

    pub(super) fn is_whole(&self) -> bool {
        self.left == 0
    }

    /// Processes the next piece. Returns the entry that ends with it.
    pub(super) fn take(&mut self, piece: Piece<'_>) -> Result<Option<Entry>, Failure> {
        self.next = match (self.next, piece) {
            (EntryPart::Entry, Piece::Array(2)) => EntryPart::Id,
            (EntryPart::Id, Piece::String { text: Some(id), .. }) => {
                self.id = id.to_vec();
                EntryPart::Fields
            }
            (EntryPart::Fields, Piece::Array(0)) => return Ok(self.end()),
            (EntryPart::Fields, Piece::Array(fields)) if fields % 2 == 0 => EntryPart::Name(fields),
            (EntryPart::Name(left), Piece::String { size, text, .. }) => {
                self.bytes = self.bytes.saturating_add(size + AROUND_A_STRING);
                let known = match text {
                    Some(b"event_id" | b"ce_id") => Some(KnownField::EventId),
                    Some(b"timestamp" | b"ce_time") => Some(KnownField::Time),
                    Some(b"cloud_event" | b"value") => Some(KnownField::Json),
                    _ => None,
                };
                EntryPart::Value(left - 1, known)
            }
            (EntryPart::Value(left, known), Piece::String { size, text, start }) => {
                self.bytes = self.bytes.saturating_add(size + AROUND_A_STRING);
                let text = text.unwrap_or_default();
                match known {
                    Some(KnownField::EventId) => self.event_id = self.event_id.or_else(|| text.try_into().ok()),
                    Some(KnownField::Time) => self.time = self.time.or_else(|| timestamp_of(text)),
                    Some(KnownField::Json) => {
                        if let Some((event_id, time)) = name_in_json(start) {
                            self.event_id = self.event_id.or(Some(event_id));
                            self.time = self.time.or(Some(time));
                        }
                    }
                    None => {}
                }
                match left - 1 {
                    0 => return Ok(self.end()),
                    left => EntryPart::Name(left),
                }
            }
            _ => return Err(Failure::backend("unexpected reply to XREVRANGE")),
        };
        Ok(None)
    }

    fn end(&mut self) -> Option<Entry> {
        self.next = EntryPart::Entry;
        self.left = self.left.saturating_sub(1);
        let (event_id, time) = (self.event_id.take(), self.time.take());
        Some(Entry {
            id: std::mem::take(&mut self.id),
            name: event_id.zip(time),
        })
    }
}

/// A timestamp in the format that we write. Other writers, such as django-broadcaster, omit the microseconds of a whole
/// second.
fn timestamp_of(text: &[u8]) -> Option<[u8; 32]> {
    const SECONDS: usize = "2026-01-31T23:59:59".len();
    match text.split_at_checked(SECONDS) {
        Some((seconds, b"+00:00")) => [seconds, b".000000", b"+00:00"].concat().try_into().ok(),
        _ => text.try_into().ok(),
    }
}

/// The reply to XINFO STREAM.
#[derive(Default)]
pub(super) struct Info {
    length: Option<i64>,
    added: Option<i64>,
    last: Option<Vec<u8>>,
    /// How many items are missing in each open array, outermost first.
    open: Vec<u64>,
    /// The field whose value comes next.
    of: Option<Field>,
}

#[derive(Clone, Copy)]
enum Field {
    Length,
    Added,
    Last,
    Other,
}

impl Info {
    pub(super) fn of(items: u64) -> Self {
        Self {
            open: vec![items],
            ..Self::default()
        }
    }

    pub(super) fn is_whole(&self) -> bool {
        self.open.is_empty()
    }

    pub(super) fn take(&mut self, piece: Piece<'_>) {
        if self.open.len() == 1 {
            self.of = match self.of {
                None => Some(match piece {
                    Piece::String {
                        text: Some(b"length"), ..
                    } => Field::Length,
                    Piece::String {
                        text: Some(b"entries-added"),
                        ..
                    } => Field::Added,
                    Piece::String {
                        text: Some(b"last-generated-id"),
                        ..
                    } => Field::Last,
                    _ => Field::Other,
                }),
                Some(field) => {
                    self.note(field, piece);
                    None
                }
            };
        }
        if let Piece::Array(items @ 1..) = piece {
            self.open.push(items);
            return;
        }
        while let Some(missing) = self.open.last_mut() {
            *missing -= 1;
            if *missing > 0 {
                break;
            }
            self.open.pop();
        }
    }

    fn note(&mut self, field: Field, piece: Piece<'_>) {
        match (field, piece) {
            (Field::Length, Piece::Line(line)) => self.length = Reply::new(line).number(),
            (Field::Added, Piece::Line(line)) => self.added = Reply::new(line).number(),
            (Field::Last, Piece::String { text: Some(id), .. }) => self.last = Some(id.to_vec()),
            _ => {}
        }
    }

    /// Whether entries have been removed from the stream. Servers before 7.0 do not count added entries: there, this is
    /// assumed of any stream that ever had one.
    pub(super) fn is_thinned(&self) -> bool {
        match (self.length, self.added, &self.last) {
            (Some(length), Some(added), _) => added > length,
            (_, _, Some(last)) => last != b"0-0",
            _ => true,
        }
    }

    /// Whether no entry was ever added after this one.
    pub(super) fn is_last_added(&self, id: &[u8]) -> bool {
        self.last.as_deref() == Some(id)
    }
}
