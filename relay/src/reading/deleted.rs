//! When a deleted backend no longer needs a reader of its own.

use crate::reading::range::Position;

/// Whether the reader of a deleted backend can end and leave the backend's rows to the reader of strays. It can if both
/// stand at the same tick: then every row is read by exactly one of them. `next_xid`: no transaction with this id or a
/// higher one had begun when the worker learned of the deletion. All earlier ones must have ended, because only they
/// can have published while the backend existed. So their events do not wait with the strays.
pub fn may_go(position: &Position, strays: &Position, next_xid: u64) -> bool {
    position.under_way.is_none() && position.same_place(strays) && position.from.snapshot.xmin() >= next_xid
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reading::snapshot::Tick;
    use std::sync::Arc;

    fn tick(text: &str) -> Arc<Tick> {
        Arc::new(text.parse().unwrap())
    }

    #[test]
    fn a_reader_ends_at_the_tick_of_the_strays_when_earlier_transactions_have_ended() {
        let (complete, with_open) = (tick("20:20:/20/1/2"), tick("15:20:15/20/1/2"));
        let at = |tick: &Arc<Tick>| Position::at(tick.clone());
        let under_way = Position::towards(complete.clone(), tick("30:30:/30/1/9"), 5);
        for (position, strays, next_xid, goes) in [
            (at(&complete), at(&complete), 20, true),
            (at(&complete), at(&complete), 21, false),
            (at(&with_open), at(&with_open), 15, true),
            (at(&with_open), at(&with_open), 16, false),
            (at(&complete), at(&with_open), 15, false),
            (under_way.clone(), under_way.clone(), 3, false),
            (at(&complete), under_way, 3, false),
        ] {
            assert_eq!(
                may_go(&position, &strays, next_xid),
                goes,
                "{position} {strays} {next_xid}"
            );
        }
    }
}
