//! The highest number that an event was given, in memory that all publishers and the worker share.
//!
//! Numbers come from a sequence, and anybody may set a sequence back: `TRUNCATE ... RESTART IDENTITY`, `setval`, `ALTER
//! SEQUENCE ... RESTART`, a dump that is older. So nobody relies on the sequence: a publisher looks here after it has
//! its transaction id and before it draws, and takes only a number above what it saw; and before it inserts the row it
//! leaves the number here. The bounds of a tick (see [`crate::reading::snapshot::Tick`]) are read here, too, and hold
//! whatever the sequence does.

use std::sync::atomic::{AtomicI64, Ordering};

/// Zeroed memory is a valid one, of which nothing is known yet: who needs it first finds out, see [`Self::found`].
#[repr(C)]
#[derive(Debug, Default)]
pub struct Highest {
    number: AtomicI64,
    /// What was found out first, subtracted from the largest number, so that 0 means that nothing is known.
    began: AtomicI64,
}

impl Highest {
    /// The highest number that was given; `None`: not known.
    pub fn get(&self) -> Option<i64> {
        let is_known = self.began.load(Ordering::Acquire) != 0;
        is_known.then(|| self.number.load(Ordering::Acquire))
    }

    /// Every number that was given since it is known is above this one.
    pub fn began(&self) -> Option<i64> {
        Some(self.began.load(Ordering::Acquire))
            .filter(|began| *began != 0)
            .map(|began| i64::MAX - began)
    }

    /// `number` is the highest in what is durable. The process that found it may have been overtaken by others,
    /// and drew.
    pub fn found(&self, number: i64) {
        let number = number.clamp(0, i64::MAX - 1);
        self.number.fetch_max(number, Ordering::AcqRel);
        // In this order: once it is known, the number is not below what anybody has found.
        self.began.fetch_max(i64::MAX - number, Ordering::AcqRel);
    }

    /// A publisher has drawn `number`.
    pub fn raise(&self, number: i64) {
        self.number.fetch_max(number, Ordering::AcqRel);
    }

    /// Nobody uses it any more.
    pub fn forget(&self) {
        self.began.store(0, Ordering::Release);
        self.number.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_unknown_until_somebody_has_found_it() {
        let highest = Highest::default();
        assert_eq!((highest.get(), highest.began()), (None, None));
        highest.found(0);
        assert_eq!((highest.get(), highest.began()), (Some(0), Some(0)));
    }

    #[test]
    fn never_goes_back() {
        let highest = Highest::default();
        highest.found(10);
        highest.raise(12);
        highest.raise(11);
        assert_eq!((highest.get(), highest.began()), (Some(12), Some(10)));
        // Another had looked earlier, and comes later.
        highest.found(8);
        assert_eq!((highest.get(), highest.began()), (Some(12), Some(8)));
        highest.forget();
        assert_eq!(highest.get(), None);
    }
}
