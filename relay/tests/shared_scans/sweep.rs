//! A sweep: some rows may get other numbers until it has passed them. Their backends wait for it, and nobody else.

use super::*;

/// Whether a row waits for a sweep that has come this far.
pub(crate) fn may_move(seq: i64, swept: Option<i64>) -> bool {
    seq % 11 == 4 && swept.is_some_and(|swept| seq > swept)
}

impl World {
    /// A sweep begins, goes on, or ends.
    pub(crate) fn sweep(&mut self) {
        self.swept = match self.swept {
            None if likely(&mut self.rng, 0.1) => Some(0),
            Some(swept) if swept <= self.latest.high_seq => Some(swept + self.rng.i64(0..30)),
            _ => None,
        };
    }

    pub(crate) fn check_sweep(&self, reader: &Collector) -> Result<(), String> {
        let batched = reader.built.iter().flat_map(|built| &built.batch.entries);
        let failed = reader.records.iter().filter_map(|record| match record {
            Record::Fail { seq, .. } => Some(*seq),
            _ => None,
        });
        let mut read = batched.map(|entry| entry.seq).chain(failed);
        match read.find(|seq| may_move(*seq, self.swept)) {
            Some(seq) => Err(format!("{seq} was read before the sweep")),
            None => Ok(()),
        }
    }
}

#[test]
fn the_oracle_catches_rows_that_are_read_before_the_sweep() {
    let said = said_of(Mutant::ReadsBeforeTheSweep);
    assert!(said.contains("was read before the sweep"), "{said}");
}

#[test]
fn a_row_that_waits_for_a_sweep_stops_only_its_own_backend() {
    let mut world = World::of_fast_senders();
    // The fourth row waits; it is the first backend's.
    world.database.publish(&[1, 0, 1, 0, 1, 1]);
    world.latest = Arc::new(world.database.quiet_tick());
    world.swept = Some(0);
    for _ in 0..5 {
        world.round(50, 0.0).expect("all is well");
        world.hear();
    }
    assert_eq!(world.members[0].sent, [2]);
    assert_eq!(world.members[1].sent, [1, 3, 6]);
    world.swept = None;
    world.round(50, 0.0).expect("all is well");
    assert_eq!(world.members[0].sent, [2, 4]);
}
