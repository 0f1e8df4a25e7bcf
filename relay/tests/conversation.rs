//! The conversation of exactly_once, step by step: the bytes that follow from an order or a reply.

use relay::consumers::group::EntryId;
use relay::consumers::readership::Question;
use relay::consumers::trim::Trim;
use relay::delivery::flight::Refusal;
use relay::failure::{Class, Failure};
use relay::redis::replicas::Replicas;
use relay::resp::read::Reply;
use relay::samples::claim;
use relay::sender::conversation::Conversation;
use relay::sender::orders::{Batch, Order, Report};
use relay::sender::survey::{Besides, Survey};
use std::sync::Arc;

/// A conversation in which the test is the server.
struct Talk {
    conversation: Conversation,
    reports: Vec<Report>,
}

/// The names of the commands in `bytes`.
fn commands(bytes: &[u8]) -> Vec<String> {
    let text = String::from_utf8_lossy(bytes);
    let names = text.split("\r\n").map(str::to_owned);
    names
        .filter(|w| w.len() > 1 && w.bytes().all(|b| b.is_ascii_uppercase()))
        .collect()
}

impl Talk {
    /// A connection that has read that there is no guard.
    fn begun(replicas: Option<Replicas>) -> Self {
        let conversation = Conversation::new("guard", replicas, None);
        let mut talk = Self {
            conversation,
            reports: Vec::new(),
        };
        assert_eq!(talk.says(), "WATCH HGETALL");
        talk.hears(&["+OK", "*0"]);
        assert_eq!(talk.reported(), "guard");
        talk
    }

    /// A connection that owns the guard.
    fn armed() -> Self {
        let mut talk = Self::begun(None);
        talk.orders(claim());
        assert_eq!(talk.says(), "MULTI HSET EXEC");
        talk.hears(&["+OK", "+QUEUED", "*1\r\n:8"]);
        assert_eq!(talk.says(), "WATCH HMGET");
        talk.hears(&["+OK", "*1\r\n$1\r\nt"]);
        assert_eq!(talk.reported(), "claimed");
        talk
    }

    fn orders(&mut self, order: Order) {
        assert!(self.conversation.wants_order());
        self.conversation.order(order);
    }

    fn says(&mut self) -> String {
        let said = commands(self.conversation.output()).join(" ");
        self.conversation.output().clear();
        said
    }

    fn hears(&mut self, replies: &[&str]) {
        replies
            .iter()
            .for_each(|reply| self.try_hear(reply).expect("all is well"));
    }

    fn try_hear(&mut self, reply: &str) -> Result<(), Failure> {
        let bytes = format!("{reply}\r\n");
        self.conversation.reply(Reply::new(bytes.as_bytes()), &mut self.reports)
    }

    fn reported(&mut self) -> String {
        let brief = |refused: &[Refusal]| -> String { refused.iter().map(|(entry, _)| format!(" {entry}")).collect() };
        let names = self.reports.drain(..).map(|report| match report {
            Report::Guard(_) => "guard".to_owned(),
            Report::Claimed => "claimed".to_owned(),
            Report::Seen(found) => format!("seen {found:?}"),
            Report::Surveyed(number, found) => format!("surveyed {number}, length {}", found[0].length),
            Report::Done { refused, .. } => format!("done{}", brief(&refused)),
            Report::Aborted { refused, .. } => format!("aborted{}", brief(&refused)),
            Report::Behind(_) => "behind".to_owned(),
            Report::Released => "released".to_owned(),
            Report::Found(_) | Report::Connected | Report::Lost { .. } => unreachable!("no conversation says that"),
        });
        names.collect::<Vec<_>>().join(", ")
    }
}

/// Two entries and the guard's HSET.
fn batch() -> Order {
    let bytes = "*1\r\n$5\r\nMULTI\r\n*1\r\n$4\r\nXADD\r\n*1\r\n$4\r\nXADD\r\n*1\r\n$4\r\nHSET\r\n";
    Order::Batch(Batch {
        bytes: bytes.as_bytes().to_vec(),
        commands: 2,
    })
}

fn look() -> Order {
    Order::Look(vec![relay::event::wanted::Wanted {
        stream: Arc::from("s"),
        event_id: [1; 16],
        created_at_us: 1,
        purpose: relay::event::wanted::Purpose::Compare,
    }])
}

fn survey(number: u64) -> Order {
    let id = EntryId { ms: 1, seq: 0 };
    let left_out = Vec::new();
    let question = Question {
        stream: Arc::from("s"),
        trim: Some(Trim::Before { id, left_out }),
    };
    Order::Survey(Box::new(Survey::new(number, vec![question], Besides::default())))
}

const SURVEYED: [&str; 3] = [":0", ":7", "*0"];
const QUEUED: [&str; 4] = ["+OK", "+QUEUED", "+QUEUED", "+QUEUED"];
const EXECUTED: &str = "*3\r\n$3\r\n1-0\r\n$3\r\n2-0\r\n:0";
const TOKEN: [&str; 2] = ["+OK", "*1\r\n$1\r\nt"];

#[test]
fn the_next_exec_is_sent_only_after_the_token_was_read_again() {
    let mut talk = Talk::armed();
    talk.orders(batch());
    assert_eq!(talk.says(), "MULTI XADD XADD HSET EXEC WATCH HMGET");
    talk.orders(batch());
    assert_eq!(talk.says(), "MULTI XADD XADD HSET");
    assert!(!talk.conversation.wants_order(), "one batch is queued");
    talk.hears(&QUEUED);
    talk.hears(&[EXECUTED]);
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("done", ""));
    talk.hears(&TOKEN);
    assert_eq!(talk.says(), "EXEC WATCH HMGET");
    talk.hears(&QUEUED);
    talk.hears(&[EXECUTED]);
    assert_eq!(talk.reported(), "done");
}

/// Trimming comes after the batch that makes the trimmed entries superfluous.
#[test]
fn a_survey_waits_until_the_batch_before_it_is_appended() {
    let mut talk = Talk::armed();
    talk.orders(batch());
    talk.orders(survey(1));
    assert_eq!(talk.says(), "MULTI XADD XADD HSET EXEC WATCH HMGET");
    assert!(!talk.conversation.wants_order());
    talk.hears(&QUEUED);
    talk.hears(&[EXECUTED]);
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("done", ""));
    talk.hears(&TOKEN);
    assert!(talk.says().starts_with("EVAL "), "it trims first");
    assert!(!talk.conversation.wants_order(), "no batch comes in between");
    talk.hears(&SURVEYED);
    assert_eq!(
        (talk.reported().as_str(), talk.says().as_str()),
        ("surveyed 1, length 7", "")
    );
    talk.orders(batch());
    assert_eq!(talk.says(), "MULTI XADD XADD HSET EXEC WATCH HMGET");
    // Between two batches, while the token is read.
    talk.hears(&QUEUED);
    talk.hears(&[EXECUTED]);
    talk.orders(survey(2));
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("done", ""));
    talk.hears(&TOKEN);
    assert!(talk.says().starts_with("EVAL "));
    talk.hears(&SURVEYED);
    assert_eq!(talk.reported(), "surveyed 2, length 7");
}

#[test]
fn a_survey_behind_a_refusal_or_a_lost_guard_never_begins() {
    let mut talk = Talk::armed();
    talk.orders(batch());
    talk.orders(survey(1));
    talk.says();
    talk.hears(&QUEUED);
    talk.hears(&["*3\r\n-WRONGTYPE no\r\n$3\r\n2-0\r\n:0"]);
    talk.hears(&TOKEN);
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("done 0", ""));
    talk.orders(Order::Resume);
    talk.hears(&TOKEN);
    talk.says();
    talk.orders(batch());
    talk.orders(survey(2));
    talk.says();
    talk.hears(&QUEUED);
    assert!(talk.try_hear("*-1").is_err(), "the guard is somebody else's");
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("", ""));
}

#[test]
fn a_token_of_somebody_else_and_an_exec_that_wrote_nothing_end_it() {
    let mut talk = Talk::armed();
    talk.orders(batch());
    talk.hears(&QUEUED);
    assert_eq!(
        talk.try_hear("*-1").expect_err("nothing is written").class,
        Class::Backend
    );
    let mut talk = Talk::armed();
    talk.orders(batch());
    talk.hears(&QUEUED);
    talk.hears(&[EXECUTED, "+OK"]);
    assert!(talk.try_hear("*1\r\n$1\r\nx").is_err());
}

#[test]
fn after_a_refusal_nothing_is_sent_until_it_is_written_down() {
    let mut talk = Talk::armed();
    talk.orders(batch());
    talk.orders(batch());
    talk.says();
    talk.hears(&QUEUED);
    talk.hears(&["*3\r\n$3\r\n1-0\r\n-WRONGTYPE no\r\n:0"]);
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("done 1", "DISCARD"));
    talk.hears(&TOKEN);
    assert_eq!(talk.says(), "", "the token is ours, and yet nothing is executed");
    talk.hears(&QUEUED);
    assert!(
        !talk.conversation.wants_order(),
        "replies to what was discarded are on their way"
    );
    talk.hears(&["+OK"]);
    // The worker does not know of it yet.
    talk.orders(batch());
    assert_eq!(talk.says(), "");
    talk.orders(Order::Resume);
    assert_eq!(talk.says(), "WATCH HMGET");
    talk.orders(batch());
    assert_eq!(talk.says(), "MULTI XADD XADD HSET");
    talk.hears(&TOKEN);
    assert_eq!(talk.says(), "EXEC WATCH HMGET");
}

#[test]
fn an_aborted_batch_refuses_only_the_events_that_were_not_queued() {
    let mut talk = Talk::armed();
    talk.orders(batch());
    talk.says();
    talk.hears(&["+OK", "+QUEUED", "-NOPERM No permissions to access a key", "+QUEUED"]);
    talk.hears(&["-EXECABORT Transaction discarded because of previous errors."]);
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("aborted 1", ""));
}

#[test]
fn a_server_closes_the_connection_after_an_entry_that_is_too_large() {
    let mut talk = Talk::armed();
    talk.orders(batch());
    talk.orders(batch());
    talk.says();
    talk.hears(&["+OK", "-ERR Protocol error: invalid bulk length"]);
    assert_eq!(
        (talk.reported().as_str(), talk.says().as_str()),
        ("aborted 0", "DISCARD")
    );
}

/// A worker that stops gives this order as soon as it has ordered the claim.
#[test]
fn an_order_waits_until_the_claim_is_confirmed() {
    let mut talk = Talk::begun(None);
    talk.orders(claim());
    assert!(!talk.conversation.wants_order());
    talk.hears(&["+OK", "+QUEUED", "*1\r\n:8"]);
    assert!(!talk.conversation.wants_order());
    assert_eq!(talk.says(), "MULTI HSET EXEC WATCH HMGET");
    talk.hears(&TOKEN);
    assert_eq!(talk.reported(), "claimed");
    let leaves = |beat| Order::Beat { beat, released: true };
    talk.orders(leaves(1));
    assert_eq!(talk.says(), "MULTI HSET EXEC WATCH HMGET");
    assert!(talk.conversation.is_releasing());
    // Orders given meanwhile follow it.
    talk.orders(look());
    assert_eq!(talk.says(), "");
    talk.hears(&["+OK", "+QUEUED", "*1\r\n:0"]);
    assert_eq!((talk.reported().as_str(), talk.says().as_str()), ("released", ""));
    talk.hears(&TOKEN);
    assert_eq!(talk.says(), "XREVRANGE COUNT");
    talk.hears(&["*0"]);
    assert_eq!(talk.reported(), "seen [Missing]");
    assert!(talk.conversation.wants_order() && !talk.conversation.awaits_reply());
}

#[test]
fn a_batch_is_done_when_enough_replicas_have_it() {
    let replicas = Replicas { count: 1, wait_ms: 10 };
    let mut talk = Talk::begun(Some(replicas));
    talk.orders(claim());
    assert_eq!(talk.says(), "MULTI HSET EXEC");
    talk.hears(&["+OK", "+QUEUED", "*1\r\n:8"]);
    assert_eq!(talk.says(), "WAIT");
    talk.hears(&[":1"]);
    talk.hears(&TOKEN);
    talk.orders(batch());
    assert_eq!(talk.says(), "WATCH HMGET MULTI XADD XADD HSET EXEC WAIT");
    assert!(!talk.conversation.wants_order());
    talk.hears(&QUEUED);
    talk.hears(&[EXECUTED, ":0"]);
    assert_eq!(talk.reported(), "claimed, behind");
    assert!(talk.conversation.waits_again());
    talk.hears(&[":0"]);
    assert_eq!(talk.reported(), "", "the same is told once");
    talk.hears(&[":1"]);
    assert_eq!(
        (talk.reported().as_str(), talk.says().as_str()),
        ("done", "WAIT WAIT WATCH HMGET")
    );
    assert!(!talk.conversation.waits_again() && !talk.conversation.wants_order());
    talk.hears(&TOKEN);
    assert!(talk.conversation.wants_order());
}

#[test]
fn a_refresh_has_its_usual_answer_only_when_nothing_is_on_its_way() {
    let mut talk = Talk::armed();
    let answer = talk.conversation.usual_answer_to_beat().expect("it is armed");
    let beat = |beat| Order::Beat { beat, released: false };
    talk.orders(beat(1));
    assert_eq!(talk.says(), "MULTI HSET EXEC WATCH HMGET");
    assert_eq!(talk.conversation.usual_answer_to_beat(), None);
    talk.orders(beat(2));
    assert_eq!(talk.says(), "", "one is on its way");
    assert_eq!(answer, b"+OK\r\n+QUEUED\r\n*1\r\n:0\r\n+OK\r\n*1\r\n$1\r\nt\r\n");
    talk.hears(&["+OK", "+QUEUED", "*1\r\n:0"]);
    talk.hears(&TOKEN);
    assert_eq!(talk.reported(), "");
    assert!(talk.conversation.usual_answer_to_beat().is_some());
}
