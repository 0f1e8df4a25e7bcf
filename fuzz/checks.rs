//! The properties that must hold for any bytes, as the bodies of the fuzz targets. `relay/tests/fuzz_corpus.rs` runs
//! them over the inputs in `fuzz/corpus`.

#[path = "checks/entries.rs"]
pub(crate) mod entries;
#[path = "checks/surveys.rs"]
pub(crate) mod surveys;

use redis::Value;
use relay::consumers::readership::Question;
use relay::event::wanted::{Purpose, Wanted};
use relay::failure::{self, Class};
use relay::guard::Guard;
use relay::redis::answers::{is_replica, primary_in, redirect_in};
use relay::redis::destination::Address;
use relay::redis::hash_slot::{HASH_SLOTS, hash_slot_of, tag_of};
use relay::redis::ranges::Ranges;
use relay::redis::replicas::Replicas;
use relay::resp::bounds::Bounds;
use relay::resp::read::{Inbox, Piece, Reply};
use relay::samples::{self, claim};
use relay::sender::conversation::Conversation;
use relay::sender::orders::{Batch, Order, Report};
use relay::sender::survey::{Besides, Survey};
use relay::sender::tails::Search;
use std::sync::Arc;

/// Of each kind some.
const BOUNDS: [Bounds; 6] = [
    Bounds::SLOTS,
    Bounds::HELLO,
    Bounds::executed(2),
    Bounds::TOKEN,
    Bounds::XADD,
    Bounds::ENTRIES,
];

/// The reply decoder finds the same replies however the bytes are split, and agrees with the parser on their meaning.
/// None is beyond its limits.
pub(crate) fn replies(input: &[u8]) {
    for bounds in BOUNDS {
        let whole = taken(input, &bounds, std::iter::repeat(usize::MAX));
        assert_eq!(whole, taken(input, &bounds, std::iter::repeat(1)), "byte by byte");
        if input.len() <= 64 {
            for split in 1..input.len() {
                let sizes = [split].into_iter().chain(std::iter::repeat(usize::MAX));
                assert_eq!(whole, taken(input, &bounds, sizes), "split at {split}");
            }
        }
        let sizes = input.iter().map(|byte| usize::from(*byte) + 1).collect::<Vec<_>>();
        assert_eq!(whole, taken(input, &bounds, sizes.into_iter().cycle()), "in pieces");
        for reply in &whole.0 {
            if bounds.in_pieces {
                assert_eq!(
                    Reply::new(reply).pieces().count(),
                    1,
                    "{:?}",
                    String::from_utf8_lossy(reply)
                );
            } else {
                assert!(reply.len() <= bounds.bytes, "{} bytes", reply.len());
                let arrays = Reply::new(reply).pieces().map(|piece| match piece {
                    Piece::Array(items) => items,
                    Piece::String { .. } | Piece::Line(_) => 0,
                });
                assert!(arrays.sum::<u64>() <= bounds.items as u64);
                agrees(reply);
            }
        }
    }
    flood(input);
}

/// An endless reply takes no memory: the input up to the first `|`, and then the rest repeatedly.
fn flood(input: &[u8]) {
    let Some(at) = input.iter().position(|byte| *byte == b'|') else {
        return;
    };
    let (begin, more) = (&input[..at], &input[at + 1..]);
    if more.is_empty() {
        return;
    }
    for bounds in [Bounds::executed(2), Bounds::XADD, Bounds::ENTRIES] {
        let mut inbox = Inbox::default();
        let kept = if bounds.in_pieces { 64 * 1024 } else { bounds.bytes };
        let flood = more.repeat((4 * 64 * 1024 / more.len()).clamp(1, 64 * 1024));
        let mut is_over = false;
        for bytes in [begin, &flood] {
            let mut coming = bytes;
            while !coming.is_empty() && !is_over {
                let room = inbox.room().expect("there is memory");
                let length = coming.len().min(room.len());
                room[..length].copy_from_slice(&coming[..length]);
                inbox.received(length);
                coming = &coming[length..];
                is_over = loop {
                    match inbox.take(&bounds) {
                        Ok(Some(_)) => {}
                        Ok(None) => break false,
                        Err(_) => break true,
                    }
                };
                assert!(
                    inbox.size() <= 2 * kept.max(64 * 1024),
                    "{} bytes of room",
                    inbox.size()
                );
            }
        }
    }
}

/// The replies (or their pieces), and whether the following bytes are invalid or too long.
fn taken(input: &[u8], bounds: &Bounds, mut sizes: impl Iterator<Item = usize>) -> (Vec<Vec<u8>>, bool) {
    let (mut inbox, mut found) = (Inbox::default(), Vec::new());
    let mut coming = input;
    while !coming.is_empty() {
        let size = sizes.next().expect("sizes without end");
        let room = inbox.room().expect("there is memory");
        let length = coming.len().min(room.len()).min(size);
        room[..length].copy_from_slice(&coming[..length]);
        inbox.received(length);
        coming = &coming[length..];
        loop {
            match inbox.take(bounds) {
                Ok(Some(range)) => found.push(inbox.reply(range).bytes().to_vec()),
                Ok(None) => break,
                Err(_) => return (found, true),
            }
        }
    }
    (found, false)
}

fn agrees(bytes: &[u8]) {
    let reply = Reply::new(bytes);
    let Ok(value) = reply.value() else { return };
    assert_eq!(reply.is_bulk(), matches!(value, Value::BulkString(_)), "{value:?}");
    assert_eq!(reply.is_nil(), matches!(value, Value::Nil), "{value:?}");
    if reply.is_queued() {
        assert_eq!(value, Value::SimpleString("QUEUED".into()));
    }
    let items = match &value {
        Value::Array(items) => items.as_slice(),
        _ => &[],
    };
    let (strings, number) = items.split_at(items.len().saturating_sub(1));
    let is_it = strings.iter().all(|item| matches!(item, Value::BulkString(_))) && matches!(number, [Value::Int(_)]);
    assert_eq!(reply.is_strings_and_number(strings.len()), is_it, "{value:?}");
    assert!(!reply.is_strings_and_number(items.len()), "{value:?}");
}

/// Whatever a server answers, a conversation neither panics nor takes anything wrongly for a delivery: a batch is done
/// only after an EXEC with a reply for each of its entries.
pub(crate) fn conversation(input: &[u8]) {
    let Some((&setup, said)) = input.split_first() else {
        return;
    };
    let replicas = (setup & 1 != 0).then_some(Replicas { count: 1, wait_ms: 10 });
    let mut conversation = Conversation::new("guard", replicas, (setup & 8 != 0).then_some("ousting"));
    let (mut reports, mut given, mut done) = (Vec::new(), 0, 0);
    let mut bytes = Inbox::default();
    let mut said = said;
    // One more than was answered may be waiting.
    for step in 0..200u32 {
        while conversation.wants_order() && step < 190 {
            conversation.order(order(given, setup));
            given += 1;
            conversation.order(Order::Resume);
            if given > 300 {
                return;
            }
        }
        conversation.output().clear();
        if !conversation.awaits_reply() {
            return;
        }
        let range = loop {
            match bytes.take(&conversation.bounds()) {
                Ok(Some(range)) => break range,
                Err(failure) => {
                    assert_ne!(conversation.unreadable(failure).class, Class::Event);
                    return;
                }
                Ok(None) if said.is_empty() => return,
                Ok(None) => {
                    let room = bytes.room().expect("there is memory");
                    let length = said.len().min(room.len());
                    room[..length].copy_from_slice(&said[..length]);
                    bytes.received(length);
                    said = &said[length..];
                }
            }
        };
        let outcome = conversation.reply(bytes.reply(range), &mut reports);
        for report in reports.drain(..) {
            match report {
                Report::Done { refused, .. } => {
                    done += 1;
                    assert!(
                        refused.len() <= 2 && refused.iter().all(|(entry, f)| *entry < 2 && f.class == Class::Event)
                    );
                    assert!(done <= given, "more is done than was given");
                }
                Report::Aborted { refused, .. } => {
                    assert!(
                        !refused.is_empty() && refused.iter().all(|(entry, f)| *entry < 2 && f.class == Class::Event)
                    );
                }
                Report::Seen(found) => assert_eq!(found.len(), 1),
                Report::Surveyed(_, found) => assert!(found.len() <= 1),
                _ => {}
            }
        }
        if let Err(failure) = outcome {
            assert_ne!(failure.class, Class::Event, "{failure}");
            return;
        }
    }
}

/// The order that follows this many others.
fn order(given: u64, setup: u8) -> Order {
    match (given, setup >> 1 & 3) {
        (0, _) => claim(),
        (n, 1) if n % 3 == 2 => Order::Look(vec![wanted()]),
        (n, 2) if n % 3 == 2 => Order::Beat {
            beat: n,
            released: false,
        },
        (n, 3) if n % 3 == 2 => {
            let question = Question {
                stream: Arc::from("s"),
                trim: None,
            };
            let besides = Besides { last: true, idle: true };
            Order::Survey(Box::new(Survey::new(n, vec![question], besides)))
        }
        _ => Order::Batch(Batch {
            bytes: b"*1\r\n$5\r\nMULTI\r\n".to_vec(),
            commands: 2,
        }),
    }
}

fn wanted() -> Wanted {
    Wanted {
        stream: Arc::from("s"),
        event_id: [1; 16],
        created_at_us: 1,
        purpose: Purpose::Settle,
    }
}

/// The text of a server is shown on one line, truncated, and is assigned a cause; an error about a transaction as a
/// whole or a login is never about an event.
pub(crate) fn classify(input: &[u8]) {
    let line: Vec<u8> = input.iter().copied().filter(|b| !matches!(b, b'\r' | b'\n')).collect();
    if let Ok(Value::ServerError(error)) = redis::parse_redis_value(&[b"-", line.as_slice(), b"\r\n"].concat()) {
        let failure = failure::reply(&error);
        let shown = failure.message.clone();
        assert!(shown.chars().count() <= 300, "{shown}");
        assert!(!shown.chars().any(char::is_control), "{shown:?}");
        assert!(
            matches!(failure.class, Class::Backend | Class::Configuration | Class::Event),
            "{failure:?}"
        );
        let elsewhere = failure.not_of_an_event();
        assert_ne!(elsewhere.class, Class::Event);
        let aborted = failure::aborted(&error);
        assert_ne!(aborted.class, Class::Event, "{aborted:?}");
        if let Some(hint) = elsewhere.hint() {
            assert!(hint.ends_with('.'), "{hint}");
        }
    }
    let mut search = Search::new(&[wanted()]);
    let mut inbox = Inbox::default();
    inbox.receive(input);
    while search.ask(&mut Vec::new()) {
        let taken = match inbox.take(&search.bounds()) {
            Ok(Some(taken)) => search.reply(inbox.reply(taken)),
            Ok(None) => break,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = taken {
            assert_ne!(failure.class, Class::Event, "{failure}");
            break;
        }
    }
    guard(input);
}

/// A guard is read completely or not at all, and its position survives the conversion to text.
fn guard(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let names = samples::GUARD.map(|(name, _)| name);
    let values: Vec<&str> = text.split('|').collect();
    let fields: Vec<_> = names
        .iter()
        .zip(&values)
        .map(|(n, v)| (n.as_bytes(), v.as_bytes()))
        .collect();
    if let Ok(Some(guard)) = Guard::parse(&fields) {
        assert_eq!(fields.len(), names.len());
        // No field is larger than what a relay writes, and all of it can be saved.
        assert!(
            [&guard.token, &guard.incarnation, &guard.system]
                .iter()
                .all(|name| name.len() <= 128)
        );
        assert!(guard.place.len() <= 4_096 && guard.again.len() <= 10_000);
        assert!(guard.number <= i64::MAX as u64 && guard.wal <= i64::MAX as u64 && guard.total >= 0);
        for tick in guard.position.ticks().chain(guard.previous.ticks()) {
            assert!((0..i64::MAX).contains(&tick.low_seq) && (0..i64::MAX).contains(&tick.high_seq));
            assert!(tick.snapshot.xmax().max(tick.next_xid) <= i64::MAX as u64);
        }
        let text = guard.position.to_string();
        let again: relay::reading::range::Position = text.parse().expect("what was written can be read");
        assert_eq!(again.to_string(), text);
    }
}

/// An address from a sentinel or a cluster node can be connected to, or is a failure, never one of an event.
pub(crate) fn nodes(input: &[u8]) {
    let is_address = |address: &Address| {
        let can_be = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b'"' | b'\'' | b'\\');
        matches!(address, Address::Tcp { host, .. } if (1..=253).contains(&host.len()) && host.bytes().all(can_be))
    };
    if let Some((_, address)) = redirect_in(&String::from_utf8_lossy(input)) {
        assert!(is_address(&address), "{address:?}");
    }
    let asked = Address::of_node("asked:7000").expect("an address");
    let mut inbox = Inbox::default();
    inbox.receive(input);
    let mut ranges = Ranges::of(&asked);
    'answer: while let Ok(Some(taken)) = inbox.take(&Bounds::SLOTS) {
        for piece in inbox.reply(taken).pieces() {
            let master = match ranges.take(piece) {
                Ok(range) => range.map(|range| range.master),
                Err(failure) => Some(Err(failure)),
            };
            match master {
                Some(Ok(master)) => assert!(is_address(&master), "{master:?}"),
                Some(Err(failure)) => {
                    assert_ne!(failure.class, Class::Event);
                    break 'answer;
                }
                None => {}
            }
            if ranges.is_over() {
                break 'answer;
            }
        }
    }
    for bounds in [Bounds::HELLO, Bounds::MASTER] {
        let mut inbox = Inbox::default();
        inbox.receive(input);
        let Ok(Some(taken)) = inbox.take(&bounds) else {
            continue;
        };
        let Ok(value) = inbox.reply(taken).value() else {
            continue;
        };
        is_replica(&value);
        match primary_in(value) {
            Ok(address) => assert!(address.is_none_or(|address| is_address(&address))),
            Err(failure) => assert_ne!(failure.class, Class::Event),
        }
    }
}

/// A key is in the slot that another implementation's checksum of its tag gives, and the guard for it is in the same
/// slot.
pub(crate) fn slots(input: &[u8]) {
    let open = input.iter().position(|byte| *byte == b'{');
    let tag = open.map(|open| &input[open + 1..]).and_then(|rest| {
        let close = rest.iter().position(|byte| *byte == b'}')?;
        (close > 0).then(|| &rest[..close])
    });
    let checksum = crc::Crc::<u16>::new(&crc::CRC_16_XMODEM).checksum(tag.unwrap_or(input));
    let slot = hash_slot_of(input);
    assert_eq!(slot, checksum % HASH_SLOTS);
    assert_eq!(
        hash_slot_of(format!("outbox_relay:guard:x:1:2:{{{}}}", tag_of(slot)).as_bytes()),
        slot
    );
}
