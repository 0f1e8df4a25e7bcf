//! Whatever columns and tables are called, and whatever a session has set, an event says the same of a row.

use super::{event, heads, run, start, taken};
use kit::Refused;
use serde_json::json;

#[test]
fn a_column_may_be_called_as_a_row_is_in_the_trigger() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (\"new\" int primary key, \"old\" int, d int, \"row\" int, e int, p int, n int, place int)",
    );
    let row = |d: i32| json!({"new": 1, "old": 2, "d": d, "row": null, "e": null, "p": null, "n": null, "place": null});
    let statements = "insert into t (\"new\", \"old\", d) values (1, 2, 3); update t set d = 4; delete from t";
    run(&mut c, &format!("select outbox.attach_table('t'); {statements}"));
    assert_eq!(
        taken(&mut c),
        [
            event("t.insert", "1", row(3)),
            event("t.update", "1", row(4)),
            event("t.delete", "1", row(4))
        ]
    );
    run(
        &mut c,
        &format!(
            "select outbox.attach_table('t', payload => 'both', condition => '\"row\" is null and new.d > 3'); {statements}"
        ),
    );
    assert_eq!(
        taken(&mut c),
        [event("t.update", "1", json!({"old": row(3), "new": row(4)}))]
    );
    run(
        &mut c,
        &format!("select outbox.attach_table('t', payload => 'changed', columns => '{{d,new}}'); {statements}"),
    );
    assert_eq!(
        taken(&mut c),
        [
            event("t.insert", "1", json!({"d": 3, "new": 1})),
            event("t.update", "1", json!({"d": 4})),
            event("t.delete", "1", json!({"d": 4, "new": 1}))
        ]
    );
    run(
        &mut c,
        &format!("select outbox.attach_table('t', columns => '{{d}}', operations => 'insert'); {statements}"),
    );
    assert_eq!(taken(&mut c), [event("t.insert", "1", json!({"d": 3}))]);
}

/// A subject that depended on the session would let two events of one row go into two streams.
#[test]
fn what_a_session_has_set_changes_nothing_in_its_events() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (day date primary key, at timestamptz, span interval, bytes bytea, number float8, during tstzrange);
        create table keyed (at timestamptz, bytes bytea, primary key (at, bytes));
        select outbox.attach_table('t'), outbox.attach_table('keyed')",
    );
    let statements = "insert into t values ('2020-02-01', '2020-02-01 00:00+00', '1 day 2 hours', '\\x00ff', 0.1234567890123456, '[2020-02-01 00:00+00,)');
        insert into keyed values ('2020-02-01 00:00+00', '\\x00ff'); delete from t; delete from keyed";
    let mut both = [0, 1].map(|_| pg.client());
    run(
        &mut both[1],
        "set datestyle = 'German'; set timezone = 'Asia/Tokyo'; set bytea_output = 'escape'; set extra_float_digits = -5; set intervalstyle = 'iso_8601'",
    );
    let [first, second] = both.each_mut().map(|session| {
        run(session, statements);
        taken(&mut c)
    });
    assert_eq!(first, second);
    let row = json!({"day": "2020-02-01", "at": "2020-02-01T00:00:00+00:00", "span": "1 day 02:00:00", "bytes": "\\x00ff",
        "number": 0.123_456_789_012_345_6, "during": "[\"2020-02-01 00:00:00+00\",)"});
    assert_eq!(first[0], event("t.insert", "2020-02-01", row));
    assert_eq!(
        first[1].1.as_deref(),
        Some("[\"2020-02-01T00:00:00+00:00\", \"\\\\x00ff\"]")
    );
    assert_eq!(second[1].1, second[3].1);
}

#[test]
fn a_condition_means_the_same_in_every_session() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        r"create table t (note text primary key); select outbox.attach_table('t', condition => $$note <> 'a\b'$$)",
    );
    for set in ["reset all", "set standard_conforming_strings = off"] {
        let mut session = pg.client();
        run(&mut session, set);
        run(&mut session, r"insert into t values (E'a\\b'), ('c'); delete from t");
        assert_eq!(heads(&mut c), ["t.insert c", "t.delete c"], "{set}");
    }
}

#[test]
fn a_tables_name_may_be_as_long_as_names_are_and_its_schema_may_change() {
    let pg = start();
    let mut c = pg.client();
    let name = |last: &str| format!("{}{last}", "ü".repeat(31 - last.len()));
    for last in ["a", "b"] {
        let name = name(last);
        run(
            &mut c,
            &format!(
                "create table {name} (id int primary key); select outbox.attach_table('{name}'); insert into {name} values (1)"
            ),
        );
        assert_eq!(heads(&mut c), [format!("{name}.insert 1")]);
    }
    run(
        &mut c,
        &format!(
            "create schema other; alter table {0} set schema other; insert into other.{0} values (2)",
            name("a")
        ),
    );
    assert_eq!(heads(&mut c), [format!("{}.insert 2", name("a"))]);
    let functions = "select count(*) from pg_proc where proname like 'outbox_events_of%'";
    assert_eq!(pg.one::<i64>(functions), 2);
    run(
        &mut c,
        &format!(
            "select outbox.detach_table('other.{}'), outbox.detach_table('{}')",
            name("a"),
            name("b")
        ),
    );
    assert_eq!(pg.one::<i64>(functions), 0);
    // What no event can be called is said when the table is attached.
    run(&mut c, "create table t (id int primary key)");
    for (arguments, message) in [
        ("event_type => repeat('x', 247)", "event_type is too long"),
        ("source => repeat('x', 256)", "source is too long"),
    ] {
        let refused = Refused::of(c.batch_execute(&format!("select outbox.attach_table('t', {arguments})")));
        assert_eq!((refused.code.as_str(), refused.message.as_str()), ("22023", message));
    }
    run(
        &mut c,
        "select outbox.attach_table('t', event_type => repeat('x', 246), operations => 'truncate'); truncate t",
    );
    assert_eq!(pg.one::<i32>("select length(event_type) from outbox.events"), 255);
}
