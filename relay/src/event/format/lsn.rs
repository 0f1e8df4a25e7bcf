//! A position in the WAL, as entries carry it.

use std::fmt::Write;

#[derive(Default)]
pub(super) struct Lsn {
    pub position: u64,
    /// In the format of Postgres's type `pg_lsn`.
    pub text: String,
}

impl Lsn {
    pub(super) fn move_to(&mut self, position: u64) {
        self.position = position;
        self.text.clear();
        write!(self.text, "{:X}/{:X}", position >> 32, position as u32).expect("writing to memory does not fail");
    }
}
