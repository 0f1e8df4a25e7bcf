//! Which events of the transaction were published with the rights of another role than the session's.
//!
//! A row names the session's role. But a function with SECURITY DEFINER, such as the trigger of an attached table,
//! publishes with the rights of its owner, and a view or a rule with those of its own. What they publish may come from
//! where the session's role may not read, so `outbox.published_here()` shows it only to whoever has those rights. This
//! module notes the numbers of such events. Where no rights are lent, drawing a number compares two roles and reads a
//! flag.

use pgrx::pg_sys;
use std::cell::{Cell, RefCell};

/// How many ranges a session notes. Beyond that, the last range grows and may cover events of the session's own role,
/// which are then not shown to it.
const MOST_RANGES: usize = 1_000;
/// Stands for several roles: only who may read all events has the rights of all of them.
const SEVERAL: pg_sys::Oid = pg_sys::InvalidOid;

thread_local! {
    /// Whether something may be noted.
    static IS_USED: Cell<bool> = const { Cell::new(false) };
    static NOTED: RefCell<Noted> = const { RefCell::new(Noted { xid: 0, ranges: Vec::new(), goes_on: false }) };
    static LENDER: Cell<Lender> = const { Cell::new(None) };
}

/// The owner of a view or rule through which the transaction that began then has published.
type Lender = Option<(pg_sys::TimestampTz, pg_sys::Oid)>;

struct Noted {
    /// The transaction.
    xid: u64,
    /// In ascending order.
    ranges: Vec<Range>,
    /// Whether no number for the session's own role was drawn after the last range.
    goes_on: bool,
}

/// Numbers of events that were published with the rights of a role.
struct Range {
    first: i64,
    last: i64,
    role: pg_sys::Oid,
}

impl Noted {
    fn add(&mut self, seq: i64, role: pg_sys::Oid) {
        let is_full = self.ranges.len() >= MOST_RANGES;
        match self.ranges.last_mut() {
            Some(range) if is_full || self.goes_on && range.role == role => {
                range.last = seq;
                range.role = common(range.role, role);
            }
            _ => self.ranges.push(Range {
                first: seq,
                last: seq,
                role,
            }),
        }
        self.goes_on = true;
    }
}

fn common(one: pg_sys::Oid, other: pg_sys::Oid) -> pg_sys::Oid {
    if one == other { one } else { SEVERAL }
}

/// Called for each number that is drawn, with the current role and that of the session.
pub(super) fn note(xid: u64, seq: i64, current: pg_sys::Oid, session: pg_sys::Oid) {
    if current != session || IS_USED.get() {
        note_role(xid, seq, (current != session).then_some(current));
    }
}

#[inline(never)]
fn note_role(xid: u64, seq: i64, current: Option<pg_sys::Oid>) {
    let lender = lender();
    let role = match (current, lender) {
        (Some(current), Some(lender)) => Some(common(current, lender)),
        (current, lender) => current.or(lender),
    };
    let is_used = NOTED.with_borrow_mut(|noted| {
        if noted.xid != xid {
            noted.xid = xid;
            noted.ranges.clear();
        }
        match role {
            Some(role) => noted.add(seq, role),
            None => noted.goes_on = false,
        }
        !noted.ranges.is_empty()
    });
    IS_USED.set(is_used || lender.is_some());
}

/// Notes that a statement publishes through a view or a rule of this role. Postgres does not say which rows come from
/// there, so all that the transaction publishes from now on counts as published with that role's rights.
pub(crate) fn note_lender(role: pg_sys::Oid) {
    let role = lender().map_or(role, |lender| common(lender, role));
    LENDER.set(Some((transaction(), role)));
    IS_USED.set(true);
}

/// Runs `f`, which begins a statement of `publish_event` itself: it lends the right of the table's owner, but the event
/// is the caller's.
pub(super) fn without_lender<R>(f: impl FnOnce() -> R) -> R {
    let before = LENDER.get();
    let result = f();
    LENDER.set(before);
    result
}

fn lender() -> Option<pg_sys::Oid> {
    let (began, role) = LENDER.get()?;
    (began == transaction()).then_some(role)
}

/// When the current transaction began. Two that begin in one message have the same time: then the second counts as if
/// rights were lent in it, too.
fn transaction() -> pg_sys::TimestampTz {
    // SAFETY: a plain read.
    unsafe { pg_sys::GetCurrentTransactionStartTimestamp() }
}

/// With whose rights an event of the transaction was published; `None`: with those of the role that its row names.
pub(crate) fn role_of(xid: u64, seq: i64) -> Option<pg_sys::Oid> {
    NOTED.with_borrow(|noted| {
        let ranges = if noted.xid == xid { &noted.ranges[..] } else { &[] };
        let range = ranges.get(ranges.partition_point(|range| range.last < seq))?;
        (range.first <= seq).then_some(range.role)
    })
}
