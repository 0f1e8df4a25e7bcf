use super::*;
use crate::consumers::group::EntryId;
use crate::samples::group;

const S: Duration = Duration::from_secs(1);

fn readership(max_len: i64) -> Readership {
    let policy = Policy { max_len, silence: None };
    Readership::new(Some(policy), Some("own".into()))
}

fn found(stream: &str, length: i64, groups: Vec<Group>) -> Surveyed {
    Surveyed {
        length,
        last: Some(EntryId { ms: 1, seq: 100 }),
        groups,
        ..Surveyed::of(stream.into())
    }
}

/// Makes one survey without failures. Returns what was to be trimmed.
fn survey(r: &mut Readership, now: Now, last: u64, found: &[Surveyed]) -> Vec<Question> {
    let (number, questions) = r.ask(now, Some(last), true, Interest::Nobody);
    assert!(r.surveyed(number, found, last, now).is_some());
    questions
}

#[test]
fn nothing_is_sent_before_the_own_stream_was_surveyed() {
    let mut r = readership(100);
    assert!(r.holds_back());
    survey(&mut r, S, 1, &[found("own", 40, Vec::new())]);
    assert!(!r.holds_back());
    assert_eq!(r.room("own"), 60);
}

/// A server can send any number.
#[test]
fn no_length_overflows() {
    let mut r = readership(1);
    let own: Rc<str> = "own".into();
    survey(&mut r, S, 1, &[found("own", i64::MAX, Vec::new())]);
    r.sent(&own, 10);
    assert!(r.room("own") < 0, "{}", r.room("own"));
}

/// The groups of all streams together are too many for one survey.
#[test]
fn a_stream_that_a_survey_left_out_is_asked_about_first() {
    let mut r = readership(100);
    let names: Vec<String> = (0..500).map(|n| format!("s{n:03}")).collect();
    names.iter().for_each(|name| r.knows(&Rc::from(name.as_str())));
    let mut answered = std::collections::BTreeSet::new();
    for second in 1..=60 {
        let (number, questions) = r.ask(second * S, Some(1), true, Interest::View);
        // Only the first ten are answered.
        let found: Vec<Surveyed> = questions[..10]
            .iter()
            .map(|q| found(&q.stream, 2, Vec::new()))
            .collect();
        answered.extend(found.iter().map(|f| f.stream.to_string()));
        r.surveyed(number, &found, 1, second * S);
    }
    assert_eq!(answered.len(), 501, "with its own stream");
}

#[test]
fn events_sent_after_a_survey_still_use_room() {
    let mut r = readership(100);
    let own: Rc<str> = "own".into();
    survey(&mut r, S, 1, &[found("own", 10, Vec::new())]);
    r.sent(&own, 20);
    assert_eq!(r.room("own"), 70);
    let (number, _) = r.ask(2 * S, Some(1), true, Interest::Nobody);
    r.sent(&own, 5);
    assert_eq!(r.room("own"), 65, "the survey has not been answered");
    r.surveyed(number, &[found("own", 30, Vec::new())], 1, 2 * S);
    assert_eq!(r.room("own"), 65, "it did not see the last five");
}

#[test]
fn a_late_answer_to_a_survey_is_ignored() {
    let mut r = readership(100);
    let (first, _) = r.ask(S, Some(1), true, Interest::Nobody);
    r.interrupt();
    let (second, _) = r.ask(2 * S, Some(1), true, Interest::Nobody);
    assert!(r.surveyed(first, &[found("own", 99, Vec::new())], 1, 2 * S).is_none());
    assert!(r.surveyed(second, &[found("own", 1, Vec::new())], 1, 2 * S).is_some());
    assert_eq!(r.room("own"), 99);
}

/// Each survey takes two minutes, and the server begins with one when it has answered the one before.
#[test]
fn a_server_that_answers_slowly_is_understood_in_the_end() {
    let mut r = readership(100);
    let takes = 120 * S;
    let (mut begun, mut answered_at) = (Vec::new(), Vec::new());
    let mut second = 1;
    let known = loop {
        assert!(second < 3_600, "asked {} times in vain", begun.len());
        let now = second * S;
        let is_due = r.due_at(Interest::Nobody).is_some_and(|at| at <= now);
        if is_due {
            let (number, _) = r.ask(now, Some(1), true, Interest::Nobody);
            begun.push(number);
            let free = answered_at.last().copied().unwrap_or(now).max(now);
            answered_at.push(free + takes);
        }
        let heard = begun.iter().zip(&answered_at).find(|(_, at)| **at == now);
        if let Some((number, _)) = heard
            && r.surveyed(*number, &[found("own", 1, Vec::new())], 1, now).is_some()
        {
            break begun.len();
        }
        second += 1;
    };
    assert!(known <= 4, "{known} surveys");
    assert_eq!(r.room("own"), 99);
    // The next one is expected as soon as any other.
    r.sent(&"own".into(), 1);
    let now = (second + 2) * S;
    r.ask(now, Some(1), true, Interest::Nobody);
    assert_eq!(r.due_at(Interest::Nobody), Some(now + PATIENCE));
}

#[test]
fn an_unknown_stream_has_little_room_until_it_is_surveyed() {
    let mut r = readership(100);
    let stream: Rc<str> = "new".into();
    assert_eq!(r.room("new"), 10);
    r.sent(&stream, 4);
    assert_eq!(r.room("new"), 6);
    survey(
        &mut r,
        S,
        1,
        &[found("own", 0, Vec::new()), found("new", 4, Vec::new())],
    );
    assert_eq!(r.room("new"), 96);
    assert_eq!(
        (readership(5).room("new"), readership(1_000_000).room("new")),
        (1, 1_000)
    );
    assert_eq!(readership(0).room("new"), i64::MAX);
}

#[test]
fn a_goal_waits_for_a_later_batch() {
    let mut r = readership(100);
    let read = || [found("own", 9, vec![group("g", 9, Some(4))])];
    assert_eq!(survey(&mut r, S, 7, &read())[0].trim, None);
    assert!(r.waits_for_batch(7) && !r.waits_for_batch(8));
    // There was no later batch: the guard still names number 7.
    assert_eq!(survey(&mut r, 2 * S, 7, &read())[0].trim, None);
    let id = EntryId { ms: 1, seq: 4 };
    let left_out = Vec::new();
    let trim = Trim::Before { id, left_out };
    let trimmed = [Surveyed {
        is_trimmed: true,
        ..found("own", 6, vec![group("g", 9, Some(4))])
    }];
    assert_eq!(survey(&mut r, 3 * S, 8, &trimmed)[0].trim, Some(trim.clone()));
    // The same trim is not repeated, unless the connection was lost.
    assert!(!r.waits_for_batch(8));
    r.disconnected();
    survey(&mut r, 4 * S, 8, &read());
    assert_eq!(survey(&mut r, 5 * S, 9, &read())[0].trim, Some(trim));
}

/// Others have filled the stream, in which a batch was on its way.
#[test]
fn a_stream_of_silent_groups_keeps_what_was_sent_since() {
    let policy = Policy {
        max_len: 100,
        silence: Some(5 * S),
    };
    let (own, dead): (Rc<str>, _) = ("own".into(), || vec![group("dead", 3, None)]);
    let mut r = Readership::new(Some(policy), Some(own.clone()));
    for second in 1..=6 {
        survey(&mut r, second * S, 1, &[found("own", 10, dead())]);
    }
    let (number, _) = r.ask(7 * S, Some(1), true, Interest::Nobody);
    r.sent(&own, 90);
    r.surveyed(number, &[found("own", 100, dead())], 1, 7 * S);
    let (_, questions) = r.ask(8 * S, Some(2), true, Interest::Nobody);
    let Some(Trim::To { length, .. }) = questions[0].trim else {
        panic!("{questions:?}");
    };
    assert_eq!(length, 90);
}

#[test]
fn a_paused_backend_trims_nothing() {
    let mut r = readership(100);
    survey(&mut r, S, 7, &[found("own", 9, vec![group("g", 9, None)])]);
    assert_eq!(r.ask(2 * S, Some(8), false, Interest::Nobody).1[0].trim, None);
    r.interrupt();
    assert!(r.ask(3 * S, Some(8), true, Interest::Nobody).1[0].trim.is_some());
}

#[test]
fn a_full_stream_makes_the_backend_wait_and_names_the_slowest_group() {
    let mut r = readership(10);
    survey(&mut r, S, 1, &[found("own", 10, vec![group("slow", 3, Some(3))])]);
    assert!(!r.holds_back(), "nobody wants to send");
    r.fills_up("own".into());
    assert!(r.holds_back() && r.trouble().is_none(), "it may have room by now");
    // What the group has acknowledged is about to be trimmed.
    survey(&mut r, 2 * S, 1, &[found("own", 10, vec![group("slow", 3, Some(3))])]);
    assert!(r.holds_back() && r.trouble().is_none());
    let trimmed = [Surveyed {
        is_trimmed: true,
        ..found("own", 10, vec![group("slow", 3, Some(3))])
    }];
    survey(&mut r, 3 * S, 2, &trimmed);
    let trouble = r.trouble().expect("it is full");
    assert_eq!((trouble.class, trouble.trouble), (Class::Full, Trouble::Full));
    for word in ["\"own\"", "10 entries", "\"slow\""] {
        assert!(trouble.message.contains(word), "{}", trouble.message);
    }
    survey(&mut r, 4 * S, 2, &[found("own", 9, vec![group("slow", 4, None)])]);
    assert!(!r.holds_back() && r.trouble().is_none());
}

#[test]
fn a_full_stream_without_groups_reports_that() {
    let mut r = readership(10);
    survey(&mut r, S, 1, &[found("own", 10, Vec::new())]);
    r.fills_up("own".into());
    survey(&mut r, 2 * S, 1, &[found("own", 10, Vec::new())]);
    assert_eq!(r.trouble().map(|t| t.trouble), Some(Trouble::NoGroup));
}

#[test]
fn a_denied_survey_stops_only_backends_that_trim_by_reading() {
    let denied = Surveyed {
        failure: Some(Failure::of(Trouble::NoPermCommand, "NOPERM no")),
        ..Surveyed::of("own".into())
    };
    let mut r = readership(10);
    survey(&mut r, S, 1, std::slice::from_ref(&denied));
    assert_eq!(
        r.trouble().map(|t| (t.class, t.trouble)),
        Some((Class::Configuration, Trouble::TrimDenied))
    );
    survey(&mut r, 2 * S, 1, &[found("own", 1, Vec::new())]);
    assert!(r.trouble().is_none() && !r.holds_back());
    let mut viewed = Readership::new(None, Some("own".into()));
    let (number, _) = viewed.ask(S, Some(1), true, Interest::View);
    viewed.surveyed(number, &[denied], 1, S);
    assert!(viewed.trouble().is_none() && !viewed.holds_back());
}

#[test]
fn a_command_that_a_script_may_not_run_is_denied() {
    let words = "ERR The user executing the script can't run this command or subcommand";
    let denied = Surveyed {
        untrimmed: Some(Failure::of(Trouble::UnknownReply, words).not_of_an_event()),
        ..Surveyed::of("own".into())
    };
    let mut r = readership(10);
    survey(&mut r, S, 1, std::slice::from_ref(&denied));
    assert_eq!(r.trouble().map(|t| t.trouble), Some(Trouble::TrimDenied));
    let both = Surveyed {
        failure: Some(Failure::of(Trouble::NoPermCommand, "NOPERM no")),
        ..denied
    };
    survey(&mut r, 2 * S, 1, &[both]);
    assert_eq!(r.trouble().map(|t| &*t.message), Some("NOPERM no"));
}

/// Before Redis 6.2, XTRIM knows no MINID.
#[test]
fn a_redis_that_does_not_know_how_to_trim_is_named_as_such() {
    let old = Surveyed {
        untrimmed: Some(Failure::of(Trouble::UnknownReply, "ERR syntax error").not_of_an_event()),
        ..Surveyed::of("own".into())
    };
    let mut r = readership(10);
    survey(&mut r, S, 1, &[old]);
    let trouble = r.trouble().map(|t| (t.class, t.trouble));
    assert_eq!(trouble, Some((Class::Configuration, Trouble::TrimUnknown)));
    let hint = r.trouble().and_then(Failure::hint);
    assert!(hint.is_some_and(|hint| hint.contains("Redis 6.2")));
}

/// Events for such a stream are refused, which is handled for each event.
#[test]
fn a_stream_of_a_wrong_type_has_room() {
    let mut r = readership(10);
    let wrong = Surveyed {
        failure: Some(Failure::of(Trouble::WrongType, "WRONGTYPE no")),
        ..Surveyed::of("own".into())
    };
    survey(&mut r, S, 1, &[wrong]);
    assert!(!r.holds_back() && r.room("own") > 1_000);
}

/// The groups that are left out of a stream of ten entries after this many seconds with the same answers.
fn left_out_after(seconds: u32, group: &Group) -> Vec<LeftOut> {
    let policy = Policy {
        max_len: 10,
        silence: Some(5 * S),
    };
    let mut r = Readership::new(Some(policy), Some("own".into()));
    let mut left_out = Vec::new();
    for second in 1..=seconds {
        let (number, _) = r.ask(second * S, Some(1), true, Interest::Nobody);
        let answers = [found("own", 10, vec![group.clone()])];
        left_out = r.surveyed(number, &answers, 1, second * S).expect("it was asked");
    }
    left_out
}

#[test]
fn a_group_with_work_is_silent_while_it_does_nothing() {
    let idle = |seconds: u32| Some(seconds * S);
    let unmanned = Group {
        consumers: 0,
        ..group("g", 3, None)
    };
    assert_eq!(left_out_after(6, &unmanned), []);
    assert_eq!(left_out_after(7, &unmanned)[0].silent, 6 * S);
    // One of its consumers was active since.
    let heard = Group {
        idle: idle(2),
        ..group("g", 3, Some(2))
    };
    assert_eq!(left_out_after(20, &heard), []);
    // Redis reports that it has been silent for long, but the worker has only just begun to look.
    let quiet = Group {
        idle: idle(1_000),
        ..group("g", 3, Some(2))
    };
    assert_eq!(left_out_after(1, &quiet), []);
    assert_eq!(left_out_after(7, &quiet)[0].silent, 6 * S);
    // It has read everything, and nothing new has come since.
    let done = Group {
        idle: idle(1_000),
        lag: Some(0),
        ..group("g", 9, None)
    };
    assert_eq!(left_out_after(20, &done), []);
}

/// Nobody can read from a Redis that is down, and nobody knows what consumers did while the worker stood still.
#[test]
fn a_group_is_not_silent_while_redis_is_not_asked() {
    let policy = Policy {
        max_len: 10,
        silence: Some(100 * S),
    };
    let group = Group {
        idle: Some(7_200 * S),
        ..group("g", 3, Some(2))
    };
    let left_out_at = |second: u32, r: &mut Readership| {
        let (number, _) = r.ask(second * S, Some(1), true, Interest::Nobody);
        let answers = [found("own", 10, vec![group.clone()])];
        let left_out = r.surveyed(number, &answers, 1, second * S).expect("it was asked");
        left_out.into_iter().map(|group| group.silent).collect::<Vec<_>>()
    };
    for (is_lost, silent) in [(true, 50), (false, 50 + 60)] {
        let mut r = Readership::new(Some(policy), Some("own".into()));
        for second in [1, 26, 51] {
            assert_eq!(left_out_at(second, &mut r), []);
        }
        if is_lost {
            r.disconnected();
        }
        let expected: Vec<_> = (silent > 100).then_some(silent * S).into_iter().collect();
        assert_eq!(left_out_at(7_251, &mut r), expected);
        assert_eq!(left_out_at(7_302, &mut r), [(silent + 51) * S]);
    }
}

#[test]
fn a_slow_group_that_makes_progress_is_not_silent() {
    let policy = Policy {
        max_len: 10,
        silence: Some(5 * S),
    };
    let mut r = Readership::new(Some(policy), Some("own".into()));
    for second in 1..=30 {
        let (number, _) = r.ask(second * S, Some(1), true, Interest::Nobody);
        // Slow: one entry every four seconds.
        let slow = group("g", 3 + u64::from(second) / 4, None);
        let left_out = r.surveyed(number, &[found("own", 10, vec![slow])], 1, second * S);
        assert_eq!(left_out, Some(Vec::new()), "{second}");
    }
}

#[test]
fn many_streams_take_turns_and_the_full_one_goes_first() {
    let mut r = readership(100);
    for n in 0..1_000 {
        r.sent(&format!("s{n}").into(), 10);
    }
    r.fills_up("s777".into());
    let mut asked: HashMap<Arc<str>, usize> = HashMap::new();
    for second in 1..=6 {
        let (number, questions) = r.ask(second * S, Some(1), true, Interest::Nobody);
        assert_eq!(questions.len(), ASKED_AT_ONCE);
        assert!(questions.iter().any(|q| *q.stream == *"s777"));
        for question in &questions {
            *asked.entry(question.stream.clone()).or_default() += 1;
        }
        let full = |stream: &str| found(stream, 100, Vec::new());
        let answers: Vec<_> = questions.iter().map(|q| full(&q.stream)).collect();
        r.surveyed(number, &answers, 1, second * S);
    }
    assert_eq!(asked.len(), 1_001, "each was asked");
    assert_eq!((asked["s777"], asked["own"]), (6, 6));
}

#[test]
fn streams_are_remembered_up_to_a_limit() {
    let mut r = Readership::new(None, Some("own".into()));
    for n in 0..10 * MOST_WATCHED {
        r.sent(&format!("s{n}").into(), 1);
    }
    assert!(r.streams.len() <= MOST_WATCHED);
    assert!(r.streams.contains_key("own") && r.streams.contains_key("s9999"));
}

/// As after a restart, when all that was known comes at once.
#[test]
fn half_of_the_streams_is_remembered_even_if_all_are_alike() {
    let mut r = Readership::new(None, Some("own".into()));
    for n in 0..MOST_WATCHED {
        r.knows(&Rc::from(format!("s{n}")));
    }
    assert!(r.streams.len() > MOST_WATCHED / 2, "{}", r.streams.len());
}

#[test]
fn a_backend_with_nothing_to_trim_makes_no_survey() {
    let mut r = readership(100);
    assert_eq!(r.due_at(Interest::Nobody), Some(Now::ZERO));
    survey(&mut r, S, 1, &[found("own", 1, vec![group("g", 1, None)])]);
    assert_eq!(
        (r.due_at(Interest::Nobody), r.due_at(Interest::View)),
        (None, Some(2 * S))
    );
    r.sent(&"own".into(), 1);
    assert_eq!(r.due_at(Interest::Nobody), Some(2 * S));
    let mut viewed = Readership::new(None, Some("own".into()));
    assert_eq!(
        (viewed.due_at(Interest::Nobody), viewed.due_at(Interest::View)),
        (None, Some(Now::ZERO))
    );
    assert_eq!(viewed.due_at(Interest::Probe), Some(Now::ZERO));
    let (number, _) = viewed.ask(S, Some(1), true, Interest::Probe);
    viewed.surveyed(number, &[found("own", 1, vec![])], 1, S);
    let due = [Interest::Nobody, Interest::Probe, Interest::View].map(|interest| viewed.due_at(interest));
    assert_eq!(due, [None, Some(S + PROBE_PAUSE), Some(2 * S)]);
    viewed.ask(S, Some(1), true, Interest::View);
    assert_eq!(viewed.due_at(Interest::View), Some(S + PATIENCE), "one is on its way");
}

/// In a cluster, most lanes have only streams that events name.
#[test]
fn a_lane_without_the_own_stream_does_not_wait_for_it() {
    let policy = Policy {
        max_len: 100,
        silence: None,
    };
    let mut r = Readership::new(Some(policy), None);
    assert!(!r.holds_back() && r.due_at(Interest::Nobody).is_none());
    r.sent(&"s".into(), 1);
    let (_, questions) = r.ask(S, Some(1), true, Interest::Nobody);
    assert_eq!(questions.iter().map(|q| &*q.stream).collect::<Vec<_>>(), ["s"]);
    r.follow(None, None);
    r.follow(Some(policy), None);
    assert!(!r.holds_back());
    r.follow(Some(policy), Some(&"own".into()));
    assert!(r.holds_back());
}

/// Shows that [`a_goal_waits_for_a_later_batch`] can fail.
#[cfg(feature = "faults")]
#[test]
fn a_mutant_that_trims_the_last_batch_is_detected() {
    fault::mutate(Some(Mutation::TrimLastBatch));
    let mut r = readership(100);
    let read = || [found("own", 9, vec![group("g", 9, Some(4))])];
    survey(&mut r, S, 7, &read());
    assert!(survey(&mut r, 2 * S, 7, &read())[0].trim.is_some());
}
