//! Tests a survey with replies as Redis 6.2 to 8 and Valkey write them.

use super::*;
use crate::consumers::group::EntryId;
use std::sync::Arc;

const IDLE: Besides = Besides {
    idle: true,
    last: false,
};

fn question(stream: &str, trim: Option<Trim>) -> Question {
    let stream = Arc::from(stream);
    Question { stream, trim }
}

/// The commands of a round, as text.
fn round(survey: &mut Survey) -> Vec<String> {
    let mut out = Vec::new();
    let count = survey.ask(&mut out);
    let text = String::from_utf8(out).unwrap();
    let commands: Vec<String> = text
        .split('*')
        .filter(|command| command.contains("\r\n$"))
        .map(|command| {
            let words = command.split("\r\n").skip(2).step_by(2);
            words.collect::<Vec<_>>().join(" ").trim().to_owned()
        })
        .collect();
    assert_eq!(commands.len(), count, "{text}");
    commands
}

/// Answers all at once, and byte by byte.
fn answer(survey: &mut Survey, replies: &[&str]) {
    for reply in replies {
        assert!(survey.reply(Reply::new(reply.as_bytes())).unwrap(), "{reply}");
    }
}

const GROUPS: &str = "*2\r\n*12\r\n$4\r\nname\r\n$1\r\na\r\n$9\r\nconsumers\r\n:2\r\n$7\r\npending\r\n:3\r\n$17\r\nlast-delivered-id\r\n\
    $3\r\n9-1\r\n$12\r\nentries-read\r\n:7\r\n$3\r\nlag\r\n:5\r\n*12\r\n$4\r\nname\r\n$1\r\nb\r\n$9\r\nconsumers\r\n:0\r\n$7\r\npending\r\n:0\r\n\
    $17\r\nlast-delivered-id\r\n$3\r\n0-0\r\n$12\r\nentries-read\r\n$-1\r\n$3\r\nlag\r\n$-1\r\n";

#[test]
fn a_survey_asks_about_groups_and_their_pending_entries() {
    let mut survey = Survey::new(1, vec![question("s", None)], IDLE);
    assert_eq!(round(&mut survey), ["XLEN s", "XINFO GROUPS s"]);
    answer(&mut survey, &[":12\r\n", GROUPS]);
    assert_eq!(round(&mut survey), ["XPENDING s a", "XINFO CONSUMERS s a"]);
    answer(
        &mut survey,
        &[
            "*4\r\n:3\r\n$3\r\n7-2\r\n$3\r\n9-1\r\n*2\r\n*2\r\n$1\r\nc\r\n$1\r\n2\r\n*2\r\n$1\r\nd\r\n$1\r\n1\r\n",
            "*2\r\n*6\r\n$4\r\nname\r\n$1\r\nc\r\n$7\r\npending\r\n:2\r\n$4\r\nidle\r\n:5000\r\n\
             *8\r\n$4\r\nname\r\n$1\r\nd\r\n$7\r\npending\r\n:1\r\n$4\r\nidle\r\n:70\r\n$8\r\ninactive\r\n:90\r\n",
        ],
    );
    assert!(round(&mut survey).is_empty());
    let found = survey.into_found();
    assert_eq!((found[0].length, found[0].failure.clone()), (12, None));
    let a = &found[0].groups[0];
    assert_eq!((a.consumers, a.pending, a.lag, a.unread(12)), (2, 3, Some(5), Some(5)));
    assert_eq!(a.acknowledged(), EntryId { ms: 7, seq: 2 });
    assert_eq!(a.idle, Some(Duration::from_millis(70)));
    let b = &found[0].groups[1];
    assert_eq!(
        (b.acknowledged(), b.lag, b.unread(12)),
        (EntryId::FIRST, None, Some(12))
    );
}

/// Before 7.0 there is no lag, and nothing shows how much is unread.
#[test]
fn the_unread_count_is_unknown_on_older_servers() {
    let mut survey = Survey::new(1, vec![question("s", None)], Besides::default());
    round(&mut survey);
    let groups = "*1\r\n*8\r\n$4\r\nname\r\n$1\r\na\r\n$9\r\nconsumers\r\n:1\r\n$7\r\npending\r\n:0\r\n$17\r\nlast-delivered-id\r\n$3\r\n9-1\r\n";
    answer(&mut survey, &[":12\r\n", groups]);
    assert!(round(&mut survey).is_empty());
    let found = survey.into_found();
    assert_eq!((found[0].groups[0].lag, found[0].groups[0].unread(12)), (None, None));
}

#[test]
fn a_stream_that_cannot_be_asked_affects_no_others() {
    let streams = ["gone", "list", "shut", "s"].map(|stream| question(stream, None));
    let mut survey = Survey::new(1, streams.to_vec(), Besides::default());
    assert_eq!(round(&mut survey).len(), 8);
    answer(
        &mut survey,
        &[
            ":0\r\n",
            "-ERR no such key\r\n",
            "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
            "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
            "-NOPERM this user has no permissions to run the 'xlen' command\r\n",
            "-NOPERM this user has no permissions to run the 'xinfo|groups' command\r\n",
            ":3\r\n",
            "*0\r\n",
        ],
    );
    assert!(round(&mut survey).is_empty());
    let found = survey.into_found();
    let classes: Vec<_> = found.iter().map(|f| f.failure.as_ref().map(|f| f.class)).collect();
    let expected = [None, Some(Class::Event), Some(Class::Configuration), None];
    assert_eq!(classes, expected);
    assert_eq!((found[3].length, found[3].groups.len()), (3, 0));
}

#[test]
fn a_server_that_is_not_ready_ends_the_connection() {
    let mut survey = Survey::new(1, vec![question("s", None)], Besides::default());
    round(&mut survey);
    let loading = Reply::new(b"-LOADING Redis is loading the dataset in memory\r\n");
    assert_eq!(survey.reply(loading).unwrap_err().class, Class::Backend);
    for garbage in ["$3\r\nabc\r\n", "*1\r\n:1\r\n", "+OK\r\n"] {
        let mut survey = Survey::new(1, vec![question("s", None)], Besides::default());
        round(&mut survey);
        assert!(survey.reply(Reply::new(garbage.as_bytes())).is_err(), "{garbage:?}");
    }
}

#[test]
fn the_result_of_trimming_is_reported() {
    let id = EntryId { ms: 5, seq: 0 };
    let trim = Trim::Before {
        id,
        left_out: vec![Silent {
            name: b"x".to_vec(),
            last_delivered: EntryId { ms: 3, seq: 1 },
            pending: 7,
        }],
    };
    for (reply, is_trimmed, class) in [
        (":4\r\n", true, None),
        (":0\r\n", true, None),
        (":-1\r\n", false, None),
        (
            "-NOPERM ACL failure in script: User relay has no permissions to run the 'xtrim' command\r\n",
            false,
            Some(Class::Configuration),
        ),
        ("-ERR unknown command 'EVAL'\r\n", false, Some(Class::Configuration)),
        (
            "-ERR The user executing the script can't run this command or subcommand\r\n",
            false,
            Some(Class::Configuration),
        ),
        ("-BUSY Redis is busy running a script.\r\n", false, Some(Class::Backend)),
    ] {
        let mut survey = Survey::new(1, vec![question("s", Some(trim.clone()))], Besides::default());
        let mut out = Vec::new();
        assert_eq!(survey.ask(&mut out), 3);
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.contains("\r\n$5\r\nMINID\r\n$3\r\n5-0\r\n$1\r\nx\r\n$3\r\n3-1\r\n$1\r\n7\r\n*2\r\n$4\r\nXLEN"),
            "{text}"
        );
        answer(&mut survey, &[reply, ":1\r\n", "*0\r\n"]);
        let found = survey.into_found().remove(0);
        assert_eq!(
            (found.is_trimmed, found.untrimmed.map(|f| f.class)),
            (is_trimmed, class),
            "{reply}"
        );
    }
}

/// An entry that is added later has a higher id, whatever a group says that it has read.
#[test]
fn the_last_id_is_asked_for_trimming() {
    let besides = Besides {
        last: true,
        idle: false,
    };
    for (reply, last, class) in [
        ("+9-1\r\n", Some(EntryId { ms: 9, seq: 1 }), None),
        ("-ERR no such key\r\n", None, None),
        ("-NOPERM no\r\n", None, Some(Class::Configuration)),
        ("-ERR unknown command 'EVAL'\r\n", None, Some(Class::Configuration)),
    ] {
        let mut survey = Survey::new(1, vec![question("s", None)], besides);
        let commands = round(&mut survey);
        assert_eq!((commands.len(), &commands[2][..15]), (3, "EVAL local info"));
        answer(&mut survey, &[":12\r\n", "*0\r\n", reply]);
        assert!(round(&mut survey).is_empty());
        let found = survey.into_found().remove(0);
        assert_eq!((found.last, found.untrimmed.map(|f| f.class)), (last, class), "{reply}");
    }
}

/// However many groups there are and however large, only those that are examined are kept.
#[test]
fn crowds_and_long_names_are_bounded() {
    let row = |name: &str| format!("*2\r\n$4\r\nname\r\n${}\r\n{name}\r\n", name.len());
    let crowd: String = (0..500).map(|n| row(&n.to_string())).collect();
    let mut survey = Survey::new(1, vec![question("s", None)], IDLE);
    round(&mut survey);
    answer(&mut survey, &[":1\r\n", &format!("*500\r\n{crowd}")]);
    let found = survey.into_found().remove(0);
    assert_eq!((found.groups.len(), found.has_more_groups), (100, true));

    let mut survey = Survey::new(1, vec![question("s", None)], IDLE);
    round(&mut survey);
    answer(&mut survey, &[":1\r\n"]);
    // The connection passes a string that is too long to be kept in this form.
    for piece in ["*1\r\n", "*2\r\n", "$4\r\nname\r\n", "$5000\r\n"] {
        survey.reply(Reply::new(piece.as_bytes())).unwrap();
    }
    assert!(round(&mut survey).is_empty());
    let found = survey.into_found().remove(0);
    assert_eq!(found.groups[0].name, GroupName::TooLong(5_000));
}

/// The groups of all streams together are bounded too: the other streams are left out.
#[test]
fn crowds_on_many_streams_are_bounded() {
    let streams: Vec<Question> = (0..30).map(|n| question(&format!("s{n}"), None)).collect();
    let mut survey = Survey::new(1, streams, Besides::default());
    let row = |n: usize| format!("*2\r\n$4\r\nname\r\n${}\r\n{n}\r\n", n.to_string().len());
    let groups = format!("*100\r\n{}", (0..100).map(row).collect::<String>());
    assert_eq!(round(&mut survey).len(), 60);
    for _ in 0..30 {
        answer(&mut survey, &[":1\r\n", &groups]);
    }
    assert!(round(&mut survey).is_empty());
    let found = survey.into_found();
    let streams: Vec<&str> = found.iter().map(|found| &*found.stream).collect();
    assert_eq!((streams.len(), streams[0], streams[19]), (20, "s0", "s19"));
}

/// A server can send any numbers. Their sums must not overflow, here or in the views.
#[test]
fn impossible_counts_are_bounded() {
    for (told, most) in [(i64::MAX, i64::MAX / 4), (i64::MIN, 0)] {
        let mut survey = Survey::new(1, vec![question("s", None)], IDLE);
        round(&mut survey);
        let groups = format!(
            "*1\r\n*8\r\n$4\r\nname\r\n$1\r\na\r\n$9\r\nconsumers\r\n:{told}\r\n$7\r\npending\r\n:{told}\r\n$3\r\nlag\r\n:{told}\r\n"
        );
        answer(&mut survey, &[&format!(":{told}\r\n"), &groups]);
        let found = survey.into_found().remove(0);
        let group = &found.groups[0];
        assert_eq!((found.length, group.pending, group.lag), (most, most, Some(most)));
        assert_eq!(group.unread(found.length), Some(most));
    }
}
