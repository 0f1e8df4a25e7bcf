//! What servers answer about consumer groups.

use relay::consumers::group::{EntryId, GroupName, MOST_GROUPS, MOST_GROUPS_AT_ONCE, Surveyed};
use relay::consumers::readership::{Interest, Policy, Question, Readership};
use relay::consumers::trim::{Silent, Trim};
use relay::failure::{Class, Failure};
use relay::resp::read::Inbox;
use relay::sender::survey::{Besides, Survey};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const STREAMS: [&str; 3] = ["own", "other", "third"];
const ROUNDS: u64 = 4;

/// Whatever a server answers about consumer groups, nothing is trimmed that a group which counts has not acknowledged.
/// The answers are bounded, no number overflows, and no failure is one of an event.
pub(crate) fn survey(input: &[u8]) {
    let Some((&setup, said)) = input.split_first() else {
        return;
    };
    let policy = Policy {
        max_len: [0, 1, 1_000, i64::MAX][usize::from(setup & 3)],
        silence: (setup & 4 != 0).then_some(Duration::from_secs(1)),
    };
    let mut readership = Readership::new((setup & 8 == 0).then_some(policy), Some(STREAMS[0].into()));
    let streams: [Rc<str>; 3] = STREAMS.map(Rc::from);
    streams.iter().for_each(|stream| readership.knows(stream));
    let mut inbox = Inbox::default();
    inbox.receive(said);
    let mut known: HashMap<Arc<str>, Surveyed> = HashMap::new();
    for round in 1..=ROUNDS {
        let now = Duration::from_secs(100 * round);
        let (number, questions) = readership.ask(now, Some(round), true, Interest::View);
        questions.iter().for_each(|question| assert_harmless(question, &known));
        let mut survey = Survey::new(
            number,
            questions,
            Besides {
                last: true,
                idle: setup & 4 != 0,
            },
        );
        match answered(&mut survey, &mut inbox) {
            Ok(true) => {}
            Ok(false) => return,
            Err(failure) => return assert_ne!(failure.class, Class::Event, "{failure}"),
        }
        let found = survey.into_found();
        assert!(
            found
                .iter()
                .all(|stream| stream.groups.len() <= MOST_GROUPS && stream.length >= 0)
        );
        assert!(found.iter().map(|stream| stream.groups.len()).sum::<usize>() <= MOST_GROUPS_AT_ONCE);
        // What was sent after it was asked for may not have been seen.
        readership.surveyed(number, &found, round - 1, now);
        for stream in &streams {
            readership.room(stream);
            readership.sent(stream, 10);
        }
        // What was known of a stream stays if it cannot be asked about now: the script in Redis checks it again.
        known.extend(
            found
                .into_iter()
                .filter(|found| found.failure.is_none())
                .map(|found| (found.stream.clone(), found)),
        );
    }
}

/// Answers a whole survey. False: the server says no more.
fn answered(survey: &mut Survey, inbox: &mut Inbox) -> Result<bool, Failure> {
    loop {
        let mut due = survey.ask(&mut Vec::new());
        if due == 0 {
            return Ok(true);
        }
        while due > 0 {
            let Some(range) = inbox.take(&survey.bounds())? else {
                return Ok(false);
            };
            if survey.reply(inbox.reply(range))? {
                due -= 1;
            }
        }
    }
}

/// Trims no entry that is not acknowledged, as far as the last answer has told.
fn assert_harmless(question: &Question, known: &HashMap<Arc<str>, Surveyed>) {
    let Some(trim) = &question.trim else {
        return;
    };
    let found = known
        .get(&question.stream)
        .expect("nothing is trimmed before it was surveyed");
    assert!(!found.has_more_groups && !found.groups.is_empty(), "{found:?}");
    let (up_to, left_out): (EntryId, &[Silent]) = match trim {
        Trim::Before { id, left_out } => (*id, left_out),
        // All groups are left out.
        Trim::To { length, left_out } => {
            assert!(*length > 0);
            (
                EntryId {
                    ms: u64::MAX,
                    seq: u64::MAX,
                },
                left_out,
            )
        }
    };
    for group in &found.groups {
        let is_left_out = left_out
            .iter()
            .any(|silent| group.name == GroupName::Known(silent.name.clone()));
        assert!(is_left_out || up_to <= group.acknowledged(), "{trim:?} {group:?}");
    }
}
