//! A text in shared memory that one process writes and all read, without locks.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// How many bytes of a text are kept; what is longer is cut.
pub(crate) const TEXT_BYTES: usize = WORDS * 8;
const WORDS: usize = 64;
/// A reader tries again at most this often. A writer needs less than a microsecond.
const TRIES: usize = 1_000;

#[repr(C)]
pub(crate) struct SharedText {
    /// Odd while it is being written.
    version: AtomicU32,
    length: AtomicU32,
    words: [AtomicU64; WORDS],
}

impl SharedText {
    /// For one process at a time.
    pub(crate) fn write(&self, text: &str) {
        let length = text.floor_char_boundary(TEXT_BYTES);
        // If an earlier writer has died in the middle, the version is odd already.
        let version = self.version.load(Ordering::Relaxed) | 1;
        self.version.store(version, Ordering::Relaxed);
        fence(Ordering::Release);
        self.length.store(length as u32, Ordering::Relaxed);
        for (word, bytes) in self.words.iter().zip(text.as_bytes()[..length].chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(padded), Ordering::Relaxed);
        }
        self.version.store(version.wrapping_add(1), Ordering::Release);
    }

    /// `None`: it is empty.
    pub(crate) fn read(&self) -> Option<String> {
        for _ in 0..TRIES {
            let version = self.version.load(Ordering::Acquire);
            let length = (self.length.load(Ordering::Relaxed) as usize).min(TEXT_BYTES);
            let words = self.words[..length.div_ceil(8)].iter();
            let mut bytes: Vec<u8> = words
                .flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes())
                .collect();
            fence(Ordering::Acquire);
            if version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version {
                bytes.truncate(length);
                return (length > 0).then(|| String::from_utf8_lossy(&bytes).into_owned());
            }
            std::hint::spin_loop();
        }
        None
    }
}
