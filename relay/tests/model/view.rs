//! What a statement sees of the model's table of events.

use relay::reading::range::{Key, Scan, Step, Table};
use std::rc::Rc;

/// The committed rows at one moment, by number.
#[derive(Clone)]
pub(crate) struct View {
    pub keys: Rc<[Key]>,
}

pub(crate) struct Rows {
    keys: Rc<[Key]>,
    next: usize,
    upto: i64,
    xid: Option<u64>,
    current: i64,
}

impl Rows {
    /// The number of the current row.
    pub(crate) fn seq(&self) -> i64 {
        self.current
    }
}

impl View {
    fn rows(&self, xid: Option<u64>, after: i64, upto: i64) -> Rows {
        Rows {
            next: self.keys.partition_point(|key| key.seq <= after),
            keys: self.keys.clone(),
            upto,
            xid,
            current: 0,
        }
    }
}

impl Table for View {
    type Scan = Rows;

    fn by_seq(&mut self, after: i64, upto: i64) -> Rows {
        self.rows(None, after, upto)
    }

    fn by_xid(&mut self, xid: u64, after: i64, upto: i64) -> Rows {
        self.rows(Some(xid), after, upto)
    }

    fn first_xid(&mut self, from: u64, before: u64) -> Option<u64> {
        let xids = self.keys.iter().map(|key| key.xid);
        xids.filter(|xid| (from..before.max(from)).contains(xid)).min()
    }
}

impl Scan for Rows {
    fn advance(&mut self) -> Option<Step> {
        while let Some(key) = self.keys.get(self.next).filter(|key| key.seq <= self.upto) {
            self.next += 1;
            if self.xid.is_none_or(|xid| xid == key.xid) {
                self.current = key.seq;
                return Some(Step::Row(*key));
            }
        }
        None
    }
}
