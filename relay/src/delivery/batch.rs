//! Batches that are being built.

use crate::delivery::flight::{BatchedEvent, Contents};
use std::rc::Rc;

/// Larger batches do not fit in the CPU's cache.
pub const BATCH_BYTES: usize = 256 * 1024;
/// Among a batch's entries for one stream, each first of this many has MAXLEN: Redis only trims whole nodes of a
/// hundred entries anyway.
const TRIM_EVERY: usize = 16;

/// A batch that is being built.
#[derive(Default)]
pub struct OpenBatch {
    pub bytes: Vec<u8>,
    pub entries: Vec<BatchedEvent>,
    /// Some of its streams, each with the number of entries since the last one that trims it.
    untrimmed: Vec<(Rc<str>, usize)>,
}

impl OpenBatch {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }

    /// Whether the next entry of a stream shall trim it.
    #[inline]
    pub fn trims(&mut self, stream: &Rc<str>) -> bool {
        let known = self.untrimmed.iter_mut().find(|(name, _)| Rc::ptr_eq(name, stream));
        if let Some((_, entries)) = known {
            *entries = (*entries + 1) % TRIM_EVERY;
            return *entries == 0;
        }
        if self.untrimmed.len() < TRIM_EVERY {
            self.untrimmed.push((stream.clone(), 0));
        }
        true
    }

    /// Whether it has at least this many events or bytes.
    #[inline]
    pub fn is_full(&self, events: usize, bytes: usize) -> bool {
        self.entries.len() >= events || self.bytes.len() >= bytes
    }
}

/// A batch that was built but not handed over yet: it waits for the end of the reading transaction.
pub struct BuiltBatch {
    pub batch: OpenBatch,
    pub contents: Contents,
}
