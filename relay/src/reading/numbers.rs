//! The highest number that an event has got, in memory that all publishers and the worker share.
//!
//! Numbers come from a sequence, and anybody may set a sequence back: `TRUNCATE ... RESTART IDENTITY`, `setval`, `ALTER
//! SEQUENCE ... RESTART`, an older dump. So nothing relies on the sequence. A publisher reads the highest number after
//! it has its transaction id and before it draws, and accepts only a higher number; before it inserts the row, it
//! stores the number here. The bounds of a tick (see [`crate::reading::snapshot::Tick`]) are also read here, and hold
//! whatever happens to the sequence.

use std::sync::atomic::{AtomicI64, Ordering};

/// Zeroed memory is valid and means that nothing is known yet. The first process that needs the number finds it, see
/// [`Self::found`].
#[repr(C)]
#[derive(Debug, Default)]
pub struct Highest {
    number: AtomicI64,
    /// The number that was found first, subtracted from the largest number, so that 0 means that nothing is known.
    began: AtomicI64,
}

impl Highest {
    /// The highest number of any event; `None`: not known.
    pub fn get(&self) -> Option<i64> {
        let is_known = self.began.load(Ordering::Acquire) != 0;
        is_known.then(|| self.number.load(Ordering::Acquire))
    }

    /// Every number that was drawn since the highest is known is above this one.
    pub fn began(&self) -> Option<i64> {
        Some(self.began.load(Ordering::Acquire))
            .filter(|began| *began != 0)
            .map(|began| i64::MAX - began)
    }

    /// `number` is the highest in what is durable. Meanwhile other processes may also have found it, and have drawn
    /// numbers.
    pub fn found(&self, number: i64) {
        let number = number.clamp(0, i64::MAX - 1);
        self.number.fetch_max(number, Ordering::AcqRel);
        // In this order: when the number counts as known, it is not below what any process has found.
        self.began.fetch_max(i64::MAX - number, Ordering::AcqRel);
    }

    /// A publisher has drawn `number`.
    pub fn raise(&self, number: i64) {
        self.number.fetch_max(number, Ordering::AcqRel);
    }

    /// Nobody uses the number any more.
    pub fn forget(&self) {
        self.began.store(0, Ordering::Release);
        self.number.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_unknown_until_a_process_has_found_it() {
        let highest = Highest::default();
        assert_eq!((highest.get(), highest.began()), (None, None));
        highest.found(0);
        assert_eq!((highest.get(), highest.began()), (Some(0), Some(0)));
    }

    #[test]
    fn the_number_never_decreases() {
        let highest = Highest::default();
        highest.found(10);
        highest.raise(12);
        highest.raise(11);
        assert_eq!((highest.get(), highest.began()), (Some(12), Some(10)));
        // Another process had looked earlier, and reports later.
        highest.found(8);
        assert_eq!((highest.get(), highest.began()), (Some(12), Some(8)));
        highest.forget();
        assert_eq!(highest.get(), None);
    }
}
