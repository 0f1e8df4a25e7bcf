//! exactly_once, step by step: faults that the random schedules have found.

use redis::Value;
use relay::delivery::backoff::Backoff;
use relay::delivery::flight::{BatchedEvent, Contents, WINDOW_BATCHES};
use relay::delivery::refusal::Streams;
use relay::delivery::{Cursor, Delivery, Guarantee, RowFate};
use relay::event::text::{hyphenated, rfc3339};
use relay::event::wanted::{Purpose, Sighting, Wanted};
use relay::failure::{Class, Failure};
use relay::reading::range::Position;
use relay::reading::schedule::Supply;
use relay::reading::snapshot::Tick;
use relay::resp::read::Inbox;
use relay::sender::tails::Search;
use relay::time::Now;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const STREAM: &str = "s";

fn tick(high_seq: i64) -> Arc<Tick> {
    Arc::new(Tick {
        high_seq,
        ..Tick::beginning()
    })
}

/// Connected, after batch 5; if `waits`, an event of the stream waits.
fn delivery(position: Position, waits: bool) -> Delivery {
    let streams = waits.then(|| (STREAM.to_owned(), 1));
    let backoff = Backoff {
        exponential: false,
        delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(1),
    };
    let cursor = Cursor { position, number: 5 };
    let mut delivery = Delivery::new(Guarantee::ExactlyOnce, cursor, Streams::waiting(streams), backoff);
    delivery.connecting();
    delivery.connected();
    delivery
}

fn entries(seqs: &[i64]) -> Vec<BatchedEvent> {
    let entry = |seq: &i64| BatchedEvent {
        seq: *seq,
        stream: Rc::from(STREAM),
        max_attempts: 3,
        committed_after_us: 0,
    };
    seqs.iter().map(entry).collect()
}

fn is_retried(delivery: &mut Delivery) -> bool {
    !delivery.streams_to_retry(Now::from_secs(100), 10, 10).is_empty()
}

#[test]
fn after_healing_waiting_events_wait_for_the_lost_rows_before_them() {
    let (old, new) = (tick(10), tick(20));
    let mut delivery = delivery(Position::at(new.clone()), true);
    assert!(is_retried(&mut delivery));
    let cursor = Cursor {
        position: Position::at(old.clone()),
        number: 3,
    };
    delivery.heal(cursor, 15);
    delivery.connected();
    assert!(!is_retried(&mut delivery) && delivery.due_at().is_none());
    // Row 12 is of the same stream: it waits with the others.
    assert_eq!(delivery.on_row(12, STREAM), RowFate::Park);
    delivery.skipped(12);
    delivery.advanced(Position::towards(old.clone(), new.clone(), 12));
    assert!(!is_retried(&mut delivery));
    delivery.advanced(Position::towards(old, new, 15));
    assert!(is_retried(&mut delivery));
}

#[test]
fn after_an_abort_waiting_events_wait_for_the_rows_that_were_sent_with_them() {
    let (old, new) = (tick(10), tick(20));
    let mut delivery = delivery(Position::at(old.clone()), false);
    delivery.sent(
        entries(&[11, 12]),
        Contents::Rows {
            end: Position::at(new.clone()),
        },
        100,
    );
    delivery.advanced(Position::at(new.clone()));
    // The first had been queued when the second was refused: nothing was appended.
    let refused = Failure::new(Class::Event, "NOPERM No permissions to access a key");
    let records = delivery.aborted(vec![(1, refused)], Now::ZERO, 0.0);
    assert_eq!(records.len(), 1);
    delivery.resume();
    assert!(!is_retried(&mut delivery));
    assert_eq!(delivery.on_row(11, STREAM), RowFate::Park);
    assert_eq!(delivery.on_row(12, STREAM), RowFate::Skip);
    [11, 12].iter().for_each(|seq| delivery.skipped(*seq));
    delivery.advanced(Position::at(new));
    assert!(is_retried(&mut delivery));
}

/// Events after a refused one are read and sent again, so there should be few of them.
#[test]
fn after_a_refusal_few_batches_are_on_their_way_and_soon_more() {
    let (old, new) = (tick(10), tick(1_000));
    let mut delivery = delivery(Position::at(old.clone()), false);
    let room = |delivery: &Delivery| delivery.room().map_or(0, |room| room.batches);
    let send = |delivery: &mut Delivery, seq: i64| {
        let end = Position::towards(old.clone(), new.clone(), seq);
        delivery.sent(entries(&[seq]), Contents::Rows { end }, 100);
    };
    assert_eq!(room(&delivery), WINDOW_BATCHES);
    send(&mut delivery, 11);
    send(&mut delivery, 12);
    let refused = Failure::new(
        Class::Event,
        "WRONGTYPE Operation against a key holding the wrong kind of value",
    );
    delivery.replied(vec![(0, refused)], Now::ZERO, 0.0);
    delivery.resume();
    for batches in [1, 2, 4, 8, 16, WINDOW_BATCHES, WINDOW_BATCHES] {
        assert_eq!(room(&delivery), batches);
        assert_eq!(delivery.supply(), Supply::Low, "it goes on reading");
        send(&mut delivery, 12);
        assert_eq!(room(&delivery), batches - 1);
        delivery.replied(Vec::new(), Now::ZERO, 0.0);
    }
}

/// No newer event may arrive for a long time.
#[test]
fn a_new_lane_tries_its_refused_events_again_at_the_tick_that_its_finder_goes_to() {
    let (old, newest) = (tick(10), tick(20));
    let finder = delivery(Position::at(old.clone()), false);
    let mut lane = delivery(Position::towards(old, newest.clone(), 11), false);
    // An event of another lane was refused.
    lane.set_reread_to(9);
    lane.begins_where(&finder);
    let end = Position::at(newest);
    lane.sent(entries(&[12]), Contents::Rows { end: end.clone() }, 100);
    lane.advanced(end);
    let refused = Failure::new(Class::Event, "WRONGTYPE");
    assert_eq!(lane.replied(vec![(0, refused)], Now::ZERO, 0.0).len(), 1);
    lane.resume();
    assert!(lane.due_at().is_some() && is_retried(&mut lane));
}

/// Streams that Redis refuses before it executes a transaction do not prevent appending to others, however many they
/// are.
#[test]
fn waiting_events_are_not_retried_in_the_same_batch() {
    let mut delivery = delivery(Position::at(tick(10)), false);
    delivery.set_streams(Streams::waiting(
        (0..50).map(|n| (format!("no{n:02}"), 1)).chain([("yes".to_owned(), 1)]),
    ));
    let (mut now, mut batches) = (Now::from_secs(100), 0);
    loop {
        let due = delivery.streams_to_retry(now, 10, 10);
        let entries: Vec<BatchedEvent> = due
            .iter()
            .map(|retry| BatchedEvent {
                seq: 1,
                stream: retry.stream.clone(),
                max_attempts: 1_000,
                committed_after_us: 0,
            })
            .collect();
        let refusals = |entries: &[BatchedEvent]| -> Vec<_> {
            let refused = entries.iter().enumerate().filter(|(_, entry)| &*entry.stream != "yes");
            refused
                .map(|(index, _)| (index, Failure::new(Class::Event, "NOPERM")))
                .collect()
        };
        let refused = refusals(&entries);
        if entries.is_empty() {
            now = delivery.due_at().expect("they wait");
            continue;
        }
        delivery.sent(entries, Contents::Waiting { all: Vec::new() }, 100);
        if refused.is_empty() {
            break;
        }
        delivery.aborted(refused, now, 1.0);
        delivery.resume();
        batches += 1;
        // By then all of them are due again.
        now += Duration::from_secs(2);
        assert!(batches < 20, "the stream is never tried alone");
    }
}

#[test]
fn the_guard_records_that_found_rows_lie_ahead() {
    let (old, new) = (tick(10), tick(20));
    let mut delivery = delivery(Position::at(old.clone()), false);
    delivery.pass_over([13]);
    let end = Position::towards(old, new.clone(), 12);
    assert!(delivery.mark(Some(&end)).compares);
    delivery.sent(entries(&[11]), Contents::Rows { end: end.clone() }, 100);
    delivery.advanced(end);
    delivery.replied(Vec::new(), Now::ZERO, 0.0);
    assert_eq!(delivery.on_row(13, STREAM), RowFate::Skip);
    delivery.skipped(13);
    delivery.advanced(Position::at(new.clone()));
    assert!(!delivery.mark(Some(&Position::at(new))).compares);
}

#[test]
fn a_new_comparison_forgets_what_the_last_one_found() {
    let mut delivery = delivery(Position::at(tick(10)), false);
    delivery.pass_over([13, 14]);
    // Somebody has emptied the streams since.
    delivery.pass_over([14]);
    let fates = [13, 14].map(|seq| delivery.on_row(seq, STREAM));
    assert_eq!(fates, [RowFate::Send, RowFate::Skip]);
}

// --- the ends of the streams

fn wanted(stream: &str, id: u8) -> Wanted {
    Wanted {
        stream: Arc::from(stream),
        event_id: [id; 16],
        created_at_us: 1,
        purpose: Purpose::Compare,
    }
}

fn entry(id: u8) -> Value {
    entry_of(id, 1)
}

fn entry_of(id: u8, created_at_us: i64) -> Value {
    let bulk = |bytes: &[u8]| Value::BulkString(bytes.to_vec());
    let names = [bulk(b"event_id"), bulk(&hyphenated(&[id; 16]))];
    let times = [bulk(b"timestamp"), bulk(&rfc3339(created_at_us))];
    let fields = names.into_iter().chain(times).collect();
    Value::Array(vec![bulk(format!("{id}-0").as_bytes()), Value::Array(fields)])
}

fn error(text: &str) -> Value {
    redis::parse_redis_value(format!("-{text}\r\n").as_bytes()).unwrap()
}

fn append(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Int(number) => out.extend(format!(":{number}\r\n").bytes()),
        Value::BulkString(bytes) => out.extend([format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()),
        Value::Array(items) => {
            out.extend(format!("*{}\r\n", items.len()).bytes());
            items.iter().for_each(|item| append(out, item));
        }
        Value::ServerError(error) => {
            out.extend(format!("-{} {}\r\n", error.code(), error.details().unwrap_or_default()).bytes());
        }
        other => panic!("no reply to a search is {other:?}"),
    }
}

/// Whether the search takes this for a complete reply, which arrives in pieces.
fn is_taken(search: &mut Search, value: &Value) -> Result<bool, Failure> {
    let (mut bytes, mut inbox) = (Vec::new(), Inbox::default());
    append(&mut bytes, value);
    inbox.receive(&bytes);
    let bounds = search.bounds();
    while let Some(taken) = inbox.take(&bounds)? {
        if search.reply(inbox.reply(taken))? {
            return Ok(inbox.is_between_replies() && inbox.rest().is_empty());
        }
    }
    Ok(false)
}

/// Whether events are there, of a search whose commands have these replies.
fn found(search: Search, replies: Vec<Value>) -> Vec<bool> {
    let seen = sightings(search, replies);
    seen.iter().map(|sighting| *sighting == Sighting::There).collect()
}

/// The outcome of a search whose commands have these replies; where it asks for further entries, there are none.
fn sightings(mut search: Search, replies: Vec<Value>) -> Vec<Sighting> {
    let mut replies = VecDeque::from(replies);
    let mut asked = Vec::new();
    while search.ask(&mut asked) {
        let wants_info = asked.windows(5).any(|word| word == b"XINFO");
        let is_info =
            |reply: &Value| matches!(reply, Value::Array(items) if matches!(items.first(), Some(Value::BulkString(_))));
        let fits = replies.front().is_some_and(|reply| is_info(reply) == wants_info);
        let reply = if fits { replies.pop_front() } else { None };
        assert!(is_taken(&mut search, &reply.unwrap_or(Value::Array(Vec::new()))).unwrap());
        asked.clear();
    }
    assert!(replies.is_empty(), "it did not ask for {replies:?}");
    search.into_found()
}

#[test]
fn a_forbidden_stream_does_not_keep_the_others_from_being_looked_at() {
    let search = Search::new(&[wanted("a", 1), wanted("b", 2)]);
    let forbidden = error("NOPERM No permissions to access a key");
    assert_eq!(
        found(search, vec![forbidden, Value::Array(vec![entry(2)])]),
        [false, true]
    );
    // A forbidden command says nothing about any stream.
    let mut search = Search::new(&[wanted("a", 1)]);
    let command = error("NOPERM User has no permissions to run the 'xrevrange' command");
    assert_eq!(is_taken(&mut search, &command).unwrap_err().class, Class::Configuration);
}

/// One was retried.
#[test]
fn each_entry_proves_one_of_the_events_that_share_an_id() {
    let twice = [wanted("a", 1), wanted("a", 1)];
    let both = Value::Array(vec![entry(1), entry(1)]);
    assert_eq!(found(Search::new(&twice), vec![both]), [true, true]);
    let one = Value::Array(vec![entry(1)]);
    assert_eq!(found(Search::new(&twice), vec![one]), [true, false]);
}

/// If an id was used again by an event that was refused, the entry of the other event must not count for it.
#[test]
fn an_entry_with_another_timestamp_belongs_to_another_event() {
    let search = Search::new(&[wanted("a", 1)]);
    assert_eq!(found(search, vec![Value::Array(vec![entry_of(1, 2)])]), [false]);
}

/// In a thinned stream, an event that was appended must not be taken for refused; one that perhaps was not appended is
/// retried.
#[test]
fn in_a_thinned_stream_only_what_was_appended_counts_as_found() {
    let settled = Wanted {
        purpose: Purpose::Settle,
        ..wanted("a", 2)
    };
    let info = |pair: (&str, i64)| [Value::BulkString(pair.0.as_bytes().to_vec()), Value::Int(pair.1)];
    let thinned = Value::Array(
        [("length", 1), ("entries-added", 2)]
            .into_iter()
            .flat_map(info)
            .collect(),
    );
    let replies = vec![Value::Array(vec![entry(3)]), thinned];
    assert_eq!(found(Search::new(&[wanted("a", 1), settled]), replies), [false, true]);
}

fn settled(id: u8) -> Wanted {
    Wanted {
        purpose: Purpose::Settle,
        ..wanted("a", id)
    }
}

/// Of a stream that has lost entries: one is left.
fn thinned(last: &str) -> Value {
    let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
    let counts = [("length", 1), ("entries-added", 9)];
    let counts = counts
        .into_iter()
        .flat_map(|(name, count)| [bulk(name), Value::Int(count)]);
    Value::Array(counts.chain([bulk("last-generated-id"), bulk(last)]).collect())
}

/// Whose it is, and so whether it says anything of the batch, only the tables know.
#[test]
fn what_was_not_seen_is_told_with_the_last_event_that_was_added() {
    let name = |id, time| (hyphenated(&[id; 16]), rfc3339(time));
    for (entry, last, seen) in [
        (entry_of(3, 0), "3-0", Sighting::NotBehind(name(3, 0))),
        (entry_of(3, 2), "3-0", Sighting::NotBehind(name(3, 2))),
        // Something was added behind it, and removed.
        (entry_of(3, 0), "4-0", Sighting::There),
    ] {
        let replies = vec![Value::Array(vec![entry]), thinned(last)];
        assert_eq!(sightings(Search::new(&[settled(2)]), replies), [seen]);
    }
}

/// Events have the times at which they were published: a retried one stands behind others that are younger.
#[test]
fn what_a_batch_has_behind_its_last_entry_was_refused_and_what_it_has_before_was_removed() {
    let batch = [settled(1), settled(3), settled(4)];
    let replies = vec![Value::Array(vec![entry(3)]), thinned("3-0")];
    let seen = [Sighting::There, Sighting::There, Sighting::Missing];
    assert_eq!(sightings(Search::new(&batch), replies), seen);
}

/// Others have added so much to the stream that nobody looks as far back as the batch.
#[test]
fn a_batch_that_lies_too_far_back_was_not_refused() {
    let mut search = Search::new(&[settled(1), wanted("a", 2)]);
    let (mut asked, mut entries) = (Vec::new(), 0);
    while search.ask(&mut asked) {
        let text = String::from_utf8_lossy(&asked).into_owned();
        let count: usize = match text.contains("XREVRANGE") {
            true => text.trim_end().rsplit("\r\n").next().unwrap().parse().unwrap(),
            false => 0,
        };
        let reply = match count {
            0 => {
                let [length, added] = ["length", "entries-added"].map(|name| Value::BulkString(name.into()));
                Value::Array(vec![length, Value::Int(500_000), added, Value::Int(500_000)])
            }
            count => Value::Array(vec![entry(3); count]),
        };
        entries += count;
        assert!(is_taken(&mut search, &reply).unwrap());
        asked.clear();
    }
    assert!(entries >= 100_000, "{entries}");
    assert_eq!(search.into_found(), [Sighting::There, Sighting::Missing]);
}
