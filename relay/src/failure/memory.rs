//! Memory whose size depends on what others have written. It is asked for, and whoever gets none can do without it for
//! now. Rust's own collections cannot: where they get none, the process ends.

use crate::failure::{Failure, Trouble};
use std::cell::Cell;
use std::collections::TryReserveError;
use std::hint::black_box;

/// There is not enough memory now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("out of memory")]
pub struct NoMemory;

impl NoMemory {
    /// The failure of a connection that needs memory for something.
    pub fn failure(self, what: &str) -> Failure {
        Failure::of(Trouble::NoMemory, format!("no memory for {what}"))
    }
}

thread_local! {
    static IS_ASKING: Cell<bool> = const { Cell::new(false) };
}

/// For the allocator: whether this thread can do without the memory that it is asking for.
pub fn is_asking() -> bool {
    IS_ASKING.get()
}

/// Makes room for this many more bytes in a buffer.
#[inline]
pub fn reserve(buffer: &mut Vec<u8>, more: usize) -> Result<(), NoMemory> {
    match buffer.capacity() - buffer.len() >= more {
        true => Ok(()),
        false => ask(|| buffer.try_reserve(more)),
    }
}

/// As [`reserve`], with no more room than that.
pub fn reserve_exact(buffer: &mut Vec<u8>, more: usize) -> Result<(), NoMemory> {
    ask(|| buffer.try_reserve_exact(more))
}

/// Whether this much memory is there now, for work that needs at most that.
pub fn expect(bytes: usize) -> Result<(), NoMemory> {
    // The compiler may leave out an allocation that is not used.
    let mut buffer = black_box(Vec::new());
    reserve_exact(&mut buffer, bytes)?;
    drop(black_box(buffer));
    Ok(())
}

#[cold]
fn ask(reserve: impl FnOnce() -> Result<(), TryReserveError>) -> Result<(), NoMemory> {
    IS_ASKING.set(true);
    let outcome = reserve();
    IS_ASKING.set(false);
    outcome.map_err(|_| NoMemory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_asks_for_too_much_gets_none() {
        const TOO_MUCH: usize = isize::MAX as usize - 4_096;
        let mut buffer = vec![1, 2];
        assert_eq!(reserve(&mut buffer, TOO_MUCH), Err(NoMemory));
        assert_eq!(reserve_exact(&mut buffer, TOO_MUCH), Err(NoMemory));
        assert_eq!(expect(TOO_MUCH), Err(NoMemory));
        assert!(!is_asking() && buffer == [1, 2]);
        assert_eq!((reserve(&mut buffer, 100), expect(100)), (Ok(()), Ok(())));
        assert!(buffer.capacity() >= 102);
    }
}
