//! Where the next piece of a reply stands, in arrays within arrays.

use crate::resp::read::Piece;

/// The open arrays of a reply that is read piece by piece.
pub struct Place {
    /// Outermost first.
    open: Vec<Open>,
}

struct Open {
    missing: u64,
    passed: u64,
}

impl Place {
    /// At the beginning of an array with at least one item.
    pub fn of(items: u64) -> Self {
        let mut place = Self { open: Vec::new() };
        place.begin(items);
        place
    }

    fn begin(&mut self, items: u64) {
        self.open.push(Open {
            missing: items,
            passed: 0,
        });
    }

    pub fn depth(&self) -> usize {
        self.open.len()
    }

    /// Which item of the array at this depth comes next, from 0; the outermost has depth 1.
    pub fn index(&self, depth: usize) -> u64 {
        let open = depth.checked_sub(1).and_then(|at| self.open.get(at));
        open.map_or(0, |open| open.passed)
    }

    /// Moves past a piece. Returns whether the outermost array has ended.
    pub fn pass(&mut self, piece: Piece<'_>) -> bool {
        if let Piece::Array(items @ 1..) = piece {
            self.begin(items);
            return false;
        }
        while let Some(open) = self.open.last_mut() {
            (open.missing, open.passed) = (open.missing.saturating_sub(1), open.passed + 1);
            if open.missing > 0 {
                return false;
            }
            self.open.pop();
        }
        true
    }
}
