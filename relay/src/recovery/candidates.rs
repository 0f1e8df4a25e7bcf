//! Candidates: events that may already be in their streams, and are looked for there before anything is sent.

use crate::event::text::{rfc3339, unhyphenated};
use crate::event::wanted::{EventName, Purpose, Sighting};
use crate::guard::Guard;
use crate::guard::claim::Start;
use crate::reading::range::{Key, Position, RangeScan, Scan, Table};
use crate::reading::snapshot::Tick;
use crate::recovery::books::Rows;
use crate::recovery::books::{Books, Candidate};
use std::collections::HashMap;
use std::sync::Arc;

/// The most events that a batch can have (`outbox_relay.batch_size`).
const MOST_OF_A_BATCH: usize = 10_000;

/// The candidates of a backend that has claimed its guard.
pub(super) fn of<B: Books>(
    books: &mut B,
    start: Start,
    guard: Option<&Guard>,
    newest: &Arc<Tick>,
) -> Result<Vec<Candidate>, B::Error> {
    let (at_once, most) = (books.waiting_at_once(), books.most_compared());
    let here = books.delivery().acked().clone();
    match (start, guard) {
        (Start::Adopt | Start::Own, None) | (Start::Replay, _) => Ok(Vec::new()),
        // Redis may have come back with batches that it had lost. Then it has accepted some of the events that wait
        // now.
        (Start::Own, Some(_)) => books.in_tables(|rows| waiting(rows, at_once)),
        (Start::Adopt, Some(guard)) => books.in_tables(|rows| {
            let mut found = last_batch(rows, guard);
            let others = waiting(rows, at_once).into_iter();
            found.extend(others.filter(|c| !guard.again.contains(&c.seq)));
            found
        }),
        (Start::Heal { restored: false, .. }, Some(guard)) => books.in_tables(|rows| {
            let mut found = waiting(rows, at_once);
            let way = (&here, &guard.position);
            found.extend(between(rows, way, usize::MAX, Looks::settling(guard)));
            found
        }),
        (Start::Heal { .. } | Start::Compare(_), _) => books.in_tables(|rows| {
            let mut found = waiting(rows, at_once);
            found.extend(unsent(rows, &here, newest, most));
            found
        }),
    }
}

/// Whether each candidate counts as appended.
pub(super) fn judged<B: Books>(
    books: &mut B,
    guard: Option<&Guard>,
    found: Vec<Sighting>,
) -> Result<Vec<bool>, B::Error> {
    let mut lasts: HashMap<EventName, bool> = HashMap::new();
    for sighting in &found {
        if let (Sighting::NotBehind(last), Some(guard)) = (sighting, guard)
            && !lasts.contains_key(last)
        {
            let is_earlier = books.in_tables(|rows| was_sent(rows, last, &guard.position))?;
            lasts.insert(*last, is_earlier);
        }
    }
    // Entries that others have added to the stream, at any time, prove nothing about the batch. An executed batch has
    // hardly ever a refused event, and later entries of others may have trimmed it away.
    let is_appended = |sighting: &Sighting| match sighting {
        Sighting::There => true,
        Sighting::Missing => false,
        Sighting::NotBehind(last) => !lasts.get(last).is_some_and(|is_earlier| *is_earlier),
    };
    Ok(found.iter().map(is_appended).collect())
}

/// Whether an entry belongs to an event that this backend has sent up to `position`, and that nobody else can have
/// sent.
fn was_sent<R: Rows>(rows: &mut R, name: &EventName, position: &Position) -> bool {
    let (id, time) = name;
    let published = unhyphenated(id).and_then(|event_id| rows.published(event_id));
    published.is_some_and(|(key, created_at_us)| rfc3339(created_at_us) == *time && position.covers(key))
}

/// Whether the guard's last batch would be larger than any batch. A forged guard could otherwise make us look for all
/// retained events.
pub(super) fn is_more_than_a_batch<R: Rows>(rows: &mut R, guard: &Guard) -> bool {
    let limit = MOST_OF_A_BATCH + 1;
    let way = (&guard.previous, &guard.position);
    between(rows, way, limit, Looks::settling(guard)).len() == limit
}

/// The highest number of a waiting event among the candidates.
pub(super) fn last_compared(candidates: &[Candidate]) -> i64 {
    let in_order = |c: &&Candidate| c.waits && c.wanted.purpose == Purpose::Compare;
    candidates
        .iter()
        .filter(in_order)
        .map(|c| c.seq)
        .max()
        .unwrap_or_default()
}

/// The next waiting events after number `after`, and the number of the last row that was read. `None`: there are no
/// more.
pub(super) fn next_waiting<R: Rows>(rows: &mut R, after: i64, limit: usize) -> (Option<i64>, Vec<Candidate>) {
    let seqs = rows.waiting(after, limit);
    (seqs.last().copied(), by_seq(rows, &seqs, Looks::COMPARING))
}

/// Events that were refused and wait.
fn waiting<R: Rows>(rows: &mut R, limit: usize) -> Vec<Candidate> {
    let mut found = Vec::new();
    let mut after = 0;
    // Some of the rows belong to other lanes, so this continues until there are enough of its own.
    while found.len() < limit {
        let (last, candidates) = next_waiting(rows, after, limit);
        let Some(last) = last else { break };
        after = last;
        found.extend(candidates);
    }
    found
}

/// The events of the guard's last batch whose outcome is not written down.
fn last_batch<R: Rows>(rows: &mut R, guard: &Guard) -> Vec<Candidate> {
    if !guard.again.is_empty() {
        let waiting = rows.still_waiting(&guard.again);
        return by_seq(rows, &waiting, Looks::settling(guard));
    }
    let way = (&guard.previous, &guard.position);
    between(rows, way, usize::MAX, Looks::settling(guard))
}

/// Events that an unknown owner may have sent: up to `limit` on the way to the tick that is being read, and as many
/// from there to the newest tick.
fn unsent<R: Rows>(rows: &mut R, here: &Position, newest: &Arc<Tick>, limit: usize) -> Vec<Candidate> {
    let upto = Position::at(newest.clone());
    // A position within a tick's range reads that range to its end first.
    let Some(under_way) = &here.under_way else {
        return between(rows, (here, &upto), limit, Looks::COMPARING);
    };
    let there = Position::at(under_way.to.clone());
    let mut found = between(rows, (here, &there), limit, Looks::COMPARING);
    found.extend(between(rows, (&there, &upto), limit, Looks::COMPARING));
    found
}

/// How candidates are looked for.
#[derive(Clone, Copy)]
struct Looks<'a> {
    purpose: Purpose,
    /// Where those stand that name no stream. `None`: in the backend's own, as it is now.
    own_stream: Option<&'a str>,
}

impl<'a> Looks<'a> {
    const COMPARING: Self = Self {
        purpose: Purpose::Compare,
        own_stream: None,
    };

    /// Whether events that are replayed are looked for. Their first entries stand in the streams already, so what is
    /// found tells nothing of the replay: only of a batch that was executed it is known that each was accepted or
    /// refused. Otherwise they are sent, and rather repeated than lost.
    fn for_replays(&self) -> bool {
        self.purpose == Purpose::Settle
    }

    /// For those of the guard's last batch, which was executed.
    fn settling(guard: &'a Guard) -> Self {
        Self {
            purpose: Purpose::Settle,
            own_stream: guard.own_stream.as_deref(),
        }
    }
}

fn by_seq<R: Rows>(rows: &mut R, seqs: &[i64], looks: Looks<'_>) -> Vec<Candidate> {
    let mut table = rows.open();
    let mut found = Vec::new();
    for &seq in seqs {
        let mut scan = table.by_seq(seq - 1, seq);
        let is_sought = scan.advance().is_some() && (looks.for_replays() || !rows.is_replay(&scan));
        let wanted = is_sought.then(|| rows.wanted(&scan, looks.purpose, looks.own_stream));
        found.extend(wanted.flatten().map(|wanted| Candidate {
            seq,
            waits: true,
            wanted,
        }));
    }
    rows.close(table);
    found
}

/// The backend's rows from one position to another that are neither refused nor failed.
fn between<R: Rows>(
    rows: &mut R,
    (from, upto): (&Position, &Position),
    limit: usize,
    looks: Looks<'_>,
) -> Vec<Candidate> {
    let written_down_to = rows.highest_written_down();
    let mut table = rows.open();
    let mut found = Vec::new();
    let to = upto.newest();
    // Within the same range, rows that were read before are skipped.
    let after = match &from.under_way {
        Some(under_way) if *under_way.to == **to => under_way.last_seq,
        _ => 0,
    };
    let goes_straight = after > 0 || from.under_way.is_none();
    let last = upto.under_way.as_ref().filter(|_| goes_straight).map(|u| u.last_seq);
    let is_between = |key: Key| upto.covers(key) && !from.covers(key);
    let mut scan = RangeScan::open(&mut table, &from.from, to, after);
    while let Some(step) = scan.step() {
        if found.len() >= limit || last.is_some_and(|last| step.seq() > last) {
            break;
        }
        let Some(key) = step.row().filter(|key| is_between(*key)) else {
            continue;
        };
        if !looks.for_replays() && rows.is_replay(scan.current()) {
            continue;
        }
        let Some(wanted) = rows.wanted(scan.current(), looks.purpose, looks.own_stream) else {
            continue;
        };
        if key.seq > written_down_to || !rows.is_written_down(key.seq, &wanted) {
            found.push(Candidate {
                seq: key.seq,
                waits: false,
                wanted,
            });
        }
    }
    drop(scan);
    rows.close(table);
    found
}
