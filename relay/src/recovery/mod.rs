//! Recovery takes a backend from "its guard was read" to "it is up". It decides whether the guard may be claimed, which
//! position holds then, and which events must be looked for in the streams before anything is sent.
//!
//! ```text
//! Idle ─ guard read ─▶ Read ─ judged ─▶ Claiming ─ confirmed ─▶ Claimed ─▶ Looking ─ answered ─▶ Seen ─▶ Idle, up
//!                       └─ somebody else's: held off, Idle         └──── nothing to look for ────────────▶ Idle, up
//! ```
//! Reports of the sender move it to *Read*, *Claimed* and *Seen*. [`Recovery::step`] continues from there. Everything
//! that it reads and writes goes through [`Books`]: the extension implements them on its tables, the simulation on a
//! model.

pub mod books;
mod candidates;

use crate::delivery::Cursor;
use crate::delivery::refusal::Record;
use crate::event::wanted::Sighting;
use crate::fault::{self, Mutation, Point};
use crate::guard::Guard;
use crate::guard::claim::{Decision, Incarnation, Start, Why, judge};
use crate::guard::epoch::epoch_of;
use crate::guard::watch::Watch;
use crate::reading::range::Position;
use crate::recovery::books::Books;
use crate::recovery::books::Candidate;
use crate::recovery::books::Notice;
use crate::recovery::books::Rows;
use crate::sender::orders::Order;
use crate::sender::orders::{Beginning, Claim};
use crate::time::Now;

/// The error of an event that Redis has refused in a batch whose reply was lost.
const REFUSED_UNHEARD: &str = "Redis refused it, as was seen after an interruption";

#[derive(Default)]
enum Stage {
    #[default]
    Idle,
    /// The guard was read. `None`: Redis has none.
    Read(Option<Guard>),
    /// The sender was ordered to claim the guard.
    Claiming(Start, Option<Guard>),
    /// Redis has confirmed the claim.
    Claimed(Start, Option<Guard>),
    /// The sender is looking for events in the streams.
    Looking(Start, Option<Guard>, Vec<Candidate>),
    /// The sender has reported for each event what was found in its stream.
    Seen(Start, Option<Guard>, Vec<Candidate>, Vec<Sighting>),
}

/// The recovery of one backend on its current connection.
#[derive(Default)]
pub struct Recovery {
    stage: Stage,
    /// What was observed of a guard that another server owns.
    watch: Watch,
    /// Refused events with numbers above this one still have to be looked for. After that, the backend comes up with
    /// this start.
    rest: Option<(Start, i64)>,
}

impl Recovery {
    // --- reports of the sender

    pub fn read(&mut self, guard: Option<Guard>) {
        self.stage = Stage::Read(guard);
    }

    pub fn claimed(&mut self) {
        self.stage = match std::mem::take(&mut self.stage) {
            Stage::Claiming(start, guard) => Stage::Claimed(start, guard),
            stage => stage,
        }
    }

    pub fn seen(&mut self, found: Vec<Sighting>) {
        self.stage = match std::mem::take(&mut self.stage) {
            Stage::Looking(start, guard, candidates) => Stage::Seen(start, guard, candidates, found),
            stage => stage,
        }
    }

    /// The connection is closed.
    pub fn reset(&mut self) {
        self.stage = Stage::Idle;
    }

    /// Redis cannot be reached, so the silence of an owner proves nothing during this time.
    pub fn interrupt(&mut self) {
        self.reset();
        self.watch.interrupt();
    }

    // --- progress

    /// Whether [`Self::step`] has something to do now.
    pub fn is_due(&self) -> bool {
        matches!(self.stage, Stage::Read(_) | Stage::Claimed(..) | Stage::Seen(..))
    }

    /// Whether a claim was ordered.
    pub fn has_claimed(&self) -> bool {
        !matches!(self.stage, Stage::Idle | Stage::Read(_))
    }

    /// Continues until it needs another report. After an error, this connection cannot come up.
    pub fn step<B: Books>(&mut self, books: &mut B, now: Now) -> Result<(), B::Error> {
        match std::mem::take(&mut self.stage) {
            Stage::Read(guard) => self.decide(books, guard, now),
            Stage::Claimed(start, guard) => self.begin(books, start, guard),
            Stage::Seen(start, guard, candidates, found) => {
                let found = candidates::judged(books, guard.as_ref(), found)?;
                self.finish(books, start, guard, &candidates, &found)
            }
            stage @ (Stage::Idle | Stage::Claiming(..) | Stage::Looking(..)) => {
                self.stage = stage;
                Ok(())
            }
        }
    }

    fn decide<B: Books>(&mut self, books: &mut B, guard: Option<Guard>, now: Now) -> Result<(), B::Error> {
        let claimant = books.claimant(guard.as_ref())?;
        let incarnation = claimant.incarnation;
        let decision = judge(guard.as_ref(), &claimant, &mut self.watch, now);
        let start = match decision {
            Decision::Claim(start) => start,
            Decision::Disbelieve(field) => {
                books.disbelieve(field);
                return Ok(());
            }
            Decision::Wait { failure, retry_after } => {
                books.hold_off(failure, retry_after);
                return Ok(());
            }
        };
        if let (Start::Adopt, Incarnation::Current, Some(guard)) = (start, incarnation, &guard)
            && let Err(field) = books.delivery().may_have_sent(guard.number, &guard.position)
        {
            books.disbelieve(field);
            return Ok(());
        }
        // Start::Own needs nothing from the guard, so it does not have to wait for a lock on the table.
        let guard = match start {
            Start::Own => guard,
            _ => guard.map(|guard| books.vouched(guard)).transpose()?,
        };
        if let (Start::Adopt | Start::Heal { .. }, Some(guard)) = (start, &guard)
            && books.in_tables(|rows| candidates::is_more_than_a_batch(rows, guard))?
        {
            books.disbelieve("previous");
            return Ok(());
        }
        let goes_back = go_back(books, start, guard.as_ref())?;
        books.begin_epoch(match (start, &guard) {
            (Start::Compare(Why::OtherHistory), _) | (_, None) => 0,
            (_, Some(guard)) => epoch_of(guard.number),
        });
        if goes_back && !fault::is_mutated(Mutation::KeepOldNumber) {
            books.delivery().stands_at_claim();
        }
        books.save()?;
        let wal = books.flush();
        fault::reach(Point::BeforeClaim);
        let is_new = guard.is_none() || matches!(start, Start::Heal { .. } | Start::Compare(_));
        let beginning = is_new.then(|| beginning(books, start, wal));
        if is_new {
            books.delivery().begins_anew();
        }
        let claim = Claim {
            token: books.token(),
            owner: books.owner(),
            start: beginning,
        };
        books.order(Order::Claim(Box::new(claim)));
        self.stage = Stage::Claiming(start, guard);
        Ok(())
    }

    /// Redis has confirmed the claim: adopts what the guard says, and orders the search in the streams.
    fn begin<B: Books>(&mut self, books: &mut B, start: Start, guard: Option<Guard>) -> Result<(), B::Error> {
        books.has_taken_over()?;
        self.rest = None;
        let newest = books.newest_tick();
        if matches!(start, Start::Compare(_) | Start::Replay) {
            books.compares_to(&newest);
        }
        let start = match fault::is_mutated(Mutation::IgnoreGuard) {
            true => Start::Own,
            false => start,
        };
        if !matches!((start, &guard), (Start::Adopt, _) | (Start::Own, Some(_))) {
            // The claim has written a new guard, which counts as an empty batch.
            let cursor = Cursor {
                position: books.delivery().acked().clone(),
                number: books.delivery().next_number(),
            };
            let total = books.total();
            books.adopt(cursor, total);
        }
        if matches!(start, Start::Heal { .. } | Start::Replay) {
            books.count_healing();
        }
        if start == Start::Replay {
            books.tell(Notice::Replays);
        }
        let candidates = candidates::of(books, start, guard.as_ref(), &newest)?;
        // Only this many waiting events are looked for at a time; the others come next. Events of the last batch do not
        // count, because their numbers may be higher.
        let waiting = candidates.iter().filter(|c| c.waits);
        if waiting.count() >= books.waiting_at_once() {
            self.rest = Some((start, candidates::last_compared(&candidates)));
        }
        if candidates.is_empty() {
            return self.finish(books, start, guard, &[], &[]);
        }
        self.look(books, start, guard, candidates);
        Ok(())
    }

    fn look<B: Books>(&mut self, books: &mut B, start: Start, guard: Option<Guard>, candidates: Vec<Candidate>) {
        books.order(Order::Look(candidates.iter().map(|c| c.wanted.clone()).collect()));
        self.stage = Stage::Looking(start, guard, candidates);
    }

    /// Records which of the candidates are in their streams.
    fn finish<B: Books>(
        &mut self,
        books: &mut B,
        start: Start,
        guard: Option<Guard>,
        candidates: &[Candidate],
        found: &[bool],
    ) -> Result<(), B::Error> {
        let all = || candidates.iter().zip(found);
        let (there, missing): (Vec<_>, Vec<_>) = all().partition(|(_, found)| **found);
        let rows = |of: &[(&Candidate, &bool)]| -> Vec<i64> {
            of.iter().filter(|(c, _)| !c.waits).map(|(c, _)| c.seq).collect()
        };
        let accepted = there.iter().filter(|(c, _)| c.waits);
        let accepted = accepted.map(|(c, _)| Record::Accepted { seq: c.seq });
        match (start, &guard) {
            (Start::Own, _) => accepted.for_each(|record| books.record(record)),
            (Start::Heal { .. } | Start::Compare(_), _) => {
                accepted.for_each(|record| books.record(record));
                books.delivery().pass_over(rows(&there));
                if let Start::Compare(why) = start {
                    books.tell(Notice::Compared {
                        why,
                        guard: guard.as_ref(),
                        found: there.len(),
                        missing: missing.len(),
                    });
                }
            }
            // Nothing was looked for.
            (Start::Replay, _) | (Start::Adopt, None) => {}
            (Start::Adopt, Some(guard)) => {
                let refused = rows(&missing);
                for &seq in &refused {
                    books.record(Record::Park {
                        seq,
                        attempts: 1,
                        error: REFUSED_UNHEARD.into(),
                    });
                }
                accepted.for_each(|record| books.record(record));
                adopt(books, guard, refused.len())?;
            }
        }
        self.come_up(books, start)
    }

    /// Saves everything that was found in one transaction, before anything else is appended. The guard describes only
    /// the last batch, and Redis may lose it.
    fn come_up<B: Books>(&mut self, books: &mut B, start: Start) -> Result<(), B::Error> {
        let start = match (self.rest.is_some(), self.look_for_rest(books)?) {
            (false, _) => start,
            (true, Some(first)) => first,
            // The sender is looking for some of them.
            (true, None) => return Ok(()),
        };
        books.save()?;
        match start {
            Start::Compare(_) | Start::Replay => books.has_compared()?,
            // Restored events are compared with the next start.
            Start::Own | Start::Adopt | Start::Heal { .. } if books.is_restored() => {
                books.let_go();
                return Ok(());
            }
            Start::Own | Start::Adopt | Start::Heal { .. } => {}
        }
        books.come_up()
    }

    /// Looks for the next waiting events that were not looked for yet, so that none is sent twice. When there are no
    /// more, returns the start with which the backend comes up.
    fn look_for_rest<B: Books>(&mut self, books: &mut B) -> Result<Option<Start>, B::Error> {
        while let Some((start, after)) = self.rest.take() {
            // Saved in steps, so that memory is bounded.
            books.save()?;
            let limit = books.waiting_at_once();
            let (last, candidates) = books.in_tables(|rows| candidates::next_waiting(rows, after, limit))?;
            let Some(last) = last else {
                return Ok(Some(start));
            };
            self.rest = Some((start, last));
            if !candidates.is_empty() {
                // Events that are found are treated alike for every start.
                self.look(books, Start::Own, None, candidates);
                return Ok(None);
            }
        }
        Ok(None)
    }
}

/// Moves the cursor back where the start requires it. This must be durable before the claim, because the claim
/// overwrites the guard that requires it. Returns whether the cursor was moved.
fn go_back<B: Books>(books: &mut B, start: Start, guard: Option<&Guard>) -> Result<bool, B::Error> {
    let cursor = |position: &Position, number| Cursor {
        position: position.clone(),
        number,
    };
    let cursor = match (start, guard) {
        (Start::Replay, _) => Cursor {
            position: books.oldest()?,
            number: 0,
        },
        (Start::Heal { heard, .. }, Some(guard)) => {
            books.tell(Notice::Heals(guard));
            match heard {
                // The number belongs to this position. If Redis comes back with batches that it had lost, its guard has
                // a higher one.
                true => cursor(&guard.position, guard.number),
                false => cursor(&guard.previous, guard.number.saturating_sub(1)),
            }
        }
        // The comparison also finds out the outcome of the last batch.
        (Start::Compare(Why::Unfinished), Some(guard)) => cursor(&guard.previous, guard.number),
        _ => return Ok(false),
    };
    // Waiting events that were accepted in a later batch than this cursor's wait again, until they are found.
    books.wait_again(cursor.number)?;
    let reread_to = books.in_tables(|rows| rows.highest_written_down())?;
    books.read_again(cursor, reread_to);
    Ok(true)
}

/// The contents of a new guard. `wal`: the position up to which the WAL is flushed.
fn beginning<B: Books>(books: &mut B, start: Start, wal: u64) -> Beginning {
    let total = books.total();
    let delivery = books.delivery();
    Beginning {
        // It counts as a batch, so that a server which has not seen it recognises that it is behind.
        number: delivery.next_number(),
        position: delivery.acked().clone(),
        // Whether the streams may contain events that come after that position.
        compares: match start {
            Start::Heal { heard, restored } => !heard || restored,
            Start::Compare(_) => true,
            Start::Own | Start::Adopt | Start::Replay => false,
        },
        wal,
        total,
    }
}

/// Adopts the guard's position. `refused`: how many events of its last batch Redis has refused.
fn adopt<B: Books>(books: &mut B, guard: &Guard, refused: usize) -> Result<(), B::Error> {
    let here = books.delivery().acked();
    // The guard does not know ranges without an event to send, nor events that were since sent with at_least_once.
    let position = match here.includes(&guard.position) {
        true => here.clone(),
        false => guard.position.clone(),
    };
    let cursor = Cursor {
        position,
        number: guard.number,
    };
    books.adopt(cursor, guard.total - refused as i64);
    // If Redis has come back with batches that it had lost, rows after that position may have been written down
    // meanwhile.
    let written_down = books.in_tables(|rows| rows.highest_written_down())?;
    books.delivery().set_reread_to(written_down);
    Ok(())
}
