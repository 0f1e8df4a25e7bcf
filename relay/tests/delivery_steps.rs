//! The delivery, step by step: the life of a refused stream, gaps, restarts, the window.

mod model;

use model::{out_of_memory, wrong_type};
use relay::delivery::backoff::Backoff;
use relay::delivery::flight::WINDOW_BATCHES;
use relay::delivery::flight::{BatchedEvent, Contents};
use relay::delivery::refusal::{Record, Streams};
use relay::delivery::{Cursor, Delivery, Guarantee, RowFate};
use relay::failure::Failure;
use relay::reading::range::Position;
use relay::reading::snapshot::Tick;
use relay::time::Now;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// The same as in the module `delivery`.
const WINDOW_BYTES: usize = 2 * 1024 * 1024;

const SECOND: Duration = Duration::from_secs(1);

/// A delivery whose inputs and clock are set by hand.
struct Desk {
    delivery: Delivery,
    now: Now,
    ticks: [Arc<Tick>; 2],
    max_attempts: u32,
}

impl Desk {
    fn new(max_attempts: u32) -> Self {
        Self::with(Streams::default(), max_attempts)
    }

    /// Connected.
    fn with(streams: Streams, max_attempts: u32) -> Self {
        let ticks = [0, 1_000].map(|high_seq| {
            Arc::new(Tick {
                high_seq,
                ..Tick::beginning()
            })
        });
        let backoff = Backoff {
            exponential: false,
            delay: SECOND,
            max_delay: 60 * SECOND,
        };
        let mut desk = Self {
            delivery: Delivery::new(
                Guarantee::AtLeastOnce,
                Cursor {
                    position: Position::at(ticks[0].clone()),
                    number: 0,
                },
                streams,
                backoff,
            ),
            now: Now::ZERO,
            ticks,
            max_attempts,
        };
        desk.connect();
        desk
    }

    fn connect(&mut self) {
        assert!(self.delivery.wants_connection(self.now));
        self.delivery.connecting();
        self.delivery.connected();
    }

    fn here(&self, seq: i64) -> Position {
        Position::towards(self.ticks[0].clone(), self.ticks[1].clone(), seq)
    }

    fn entries(&self, seqs: &[i64], stream: &str) -> Vec<BatchedEvent> {
        let entry = |seq: &i64| BatchedEvent {
            seq: *seq,
            stream: Rc::from(stream),
            max_attempts: self.max_attempts,
            committed_after_us: 0,
        };
        seqs.iter().map(entry).collect()
    }

    /// Reads rows of one stream, and gives each its result.
    fn read(&mut self, seqs: &[i64], stream: &str) -> Vec<RowFate> {
        let fates: Vec<_> = seqs.iter().map(|seq| self.delivery.on_row(*seq, stream)).collect();
        let to_send = seqs.iter().zip(&fates).filter(|(_, fate)| **fate == RowFate::Send);
        let batch: Vec<i64> = to_send.map(|(seq, _)| *seq).collect();
        for (seq, _) in seqs.iter().zip(&fates).filter(|(_, fate)| **fate != RowFate::Send) {
            self.delivery.skipped(*seq);
        }
        if let Some(last) = batch.last() {
            self.delivery.sent(
                self.entries(&batch, stream),
                Contents::Rows { end: self.here(*last) },
                100,
            );
        }
        self.delivery.advanced(self.here(*seqs.last().expect("some rows")));
        fates
    }

    fn replied(&mut self, refused: &[(usize, Failure)]) -> Vec<String> {
        brief(&self.delivery.replied(refused.to_vec(), self.now, 0.5))
    }

    fn lost(&mut self, accepted: usize) -> Vec<String> {
        let reset = Failure::backend("connection reset by peer");
        brief(&self.delivery.lost(reset, accepted, Vec::new(), self.now, 0.5))
    }

    /// The stream that is due, and how many of its events are sent.
    fn due(&mut self) -> Option<(String, usize)> {
        let mut due = self.delivery.streams_to_retry(self.now, 1, 10);
        assert!(due.len() <= 1, "{due:?}");
        due.pop().map(|retry| (retry.stream.to_string(), retry.count))
    }

    /// Streams whose waiting events must fail.
    fn failing(&self) -> Vec<String> {
        let failing = self.delivery.streams_to_fail(10);
        failing.iter().map(|(stream, _)| stream.to_string()).collect()
    }

    fn retry(&mut self, seqs: &[i64], stream: &str) {
        let (due, count) = self.due().expect("a stream is due");
        assert!(due == stream && count >= seqs.len(), "{due}, {count}");
        self.delivery
            .sent(self.entries(seqs, stream), Contents::Waiting { all: Vec::new() }, 100);
    }

    fn acked(&self) -> Option<i64> {
        self.delivery.acked().under_way.as_ref().map(|u| u.last_seq)
    }
}

fn brief(records: &[Record]) -> Vec<String> {
    let brief = |record: &Record| match record {
        Record::Park { seq, attempts, .. } => format!("{seq} waits after {attempts}"),
        Record::Fail { seq, attempts, .. } => format!("{seq} fails after {attempts}"),
        Record::Accepted { seq } => format!("{seq} accepted"),
        Record::RefusedAgain { seq, attempts, .. } => format!("{seq} waits on after {attempts}"),
    };
    records.iter().map(brief).collect()
}

const NOTHING: [String; 0] = [];

#[test]
fn a_refused_stream_fails_after_its_attempts_and_is_forgiven_by_a_success() {
    let mut desk = Desk::new(3);
    desk.read(&[1, 2], "a");
    assert_eq!(
        desk.replied(&[(0, wrong_type()), (1, wrong_type())]),
        ["1 waits after 1", "2 waits after 1"]
    );
    // Later events wait behind it, and the cursor passes them all.
    assert_eq!(desk.read(&[3], "a"), [RowFate::Park]);
    assert_eq!(desk.acked(), Some(3));

    assert_eq!((desk.due(), desk.delivery.due_at()), (None, Some(SECOND)));
    desk.now = SECOND;
    desk.retry(&[1], "a");
    assert_eq!(
        (desk.due(), desk.delivery.due_at()),
        (None, None),
        "it is being tried already"
    );
    assert_eq!(desk.replied(&[(0, wrong_type())]), ["1 waits on after 2"]);
    assert_eq!((desk.due(), desk.delivery.due_at()), (None, Some(2 * SECOND)));
    desk.now = 2 * SECOND;
    desk.retry(&[1], "a");
    assert_eq!(desk.replied(&[(0, wrong_type())]), ["1 fails after 3"]);
    assert_eq!((desk.due(), desk.delivery.due_at()), (None, None));
    // The events that wait behind it must fail, and events that arrive meanwhile must not overtake it.
    assert_eq!(desk.failing(), ["a"]);
    assert_eq!(desk.read(&[8], "a"), [RowFate::Park]);
    desk.delivery.stream_failed(&Rc::from("a"));
    assert_eq!(desk.failing(), NOTHING);

    // From now on, one attempt each.
    assert_eq!(desk.read(&[4, 5], "a"), [RowFate::Send; 2]);
    assert_eq!(
        desk.replied(&[(0, wrong_type()), (1, wrong_type())]),
        ["4 fails after 1", "5 fails after 1"]
    );
    // Until one is accepted.
    desk.read(&[6], "a");
    assert_eq!(desk.replied(&[]), NOTHING);
    desk.read(&[7], "a");
    assert_eq!(desk.replied(&[(0, wrong_type())]), ["7 waits after 1"]);
}

#[test]
fn with_one_attempt_it_fails_at_once() {
    let mut desk = Desk::new(1);
    desk.read(&[1, 2, 3], "a");
    assert_eq!(
        desk.replied(&[(0, wrong_type()), (2, wrong_type())]),
        ["1 fails after 1", "3 fails after 1"]
    );
    assert_eq!(desk.read(&[4], "a"), [RowFate::Send]);
    assert_eq!((desk.acked(), desk.delivery.due_at()), (Some(3), None));
}

#[test]
fn an_accepted_head_is_followed_by_the_others_in_order() {
    let mut desk = Desk::new(5);
    desk.read(&[1, 2], "a");
    desk.replied(&[(0, wrong_type()), (1, wrong_type())]);
    desk.read(&[3], "a");
    desk.now = SECOND;
    desk.retry(&[1], "a");
    assert_eq!(desk.replied(&[]), ["1 accepted"]);
    assert_eq!(desk.read(&[4], "a"), [RowFate::Park], "2 and 3 come first");
    desk.retry(&[2, 3, 4], "a");
    assert_eq!(desk.read(&[5], "a"), [RowFate::Park]);
    assert_eq!(desk.replied(&[]), ["2 accepted", "3 accepted", "4 accepted"]);
    desk.retry(&[5], "a");
    assert_eq!(desk.replied(&[]), ["5 accepted"]);
    assert_eq!(desk.due(), Some(("a".to_owned(), 10)));
    desk.delivery.stream_cleared(&Rc::from("a"));
    assert_eq!(desk.read(&[6], "a"), [RowFate::Send]);
    assert_eq!(desk.delivery.accepted(), 5);
}

#[test]
fn a_blocked_stream_does_not_stop_others() {
    let mut desk = Desk::new(5);
    desk.read(&[1], "a");
    desk.replied(&[(0, wrong_type())]);
    for seq in 2..500 {
        let stream = ["a", "b"][seq as usize % 2];
        let fates = desk.read(&[seq], stream);
        match stream {
            "a" => assert_eq!(fates, [RowFate::Park]),
            _ => {
                assert_eq!(fates, [RowFate::Send]);
                assert_eq!(desk.replied(&[]), NOTHING);
            }
        }
        assert_eq!(desk.acked(), Some(seq));
    }
}

#[test]
fn a_refused_follower_is_a_new_head() {
    let mut desk = Desk::new(2);
    desk.read(&[1, 2, 3], "a");
    desk.replied(&[(0, wrong_type()), (1, wrong_type()), (2, wrong_type())]);
    desk.now = SECOND;
    desk.retry(&[1], "a");
    desk.replied(&[]);
    desk.retry(&[2, 3], "a");
    assert_eq!(desk.replied(&[(0, wrong_type())]), ["2 waits on after 1", "3 accepted"]);
    assert_eq!((desk.due(), desk.delivery.due_at()), (None, Some(2 * SECOND)));
}

#[test]
fn an_accepted_event_does_not_fail_with_its_stream() {
    let mut desk = Desk::new(1);
    let waiting = [("a".to_owned(), 0)];
    desk.delivery.set_streams(Streams::waiting(waiting));
    desk.retry(&[1], "a");
    desk.replied(&[]);
    desk.retry(&[2, 3, 4], "a");
    assert_eq!(
        desk.replied(&[(0, wrong_type())]),
        ["2 fails after 1", "3 accepted", "4 accepted"]
    );
    assert_eq!(desk.failing(), ["a"]);
}

#[test]
fn a_restart_goes_on_with_the_attempts_that_were_written_down() {
    let mut desk = Desk::with(Streams::waiting([("a".to_owned(), 2)]), 3);
    assert_eq!(desk.read(&[7], "a"), [RowFate::Park]);
    desk.retry(&[5], "a");
    assert_eq!(desk.replied(&[(0, wrong_type())]), ["5 fails after 3"]);
    assert_eq!(desk.failing(), ["a"]);
    // Events that are looked for again in the table must fail all the same.
    desk.delivery
        .set_streams(Streams::waiting([("a".to_owned(), 0), ("b".to_owned(), 1)]));
    assert_eq!(desk.failing(), ["a"]);
    desk.retry(&[8], "b");
    assert_eq!(desk.due(), None);
}

#[test]
fn heads_of_many_streams_are_tried_in_one_batch_and_each_goes_its_own_way() {
    let names = ["a", "b", "c", "d"].map(str::to_owned);
    let mut desk = Desk::with(Streams::waiting(names.map(|name| (name, 1))), 3);
    let due = desk.delivery.streams_to_retry(desk.now, 3, 10);
    let due: Vec<_> = due.iter().map(|retry| (&*retry.stream, retry.count)).collect();
    assert_eq!(due, [("a", 1), ("b", 1), ("c", 1)]);
    let of = |seq: i64, stream: &str| desk.entries(&[seq], stream);
    let entries = [of(1, "a"), of(2, "b"), of(3, "c")].concat();
    desk.delivery.sent(entries, Contents::Waiting { all: Vec::new() }, 100);
    assert_eq!(
        desk.replied(&[(1, wrong_type())]),
        ["1 accepted", "2 waits on after 2", "3 accepted"]
    );
    // The fourth one, and the followers in two streams: they share the room.
    let due = desk.delivery.streams_to_retry(desk.now, 3, 10);
    let due: Vec<_> = due.iter().map(|retry| (&*retry.stream, retry.count)).collect();
    assert_eq!(due, [("d", 1), ("a", 5), ("c", 5)]);
    desk.delivery.stream_put_back(&Rc::from("c"));
    assert_eq!(desk.due(), Some(("c".to_owned(), 10)));
    assert_eq!((desk.due(), desk.delivery.due_at()), (None, Some(SECOND)));
}

#[test]
fn an_attempt_that_an_outage_cut_short_does_not_count() {
    let mut desk = Desk::with(Streams::waiting([("a".to_owned(), 2)]), 3);
    desk.retry(&[1], "a");
    assert_eq!(desk.lost(0), NOTHING);
    desk.connect();
    desk.retry(&[1], "a");
    assert_eq!(desk.replied(&[(0, out_of_memory())]), NOTHING);
    assert!(desk.delivery.is_drained());
    desk.delivery.drained();
    desk.now += SECOND;
    desk.connect();
    desk.retry(&[1], "a");
    assert_eq!(desk.replied(&[]), ["1 accepted"]);
}

#[test]
fn an_event_that_is_being_retried_is_not_retried_a_second_time() {
    let mut desk = Desk::with(Streams::waiting([("a".to_owned(), 1), ("b".to_owned(), 1)]), 3);
    desk.retry(&[1], "a");
    assert_eq!(desk.due(), Some(("b".to_owned(), 1)));
    // The table could not be read.
    desk.delivery.retry_failed();
    assert_eq!(desk.due(), Some(("b".to_owned(), 1)));
    assert_eq!(desk.due(), None);
    desk.delivery.set_streams(Streams::waiting([("a".to_owned(), 1)]));
    assert_eq!(desk.due(), None);
    assert_eq!(desk.replied(&[]), ["1 accepted"]);
    assert_eq!(desk.due(), Some(("a".to_owned(), 10)));
}

#[test]
fn events_that_were_accepted_after_a_gap_are_not_sent_again() {
    use RowFate::{Send, Skip};
    let mut desk = Desk::new(3);
    desk.read(&[1, 2, 3], "a");
    desk.read(&[4], "a");
    assert_eq!(desk.replied(&[(1, out_of_memory())]), NOTHING);
    assert!(!desk.delivery.has_room() && !desk.delivery.is_drained());
    assert_eq!(desk.replied(&[]), NOTHING);
    for _ in 0..3 {
        // However often the gap stays.
        desk.delivery.drained();
        assert_eq!(desk.acked(), Some(1));
        desk.now += SECOND;
        desk.connect();
        assert_eq!(desk.read(&[2, 3, 4, 5], "a"), [Send, Skip, Skip, Send]);
        assert_eq!(desk.replied(&[(0, out_of_memory()), (1, out_of_memory())]), NOTHING);
    }
    desk.delivery.drained();
    desk.now += SECOND;
    desk.connect();
    assert_eq!(desk.read(&[2, 3, 4, 5], "a"), [Send, Skip, Skip, Send]);
    assert_eq!(desk.replied(&[]), NOTHING);
    assert_eq!((desk.acked(), desk.delivery.accepted()), (Some(5), 5));
}

#[test]
fn a_batch_that_ends_with_its_range_has_no_position_for_a_part_of_it() {
    use RowFate::{Send, Skip};
    let mut desk = Desk::new(3);
    let end = Position::at(desk.ticks[1].clone());
    desk.delivery
        .sent(desk.entries(&[1, 2, 3], "a"), Contents::Rows { end: end.clone() }, 100);
    desk.delivery.advanced(end);
    desk.replied(&[(1, out_of_memory())]);
    desk.delivery.drained();
    assert!(desk.delivery.acked().same_place(&Position::at(desk.ticks[0].clone())));
    desk.now += SECOND;
    desk.connect();
    assert_eq!(desk.read(&[1, 2, 3], "a"), [Skip, Send, Skip]);
}

#[test]
fn a_lost_connection_is_tried_again_at_once_and_then_with_backoff() {
    let mut desk = Desk::new(3);
    desk.read(&[1, 2], "a");
    assert_eq!(desk.replied(&[]), NOTHING);
    desk.read(&[3, 4, 5], "a");
    assert_eq!(desk.lost(1), NOTHING);
    assert_eq!((desk.acked(), desk.delivery.is_idle()), (Some(3), true));
    assert_eq!(desk.delivery.due_at(), Some(desk.now));
    desk.delivery.connecting();
    desk.lost(0);
    assert_eq!(desk.delivery.due_at(), Some(desk.now + SECOND));
    assert!(!desk.delivery.wants_connection(desk.now));
    desk.now += SECOND;
    desk.delivery.connecting();
    let denied = Failure::configuration("WRONGPASS");
    desk.delivery.lost(denied, 0, Vec::new(), desk.now, 0.5);
    assert_eq!(desk.delivery.due_at(), Some(desk.now + 5 * SECOND));
    desk.delivery.retry_changed(desk.now);
    desk.connect();
    assert_eq!(desk.read(&[4, 5], "a"), [RowFate::Send; 2]);
}

/// A server that acknowledges a batch on each connection, and then closes it.
#[test]
fn connections_that_are_replaced_at_once_are_bounded() {
    let mut desk = Desk::new(3);
    let (start, mut lost) = (desk.now, Vec::new());
    let mut seq = 0;
    while desk.now < start + 10 * SECOND {
        if lost.is_empty() || desk.delivery.wants_connection(desk.now) {
            if !lost.is_empty() {
                desk.connect();
            }
            seq += 1;
            desk.read(&[seq], "a");
            desk.replied(&[]);
            desk.lost(0);
            lost.push(desk.now - start);
        }
        desk.now += SECOND / 100;
    }
    assert!(lost[7] < SECOND / 10, "{lost:?}");
    assert!((15..=30).contains(&lost.len()), "{lost:?}");
    // After a pause, a lost connection is replaced at once.
    desk.now += 10 * SECOND;
    desk.connect();
    desk.read(&[seq + 1], "a");
    desk.replied(&[]);
    desk.lost(0);
    assert_eq!(
        (desk.delivery.due_at(), desk.delivery.trouble()),
        (Some(desk.now), None)
    );
}

/// If settings change all the time, a backend gets some attempts at once, and then one a second.
#[test]
fn attempts_because_of_changes_are_bounded() {
    let mut desk = Desk::new(3);
    let (start, mut attempts) = (desk.now, Vec::new());
    while desk.now < start + 10 * SECOND {
        desk.delivery.abandon();
        desk.delivery.retry_changed(desk.now);
        if desk.delivery.wants_connection(desk.now) {
            attempts.push(desk.now - start);
            desk.delivery.connecting();
        }
        desk.now += SECOND / 100;
    }
    assert!(attempts[4] < SECOND / 10, "{attempts:?}");
    assert!((12..=15).contains(&attempts.len()), "{attempts:?}");
    // After a pause, the next change causes an attempt at once.
    desk.now += 10 * SECOND;
    desk.delivery.abandon();
    desk.delivery.retry_changed(desk.now);
    assert!(desk.delivery.wants_connection(desk.now));
}

/// If attempts are requested all the time, there is one a second, and nothing else changes.
#[test]
fn requested_attempts_do_not_count() {
    let mut desk = Desk::new(3);
    let fails = |desk: &mut Desk| {
        desk.delivery.connecting();
        let failure = Failure::backend("refused");
        desk.delivery.lost(failure, 0, Vec::new(), desk.now, 0.5);
    };
    fails(&mut desk);
    fails(&mut desk);
    let due = desk.delivery.due_at().expect("a wait");
    let far = due + 100 * SECOND;
    desk.delivery
        .hold_off(Failure::backend("refused"), far - desk.now, desk.now, 0.5);
    let (mut attempts, end) = (0, desk.now + 10 * SECOND);
    while desk.now < end {
        desk.delivery.retry_asked(desk.now);
        if desk.delivery.wants_connection(desk.now) {
            fails(&mut desk);
            attempts += 1;
            assert_eq!(desk.delivery.due_at(), Some(far));
        }
        desk.now += SECOND / 100;
    }
    assert!((9..=10).contains(&attempts), "{attempts}");
    desk.now = far;
    let before = desk.now;
    fails(&mut desk);
    assert_eq!(
        desk.delivery.due_at(),
        Some(before + SECOND),
        "as after the failure before"
    );
}

#[test]
fn the_window_is_bounded() {
    let mut desk = Desk::with(Streams::waiting([("a".to_owned(), 1)]), 3);
    for seq in 1..=WINDOW_BATCHES as i64 {
        assert!(desk.delivery.has_room());
        desk.read(&[seq], "b");
    }
    assert!(!desk.delivery.has_room());
    // The stream that is due must wait for a reply, and must not be looked for before.
    assert_eq!((desk.due(), desk.delivery.due_at()), (None, None));
    desk.replied(&[]);
    assert!(desk.delivery.has_room() && desk.due().is_some());

    let mut desk = Desk::new(3);
    desk.delivery.sent(
        desk.entries(&[1], "a"),
        Contents::Rows { end: desk.here(1) },
        WINDOW_BYTES - 1,
    );
    assert_eq!(desk.delivery.room().map(|room| room.bytes), Some(1));
    desk.delivery.sent(
        desk.entries(&[2], "a"),
        Contents::Rows { end: desk.here(2) },
        3 * WINDOW_BYTES,
    );
    assert!(!desk.delivery.has_room());
    desk.replied(&[]);
    assert!(!desk.delivery.has_room());
    desk.replied(&[]);
    assert!(desk.delivery.has_room());
}
