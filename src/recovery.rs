//! From a connection that has read the guard to a backend that is up: whether to claim, and what the guard says was appended.

use crate::backend::{Backend, ClaimStage};
use crate::care;
use crate::catalog;
use crate::guc::{self, LogLevel, TakeOver};
use crate::numbers;
use crate::outbox;
use crate::ownership::{Identity, token};
use crate::process::{self, Aborted, log};
use crate::refused;
use crate::rows::{EventsTable, Row, attribute};
use crate::ticker;
use crate::worker;
use relay::claim::{Claimant, Decision, Incarnation, OnMissing, Start, Why, judge};
use relay::classify::{Failure, Trouble};
use relay::conversation::{Beginning, Claim};
use relay::delivery::{Cursor, Now, epoch_of};
use relay::fault;
use relay::guard::Guard;
use relay::reader::{Position, RangeScan, Scan, Step, Table};
use relay::refusal::Record;
use relay::sender::Order;
use relay::server_text::shown;
use relay::snapshot::Tick;
use relay::tails::{Purpose, Wanted};
use std::sync::Arc;
use std::time::Duration;

/// Events that are compared with the streams' tails after a change of owner; and of those that were refused and wait, which are all compared,
/// so many at a time.
const COMPARED: usize = 100_000;

/// No batch has more events (`outbox_relay.batch_size`).
const MOST_OF_A_BATCH: usize = 10_000;

/// An event that may stand in its stream already.
pub struct Candidate {
    seq: i64,
    wanted: Wanted,
    /// It had been refused, and waits.
    waits: bool,
}

/// Takes one backend as far as it can go now. `latest`: the newest tick.
pub fn step(backend: &mut Backend, identity: &Identity, latest: &Arc<Tick>, now: Now) -> Result<(), Aborted> {
    match std::mem::take(&mut backend.claim) {
        ClaimStage::Read(guard) => decide(backend, identity, guard, now),
        ClaimStage::Claimed(start, guard) => begin(backend, start, guard, latest, now),
        ClaimStage::Seen(start, guard, candidates, found) => finish(backend, start, guard, &candidates, &found, now),
        // It has what was asked for.
        ClaimStage::None if backend.delivery.is_up() => forget_take_over(backend),
        stage @ (ClaimStage::None | ClaimStage::Claiming(..) | ClaimStage::Looking(..)) => {
            backend.claim = stage;
            Ok(())
        }
    }
}

fn decide(backend: &mut Backend, identity: &Identity, guard: Option<Guard>, now: Now) -> Result<(), Aborted> {
    let (incarnation, reach) = process::transaction(|| {
        let known = |guard: &Guard| identity.know(&guard.incarnation);
        (guard.as_ref().map_or(Incarnation::Unknown, known), backend.reach())
    })?;
    let row = backend.row.as_ref();
    let claimant = Claimant {
        incarnation,
        system: identity.system(),
        place: identity.place(),
        promoted_to: identity.promoted_to(),
        anybody: guc::TAKE_OVER.get() == TakeOver::Any,
        copy: backend.is_copy(),
        paused: !backend.is_enabled(),
        number: backend.delivery.number(),
        reach,
        on_missing: match row.map(|r| r.on_missing_guard.as_str()) {
            Some("halt") => OnMissing::Halt,
            Some("replay") => OnMissing::Replay,
            _ => OnMissing::Continue,
        },
        take_over: backend.is_told_to_take_over(),
        restored: backend.is_restored(),
    };
    match judge(guard.as_ref(), &claimant, &mut backend.watch, now) {
        Decision::Claim(start) => {
            if let (Start::Adopt, Incarnation::Current, Some(guard)) = (start, incarnation, &guard)
                && let Err(field) = backend.delivery.may_have_sent(guard.number, &guard.position)
            {
                disbelieve(backend, field, now);
                return Ok(());
            }
            let guard = guard.map(vouched).transpose()?;
            if let (Start::Adopt | Start::Heal { .. }, Some(guard)) = (start, &guard)
                && is_more_than_a_batch(backend, guard)?
            {
                disbelieve(backend, "previous", now);
                return Ok(());
            }
            // Before the guard is ours: whoever claims next would not know.
            match (start, &guard) {
                (Start::Replay, _) => {
                    let oldest = oldest(backend)?;
                    step_back(backend, cursor(&oldest, 0), 0, now)?;
                }
                (Start::Heal { heard }, Some(guard)) => {
                    say_healed(backend, guard);
                    let cursor = match heard {
                        // That number belongs to the position: should Redis come back with what it had lost, that is news.
                        true => cursor(&guard.position, guard.number),
                        false => cursor(&guard.previous, guard.number.saturating_sub(1)),
                    };
                    // What waited and was accepted behind the number that counts from now on waits again, until it is found.
                    let since = cursor.number;
                    step_back(backend, cursor, since, now)?;
                }
                // What its last batch came to is found by comparing, too.
                (Start::Compare(Why::Unfinished), Some(guard)) => {
                    step_back(backend, cursor(&guard.previous, guard.number), guard.number, now)?;
                }
                _ => {}
            }
            let claimed = match (start, &guard) {
                (Start::Compare(Why::OtherHistory), _) | (_, None) => 0,
                (_, Some(guard)) => epoch_of(guard.number),
            };
            backend.begin_epoch(claimed, now);
            worker::save(std::slice::from_mut(backend), |_| true, now)?;
            let wal = ticker::flush();
            fault::reach("before_claim");
            let anew = guard.is_none() || matches!(start, Start::Heal { .. } | Start::Compare(_));
            let beginning = anew.then(|| beginning(backend, start, wal));
            if anew {
                backend.delivery.begins_anew();
            }
            backend.order(Order::Claim(Box::new(Claim {
                token: token(),
                owner: identity.owner(),
                start: beginning,
            })));
            backend.claim = ClaimStage::Claiming(start, guard);
        }
        Decision::Disbelieve(field) => disbelieve(backend, field, now),
        Decision::Wait { failure, retry_after } => backend.hold_off(failure, retry_after, now),
    }
    Ok(())
}

/// Somebody else has written this field of the guard.
fn disbelieve(backend: &mut Backend, field: &str, now: Now) {
    let key = backend.guard_key();
    let text = format!("the guard says what this server has never written, in {field}: {key}");
    backend.hold_off(Failure::of(Trouble::NoGuard, text), Duration::ZERO, now);
}

/// The guard speaks of one batch. Who believed that it was all that is retained would look for all of that.
fn is_more_than_a_batch(backend: &Backend, guard: &Guard) -> Result<bool, Aborted> {
    let (from, upto) = (&guard.previous, &guard.position);
    care::transaction(|| between(backend, from, upto, MOST_OF_A_BATCH + 1, Purpose::Settle).len() > MOST_OF_A_BATCH)
}

/// A guard that an earlier run of the server has left may have seen numbers that were lost with it.
fn vouched(guard: Guard) -> Result<Guard, Aborted> {
    let [position, previous] =
        process::transaction(|| [&guard.position, &guard.previous].map(numbers::vouched_of_guard))?;
    Ok(Guard {
        position,
        previous,
        ..guard
    })
}

/// What a new guard says; `wal`: up to where all is flushed.
fn beginning(backend: &Backend, start: Start, wal: u64) -> Beginning {
    Beginning {
        // It counts as a batch: whoever has not heard of it is behind.
        number: backend.delivery.next_number(),
        position: backend.delivery.acked().clone(),
        compares: matches!(start, Start::Heal { heard: false } | Start::Compare(_)),
        wal,
        total: backend.total(),
    }
}

fn forget_take_over(backend: &mut Backend) -> Result<(), Aborted> {
    let (number, is_lane) = (backend.number, backend.lane.is_some());
    if !backend.is_enabled() {
        return Ok(());
    }
    if let Some(row) = backend.row.as_mut().filter(|row| row.take_over) {
        // The other lanes have been asked, too.
        if !is_lane {
            process::transaction(|| outbox::forget_take_over(number))?;
        }
        row.take_over = false;
    }
    Ok(())
}

/// The guard is ours.
fn begin(
    backend: &mut Backend,
    start: Start,
    guard: Option<Guard>,
    latest: &Arc<Tick>,
    now: Now,
) -> Result<(), Aborted> {
    forget_take_over(backend)?;
    backend.to_compare = None;
    if matches!(start, Start::Compare(_) | Start::Replay) {
        backend.compares_to(latest);
    }
    let start = if fault::is_mutated("ignore_guard") {
        Start::Own
    } else {
        start
    };
    let candidates = match (start, &guard) {
        (Start::Adopt, None) => return come_up(backend, start, now),
        // Redis may have come back with what it had lost before: then some that wait now had been accepted.
        (Start::Own, Some(_)) => care::transaction(|| waiting(backend))?,
        (Start::Adopt, Some(guard)) => care::transaction(|| {
            let others = waiting(backend).into_iter().filter(|c| !guard.again.contains(&c.seq));
            last_batch(backend, guard).into_iter().chain(others).collect()
        })?,
        (Start::Own | Start::Replay, _) => {
            if start == Start::Replay {
                backend.count_healing();
                say_replayed(backend);
            }
            begin_anew(backend, now);
            return come_up(backend, start, now);
        }
        (Start::Heal { .. }, guard) => {
            backend.count_healing();
            begin_anew(backend, now);
            care::transaction(|| {
                let mut found = waiting(backend);
                if let Some(guard) = guard {
                    let here = backend.delivery.acked();
                    found.extend(between(backend, here, &guard.position, usize::MAX, Purpose::Compare));
                }
                found
            })?
        }
        (Start::Compare(_), _) => {
            begin_anew(backend, now);
            care::transaction(|| unsent(backend, latest))?
        }
    };
    note_rest(backend, start, &candidates);
    if candidates.is_empty() {
        return finish(backend, start, guard, &[], &[], now);
    }
    look(backend, start, guard, candidates);
    Ok(())
}

fn look(backend: &mut Backend, start: Start, guard: Option<Guard>, candidates: Vec<Candidate>) {
    backend.order(Order::Look(candidates.iter().map(|c| c.wanted.clone()).collect()));
    backend.claim = ClaimStage::Looking(start, guard, candidates);
}

/// If not all that wait are among the candidates, where those go on that are to be compared next.
fn note_rest(backend: &mut Backend, start: Start, candidates: &[Candidate]) {
    let waiting = || candidates.iter().filter(|c| c.waits);
    if waiting().count() >= compared() {
        // Those of the last batch may be further on.
        let in_order = waiting().filter(|c| c.wanted.purpose == Purpose::Compare);
        backend.to_compare = Some((start, in_order.map(|c| c.seq).max().unwrap_or(0)));
    }
}

/// Before it comes up: what waits and was not compared yet, the next of it. So nothing is sent again that Redis has.
fn compare_rest(backend: &mut Backend, now: Now) -> Result<Option<Start>, Aborted> {
    while let Some((start, after)) = backend.to_compare.take() {
        // What was found is not kept in memory.
        worker::save(std::slice::from_mut(backend), |_| true, now)?;
        let seqs = process::transaction(|| refused::waiting(backend.number, after, compared()))?;
        let Some(last) = seqs.last() else {
            return Ok(Some(start));
        };
        backend.to_compare = Some((start, *last));
        let candidates = care::transaction(|| served(backend, by_seq(backend, &seqs, Purpose::Compare)))?;
        if !candidates.is_empty() {
            // What is done with those that are found is the same, whatever the start was.
            look(backend, Start::Own, None, candidates);
            return Ok(None);
        }
    }
    Ok(None)
}

/// [`COMPARED`], or fewer in tests.
fn compared() -> usize {
    if fault::is_mutated("compare_by_two") {
        2
    } else {
        COMPARED
    }
}

/// Which of the candidates stand in their streams is known.
fn finish(
    backend: &mut Backend,
    start: Start,
    guard: Option<Guard>,
    candidates: &[Candidate],
    found: &[bool],
    now: Now,
) -> Result<(), Aborted> {
    let there = || {
        candidates
            .iter()
            .zip(found)
            .filter(|(_, found)| **found)
            .map(|(c, _)| c)
    };
    let missing = || {
        candidates
            .iter()
            .zip(found)
            .filter(|(_, found)| !**found)
            .map(|(c, _)| c)
    };
    let accepted = there().filter(|c| c.waits).map(|c| Record::Accepted { seq: c.seq });
    match (start, &guard) {
        (Start::Own, _) => backend.records.extend(accepted),
        (Start::Heal { .. } | Start::Compare(_), _) => {
            backend.records.extend(accepted);
            backend.delivery.pass_over(there().filter(|c| !c.waits).map(|c| c.seq));
            if let Start::Compare(why) = start {
                say_compared(backend, why, guard.as_ref(), there().count(), missing().count());
            }
        }
        (_, Some(guard)) => {
            let absent = missing().filter(|c| !c.waits).map(|c| Record::Park {
                seq: c.seq,
                attempts: 1,
                error: "Redis refused it, as was seen after an interruption".into(),
            });
            let refused = missing().filter(|c| !c.waits).count();
            backend.records.extend(absent.chain(accepted));
            let here = backend.delivery.acked();
            // What was sent with at_least_once since then is not in the guard.
            let position = match here.includes(&guard.position) {
                true => here.clone(),
                false => guard.position.clone(),
            };
            let cursor = Cursor {
                position,
                number: guard.number,
            };
            backend.adopt(cursor, guard.total - refused as i64, now);
            // If Redis has come back with what it had lost, rows behind that may have been written down meanwhile.
            let number = backend.number;
            let written_down = process::transaction(|| refused::highest_written_down(number))?;
            backend.delivery.set_reread_to(written_down);
        }
        (_, None) => {}
    }
    come_up(backend, start, now)
}

/// The guard was made anew, as if with an empty batch.
fn begin_anew(backend: &mut Backend, now: Now) {
    let cursor = Cursor {
        position: backend.delivery.acked().clone(),
        number: backend.delivery.next_number(),
    };
    backend.adopt(cursor, backend.total(), now);
}

/// All that was found is saved, in one go and before anything else is appended: the guard tells of one batch alone, and it may be
/// lost.
fn come_up(backend: &mut Backend, start: Start, now: Now) -> Result<(), Aborted> {
    let start = match (backend.to_compare.is_some(), compare_rest(backend, now)?) {
        (false, _) => start,
        (true, Some(first)) => first,
        // Some are being looked for.
        (true, None) => return Ok(()),
    };
    worker::save(std::slice::from_mut(backend), |_| true, now)?;
    match start {
        Start::Compare(_) | Start::Replay => {
            backend.forget_restores()?;
            backend.has_compared(now);
        }
        // From here on, what a dump has brought can be compared.
        Start::Own | Start::Adopt | Start::Heal { .. } if backend.is_restored() => {
            backend.let_go();
            return Ok(());
        }
        Start::Own | Start::Adopt | Start::Heal { .. } => {}
    }
    backend.reload_streams()?;
    backend.up(now);
    Ok(())
}

fn cursor(position: &Position, number: u64) -> Cursor {
    Cursor {
        position: position.clone(),
        number,
    }
}

/// Goes back to `cursor`: events that waited and were accepted after batch `since` wait again.
fn step_back(backend: &mut Backend, cursor: Cursor, since: u64, now: Now) -> Result<(), Aborted> {
    let (number, lane, stream) = (backend.number, backend.lane, backend.stream.clone());
    let reread_to = process::transaction(|| {
        refused::heal(number, lane, &stream, since);
        refused::highest_written_down(number)
    })?;
    backend.read_again(cursor, reread_to, now);
    Ok(())
}

/// Up to where events have been purged.
fn oldest(backend: &Backend) -> Result<Position, Aborted> {
    let number = backend.number;
    process::transaction(|| {
        let oldest = outbox::oldest_tick(number);
        numbers::vouched(&oldest.map_or_else(Position::beginning, Position::at))
    })
}

/// What all lanes of a backend were to do once is done: it is forgotten. `restored`: a tick that sees what restores have brought.
pub fn finish_lanes(backends: &mut [Backend], latest: &Arc<Tick>) -> Result<(), Aborted> {
    for index in 0..backends.len() {
        let finder = &backends[index];
        let Some(row) = finder.row.as_ref().filter(|_| finder.is_finder()) else {
            continue;
        };
        let number = finder.number;
        let of_lanes = || backends.iter().filter(|b| b.number == number && b.lane.is_some());
        let asks = |b: &Backend| b.row.as_ref().is_some_and(|row| row.take_over);
        let is_taken_over = row.take_over && !of_lanes().any(asks);
        // Lanes are still to be made for what lies before it.
        let has_found_all = Arc::ptr_eq(&finder.delivery.acked().from, latest);
        let is_compared = !row.restores.is_empty() && has_found_all && !of_lanes().any(Backend::is_restored);
        let finder = &mut backends[index];
        if is_taken_over {
            forget_take_over(finder)?;
        }
        if is_compared {
            finder.forget_restores()?;
        }
    }
    Ok(())
}

/// With at_least_once, what a dump has brought is sent, wherever it may stand already.
pub fn give_up_comparing(backend: &mut Backend) -> Result<(), Aborted> {
    let Some(row) = backend.row.as_ref().filter(|row| !row.restores.is_empty()) else {
        return Ok(());
    };
    if backend.lane.is_some() {
        // The finder says so for all.
        return backend.forget_restores();
    }
    let count = process::transaction(|| outbox::count_restored(&row.restores))?;
    log(
        LogLevel::Warning,
        &format!("{count} events of a dump were restored for backend \"{}\"", row.name),
        Some("With delivery = 'at_least_once' they are not looked for in the streams."),
        Some("Those that have been sent since the dump was taken are sent again, with the same event_id."),
    );
    backend.forget_restores()
}

fn say_healed(backend: &Backend, guard: &Guard) {
    let (known, found) = (backend.delivery.number(), guard.number);
    log(
        LogLevel::Warning,
        &format!(
            "backend \"{}\" heals: Redis has lost what it acknowledged",
            backend.name()
        ),
        Some(&format!(
            "Its guard says batch {found}, the last that was acknowledged is {known}."
        )),
        Some("What was lost is appended again. See Redis's persistence and replication, and wait_replicas."),
    );
}

fn say_replayed(backend: &Backend) {
    log(
        LogLevel::Warning,
        &format!("guard of backend \"{}\" is missing", backend.name()),
        Some("Redis has lost its data, or it is another Redis."),
        Some("As on_missing_guard says, all events that are retained are sent again."),
    );
}

fn say_compared(backend: &Backend, why: Why, guard: Option<&Guard>, there: usize, missing: usize) {
    let (message, detail) = match (why, guard) {
        (Why::Missing, _) => (
            format!("guard of backend \"{}\" is missing", backend.name()),
            "Redis has lost its data, or it is another Redis.".to_owned(),
        ),
        (Why::OtherHistory, Some(guard)) => (
            format!(
                "backend \"{}\" goes on after another history of this database",
                backend.name()
            ),
            format!(
                "Its streams were written last by the server at {} (timeline {}), up to a position that this one never had.",
                shown(&guard.place),
                guard.timeline
            ),
        ),
        (Why::Restored, _) => (
            format!("events of a dump were restored for backend \"{}\"", backend.name()),
            "Some may have been sent since the dump was taken.".to_owned(),
        ),
        (Why::Unfinished | Why::OtherHistory, _) => (
            format!("backend \"{}\" goes on where comparing was interrupted", backend.name()),
            "Its guard says that events behind it may stand in the streams already.".to_owned(),
        ),
    };
    let hint = format!(
        "It goes on with what was not sent: {there} of the events after its saved position stand in the streams already and are not repeated, {missing} are sent."
    );
    log(LogLevel::Warning, &message, Some(&detail), Some(&hint));
}

/// The events of the last batch that the guard speaks of, as far as nobody has written down what became of them.
fn last_batch(backend: &Backend, guard: &Guard) -> Vec<Candidate> {
    if !guard.again.is_empty() {
        return by_seq(backend, &refused::still_waiting(&guard.again), Purpose::Settle);
    }
    between(backend, &guard.previous, &guard.position, usize::MAX, Purpose::Settle)
}

/// Events that may have been sent by somebody of whose work we know nothing.
fn unsent(backend: &Backend, latest: &Arc<Tick>) -> Vec<Candidate> {
    let mut found = waiting(backend);
    let here = backend.delivery.acked();
    let upto = Position::at(latest.clone());
    // A position on its way to a tick goes there first.
    if let Some(under_way) = &here.under_way {
        let there = Position::at(under_way.to.clone());
        found.extend(between(backend, here, &there, COMPARED, Purpose::Compare));
        found.extend(between(backend, &there, &upto, COMPARED, Purpose::Compare));
    } else {
        found.extend(between(backend, here, &upto, COMPARED, Purpose::Compare));
    }
    found
}

/// Events that were refused and wait.
fn waiting(backend: &Backend) -> Vec<Candidate> {
    let mut found = Vec::new();
    let mut after = 0;
    // Until there are enough that are its own: other lanes have some of them.
    while found.len() < compared() {
        let seqs = refused::waiting(backend.number, after, compared());
        let Some(last) = seqs.last() else { break };
        after = *last;
        found.extend(served(backend, by_seq(backend, &seqs, Purpose::Compare)));
    }
    found
}

/// Those of a lane.
fn served(backend: &Backend, mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    candidates.retain(|candidate| backend.serves(&candidate.wanted.stream));
    candidates
}

fn by_seq(backend: &Backend, seqs: &[i64], purpose: Purpose) -> Vec<Candidate> {
    let mut table = EventsTable::open(&catalog::expect_relations());
    let mut found = Vec::new();
    for seq in seqs {
        let mut scan = table.by_seq(seq - 1, *seq);
        if scan.advance().is_some() && is_comparable(scan.row()) {
            found.push(candidate(backend, *seq, scan.row(), true, purpose));
        }
    }
    table.close();
    found
}

/// The backend's rows from one position to another, which are written down nowhere.
fn between(backend: &Backend, from: &Position, upto: &Position, limit: usize, purpose: Purpose) -> Vec<Candidate> {
    let mut table = EventsTable::open(&catalog::expect_relations());
    let mut found = Vec::new();
    let to = upto.newest();
    // Within one range, the rows that were read before need not be passed again.
    let after = match &from.under_way {
        Some(under_way) if *under_way.to == **to => under_way.last_seq,
        _ => 0,
    };
    let written_down_to = refused::highest_written_down(backend.number);
    let last = upto
        .under_way
        .as_ref()
        .filter(|_| after > 0 || from.under_way.is_none())
        .map(|u| u.last_seq);
    let mut scan = RangeScan::open(&mut table, &from.from, to, after);
    while let Some(step) = scan.step() {
        let (Step::Row(key) | Step::Passed(key)) = step;
        if found.len() >= limit || last.is_some_and(|last| key.seq > last) {
            break;
        }
        let row = scan.current().row();
        let concerns = matches!(step, Step::Row(_))
            && row.backend_number() == backend.number
            && upto.covers(key)
            && !from.covers(key)
            && is_comparable(row);
        if concerns {
            let candidate = candidate(backend, key.seq, row, false, purpose);
            if !backend.serves(&candidate.wanted.stream) {
                continue;
            }
            if key.seq > written_down_to || !refused::is_written_down(key.seq, candidate.wanted.event_id) {
                found.push(candidate);
            }
        }
    }
    drop(scan);
    table.close();
    found
}

/// Whether it can be said which stream a row is to be looked for in. One of which it cannot fails when it is read to be sent.
fn is_comparable(row: &Row) -> bool {
    !care::is_careful() || care::tried(|| row.text(attribute::STREAM).map(|_| ())).is_ok()
}

fn candidate(backend: &Backend, seq: i64, row: &Row, waits: bool, purpose: Purpose) -> Candidate {
    // Of the row no more is read than this: what else is in it may not be readable.
    let stream = row.text(attribute::STREAM);
    Candidate {
        seq,
        wanted: Wanted {
            stream: Arc::from(stream.as_deref().unwrap_or(&backend.stream)),
            event_id: row.uuid(attribute::EVENT_ID).unwrap_or_default(),
            created_at_us: row.created_at_us(),
            purpose,
        },
        waits,
    }
}
