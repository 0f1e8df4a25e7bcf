//! Whatever columns and tables are called, and whatever a session has set, an event says the same of a row.

use super::{event, heads, run, start, taken};
use kit::{Postgres, Refused};
use serde_json::json;
use std::process::Command;
use tempfile::TempDir;

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

/// A server that knows the locale `xx_XX`, which writes money in its own way, as long as the directory is there.
fn start_abroad() -> (Postgres, Option<TempDir>) {
    let (dir, source) = kit::env::shared_file(
        "source",
        "LC_MONETARY\nint_curr_symbol \"EUR \"\ncurrency_symbol \"EUR\"\nmon_decimal_point \",\"\nmon_thousands_sep \".\"\n\
         mon_grouping 3;3\npositive_sign \"\"\nnegative_sign \"-\"\nint_frac_digits 2\nfrac_digits 2\np_cs_precedes 0\np_sep_by_space 1\n\
         n_cs_precedes 0\nn_sep_by_space 1\np_sign_posn 1\nn_sign_posn 1\nEND LC_MONETARY\n",
    );
    // It warns that the locale has nothing else.
    let made = Command::new("localedef")
        .args(["--no-archive", "-c", "-i"])
        .args([source.as_path(), dir.path().join("xx_XX").as_path()])
        .output();
    let is_made = made.is_ok_and(|made| made.status.code().is_some_and(|code| code < 2));
    if !is_made {
        kit::env::not_run("localedef makes no locale, so money looks the same everywhere");
    }
    let place = dir.path().to_str().expect("UTF-8").to_owned();
    let pg = Postgres::with(&[("outbox_relay.enabled", "off")])
        .env("LOCPATH", &place)
        .start();
    pg.extension();
    (pg, is_made.then_some(dir))
}

/// A subject that depended on the session would let two events of one row go into two streams.
#[test]
fn what_a_session_has_set_changes_nothing_in_its_events() {
    let (pg, locales) = start_abroad();
    let mut c = pg.client();
    // Postgres can be built without XML.
    let note = c.simple_query("select '<a/>'::xml").map_or("text", |_| "xml");
    run(
        &mut c,
        &format!(
            "create type mood as enum ('un well'); create type spot as (at timestamptz, price money);
            create table t (day date primary key, at timestamptz, span interval, bytes bytea, number float8, during tstzrange, price money,
                prices money[], of regclass, moods mood[], spot spot, span_only daterange, note {note});
            create table keyed (at timestamptz, bytes bytea, primary key (at, bytes)); create table priced (price money primary key);
            select outbox.attach_table('t'), outbox.attach_table('keyed'), outbox.attach_table('priced')"
        ),
    );
    let statements = "insert into t values ('2020-02-01', '2020-02-01 00:00+00', '1 day 2 hours', '\\x00ff', 0.1234567890123456, '[2020-02-01 00:00+00,)',
            1234.5::numeric, array[0.5::numeric::money, null], 'outbox.events', '{\"un well\"}', row('2020-02-01 00:00+00', -2::numeric), '[2020-02-01,2020-02-02]', '<a/>');
        insert into keyed values ('2020-02-01 00:00+00', '\\x00ff'); insert into priced values (1234.5::numeric);
        delete from t; delete from keyed; delete from priced";
    let mut both = [0, 1].map(|_| pg.client());
    run(
        &mut both[1],
        "set datestyle = 'German'; set timezone = 'Asia/Tokyo'; set bytea_output = 'escape'; set extra_float_digits = -5; set intervalstyle = 'iso_8601';
        set quote_all_identifiers = on; set xmlbinary = hex",
    );
    if locales.is_some() {
        run(&mut both[1], "set lc_monetary = 'xx_XX'");
        let money = both[1].query_one("select 1234.5::numeric::money::text", &[]);
        assert_eq!(money.expect("money").get::<_, String>(0), "1.234,50 EUR");
    }
    let [first, second] = both.each_mut().map(|session| {
        run(session, statements);
        taken(&mut c)
    });
    assert_eq!(first, second);
    let row = json!({"day": "2020-02-01", "at": "2020-02-01T00:00:00+00:00", "span": "1 day 02:00:00", "bytes": "\\x00ff",
        "number": 0.123_456_789_012_345_6, "during": "[\"2020-02-01 00:00:00+00\",)", "price": "$1,234.50", "prices": ["$0.50", null],
        "of": "outbox.events", "moods": ["un well"], "spot": {"at": "2020-02-01T00:00:00+00:00", "price": "-$2.00"},
        "span_only": "[2020-02-01,2020-02-03)", "note": "<a/>"});
    assert_eq!(first[0], event("t.insert", "2020-02-01", row));
    assert_eq!(
        first[1].1.as_deref(),
        Some("[\"2020-02-01T00:00:00+00:00\", \"\\\\x00ff\"]")
    );
    assert_eq!(second[1].1, second[4].1);
}

#[test]
fn a_condition_means_the_same_in_every_session() {
    let pg = start();
    let mut c = pg.client();
    run(&mut c, "create table t (note text primary key, day date, list text[])");
    let rows = "insert into t (note, day, list) values (E'a\\\\b', '2020-03-02', '{a}'), ('c', '2020-02-03', array[null]); delete from t";
    for condition in [
        r"note <> 'a\b'",
        "day = '02/03/2020'",
        "list = '{null}'",
        "(note = null) is null and note <> E'a\\\\b'",
    ] {
        for set in [
            "reset all",
            "set standard_conforming_strings = off; set datestyle = 'German'; set array_nulls = off; set transform_null_equals = on",
        ] {
            let mut session = pg.client();
            run(&mut session, set);
            session
                .execute("select outbox.attach_table('t', condition => $1)", &[&condition])
                .unwrap_or_else(|error| panic!("{set}: {condition}: {error:?}"));
            for set in [
                "reset all",
                "set standard_conforming_strings = off; set datestyle = 'SQL, DMY'; set array_nulls = off; set transform_null_equals = on",
            ] {
                let mut session = pg.client();
                run(&mut session, set);
                run(&mut session, rows);
                assert_eq!(heads(&mut c), ["t.insert c", "t.delete c"], "{set}: {condition}");
            }
        }
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
