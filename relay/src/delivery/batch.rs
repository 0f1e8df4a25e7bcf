//! Batches that are being filled.

use crate::delivery::flight::{BatchedEvent, Contents};
use std::rc::Rc;

/// Larger batches miss the CPU's cache.
pub const BATCH_BYTES: usize = 256 * 1024;
/// Of a batch's entries for one stream, the first of so many has MAXLEN: Redis trims by nodes of a hundred entries
/// anyway.
const TRIM_EVERY: usize = 16;

/// A batch that is being filled.
#[derive(Default)]
pub struct OpenBatch {
    pub bytes: Vec<u8>,
    pub entries: Vec<BatchedEvent>,
    /// Its streams, a few of them, each with its entries since one that trims it.
    untrimmed: Vec<(Rc<str>, usize)>,
}

impl OpenBatch {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            ..Self::default()
        }
    }

    /// Whether the next entry of a stream is to trim it.
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

    /// Whether it has so many events, or so many bytes.
    #[inline]
    pub fn is_full(&self, events: usize, bytes: usize) -> bool {
        self.entries.len() >= events || self.bytes.len() >= bytes
    }
}

/// A batch that was built but not handed over yet: that waits for the end of the reading transaction.
pub struct BuiltBatch {
    pub batch: OpenBatch,
    pub contents: Contents,
}
