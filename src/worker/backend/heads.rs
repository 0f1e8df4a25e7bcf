//! Where the waiting events of each refused stream begin. While an old snapshot may need them, events that were sent or
//! have failed stay in the index, and a search passes them one by one. So a search begins where the last one found the
//! stream's first event. If it finds too few, another one begins at the first event of all; only after that does the
//! stream count as empty.

use relay::delivery::refusal::Record;
use std::collections::HashMap;
use std::rc::Rc;

#[derive(Default)]
pub(crate) struct Heads(HashMap<Rc<str>, i64>);

impl Heads {
    /// With more streams than this, all are forgotten.
    const MOST: usize = 1_000;

    /// The number at which the next search begins.
    pub(crate) fn of(&self, stream: &str) -> i64 {
        self.0.get(stream).copied().unwrap_or(i64::MIN)
    }

    /// A search has found these, in order, and may have wanted more. True: there are no others.
    pub(crate) fn found(&mut self, stream: &Rc<str>, seqs: &[i64], wanted: usize) -> bool {
        if seqs.len() < wanted {
            return self.0.remove(stream).is_none();
        }
        // A single waiting event is found at once.
        if let [first, _, ..] = seqs {
            if self.0.len() >= Self::MOST && !self.0.contains_key(stream) {
                self.0.clear();
            }
            self.0.insert(stream.clone(), *first);
        }
        false
    }

    /// Further events wait now, perhaps before those that were found.
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
