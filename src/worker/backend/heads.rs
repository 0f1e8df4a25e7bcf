//! Where the waiting events of refused streams begin. Those before it that were sent or have failed are still in the
//! index, and are passed one by one, as long as somebody's snapshot may need them. So the next look at a stream begins
//! where the last one has found its first event. A look that finds fewer than it wants is followed by one from the
//! beginning, so a stream counts as empty only after that.

use relay::delivery::refusal::Record;
use std::collections::HashMap;
use std::rc::Rc;

#[derive(Default)]
pub(crate) struct Heads(HashMap<Rc<str>, i64>);

impl Heads {
    /// Beyond that, all are forgotten.
    const MOST: usize = 1_000;

    /// The number from which on to look.
    pub(crate) fn of(&self, stream: &str) -> i64 {
        self.0.get(stream).copied().unwrap_or(i64::MIN)
    }

    /// A look has found these, in their order, and may have wanted more. True: there are no others.
    pub(crate) fn found(&mut self, stream: &Rc<str>, seqs: &[i64], wanted: usize) -> bool {
        if seqs.len() < wanted {
            return self.0.remove(stream).is_none();
        }
        // One that waits alone is found at once.
        if let [first, _, ..] = seqs {
            if self.0.len() >= Self::MOST && !self.0.contains_key(stream) {
                self.0.clear();
            }
            self.0.insert(stream.clone(), *first);
        }
        false
    }

    /// Events come to wait, or wait again, perhaps before those that were found.
    pub(crate) fn heed(&mut self, records: &[Record]) {
        if self.0.is_empty() {
            return;
        }
        let parked = records.iter().filter_map(|record| match record {
            Record::Park { seq, .. } => Some(*seq),
            _ => None,
        });
        if let Some(lowest) = parked.min() {
            self.0.retain(|_, first| *first <= lowest);
        }
    }

    /// Redis has lost events that had been accepted.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_empty_only_after_a_look_from_the_beginning() {
        let (mut heads, stream) = (Heads::default(), Rc::from("s"));
        assert_eq!(heads.of("s"), i64::MIN);
        assert!(!heads.found(&stream, &[5, 6, 7], 3));
        assert_eq!(heads.of("s"), 5);
        assert!(!heads.found(&stream, &[7], 3), "others may have come before 5");
        assert_eq!(heads.of("s"), i64::MIN);
        assert!(heads.found(&stream, &[], 3));
    }

    #[test]
    fn events_that_come_to_wait_before_the_others_are_found() {
        let (mut heads, stream) = (Heads::default(), Rc::from("s"));
        heads.found(&stream, &[5, 6, 7], 3);
        let park = |seq| Record::Park {
            seq,
            attempts: 0,
            error: "refused".into(),
        };
        heads.heed(&[park(8), Record::Accepted { seq: 4 }]);
        assert_eq!(heads.of("s"), 5);
        heads.heed(&[park(8), park(4)]);
        assert_eq!(heads.of("s"), i64::MIN);
    }
}
