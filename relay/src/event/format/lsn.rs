//! A position of the WAL, as entries tell it.

use std::fmt::Write;

#[derive(Default)]
pub(super) struct Lsn {
    pub position: u64,
    /// As Postgres's type `pg_lsn` has it.
    pub text: String,
}

impl Lsn {
    pub(super) fn move_to(&mut self, position: u64) {
        self.position = position;
        self.text.clear();
        write!(self.text, "{:X}/{:X}", position >> 32, position as u32).expect("writing to memory does not fail");
    }
}
