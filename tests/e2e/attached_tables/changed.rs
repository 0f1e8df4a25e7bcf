//! Columns of all kinds, partitions and children; tables that change after they were attached.

use super::{event, heads, run, start, taken};
use kit::Refused;
use serde_json::json;

#[test]
fn columns_of_all_kinds_are_published_and_changes_of_the_table_followed() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create type pair as (x int, y text); create domain grade as int check (value > 0); create type color as enum ('red');
        create table \"T's\" (\"Id\" int primary key, gone int, \"q\"\"1\" text, doubled int generated always as (\"Id\" * 2) stored,
            list int[], p pair, j json, g grade, e color, b bytea, big text);
        alter table \"T's\" drop column gone; select outbox.attach_table('\"T''s\"')",
    );
    run(
        &mut c,
        "insert into \"T's\" values (1, 'it''s', default, '{1,2}', row(1, 'z'), '{\"a\": [1]}', 3, 'red', '\\x01', repeat(md5('1'), 20000))",
    );
    // A value in a TOAST table is there even if the update did not touch it.
    run(&mut c, "update \"T's\" set g = 4");
    run(
        &mut c,
        "alter table \"T's\" rename column e to colour; alter table \"T's\" add column added int default 7; alter table \"T's\" rename to renamed; alter table renamed drop column j",
    );
    run(&mut c, "update renamed set g = 5; delete from renamed");
    let events = taken(&mut c);
    let types: Vec<&str> = events.iter().map(|event| event.0.as_str()).collect();
    assert_eq!(types, ["T's.insert", "T's.update", "T's.update", "T's.delete"]);
    for (_, subject, data) in &events {
        assert_eq!(subject.as_deref(), Some("1"));
        assert_eq!(data["big"].as_str().expect("a text").len(), 640_000);
        assert_eq!((&data["doubled"], &data["list"]), (&json!(2), &json!([1, 2])));
        assert_eq!(
            (&data["p"], &data["q\"1"], &data["b"]),
            (&json!({"x": 1, "y": "z"}), &json!("it's"), &json!("\\x01"))
        );
    }
    assert_eq!(
        (&events[1].2["e"], &events[1].2["j"]),
        (&json!("red"), &json!({"a": [1]}))
    );
    assert_eq!(
        (&events[2].2["colour"], &events[2].2["added"]),
        (&json!("red"), &json!(7))
    );
    assert!(events[3].2.get("j").is_none() && events[3].2.get("gone").is_none());
    // A changed key is followed, too.
    run(
        &mut c,
        "alter table renamed rename column \"Id\" to id; insert into renamed (id) values (5)",
    );
    assert_eq!(heads(&mut c), ["T's.insert 5"]);
    run(
        &mut c,
        "select outbox.attach_table('renamed'); insert into renamed (id) values (5 + 1)",
    );
    assert_eq!(heads(&mut c), ["renamed.insert 6"]);
    // Functions of dropped tables are removed by the next call.
    run(
        &mut c,
        "drop table renamed; create table t (id int); select outbox.attach_table('t'); insert into t values (1)",
    );
    assert_eq!(heads(&mut c), ["t.insert -"]);
    let functions: String =
        pg.one("select string_agg(proname, ' ') from pg_proc where proname like 'outbox_events_of%'");
    assert_eq!(functions, "outbox_events_of_t");
    run(&mut c, "select outbox.detach_table('t'); insert into t values (2)");
    assert_eq!(
        pg.one::<i64>("select count(*) from pg_proc where proname like 'outbox_events_of%'"),
        0
    );
    assert_eq!(heads(&mut c), Vec::<String>::new());
}

#[test]
fn partitions_and_children_are_published_however_they_are_reached() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table p (id int, n int, primary key (id, n)) partition by range (id);
        create table p1 partition of p for values from (0) to (10); create table p2 partition of p for values from (10) to (20);
        create table parent (id int primary key, n int); create table child (extra text) inherits (parent);
        select outbox.attach_table('p', key => '{id}'); select outbox.attach_table('parent', operations => 'insert,update,delete,truncate')",
    );
    run(
        &mut c,
        "insert into p values (1, 1), (12, 1); insert into p1 values (2, 2); update p set n = 5; update p set id = id + 10 where id = 1; delete from p2 where n = 5; delete from p",
    );
    assert_eq!(
        heads(&mut c),
        [
            "p.insert 1",
            "p.insert 12",
            "p.insert 2",
            "p.update 1",
            "p.update 2",
            "p.update 12",
            "p.delete 1",
            "p.insert 11",
            "p.delete 12",
            "p.delete 11",
            "p.delete 2"
        ]
    );
    run(
        &mut c,
        "insert into parent values (1, 1); insert into child values (2, 2, 'x'); update parent set n = 3; delete from child; truncate parent",
    );
    assert_eq!(
        heads(&mut c),
        [
            "parent.insert 1",
            "parent.insert 2",
            "parent.update 1",
            "parent.update 2",
            "parent.delete 2",
            "parent.truncate -"
        ]
    );
    // A partition that is added later and has lost its triggers is named by health().
    run(
        &mut c,
        "create table p3 partition of p for values from (20) to (30); insert into p values (21, 1); insert into p3 values (20, 1)",
    );
    assert_eq!(heads(&mut c), ["p.insert 21", "p.insert 20"]);
    run(&mut c, "select outbox.detach_table('p3'); delete from p3 where id = 20");
    assert_eq!(heads(&mut c), Vec::<String>::new());
    let said: String =
        pg.one("select detail || hint from outbox.health() where \"check\" = 'attached tables' and status = 'warn'");
    assert!(
        said.contains("p3") && said.contains("attach_table('public.p'"),
        "{said}"
    );
    run(
        &mut c,
        "select outbox.attach_table('p', key => '{id}'); insert into p3 values (22, 1)",
    );
    assert_eq!(heads(&mut c), ["p.insert 22"]);
    assert_eq!(
        pg.one::<i64>("select count(*) from outbox.health() where \"check\" = 'attached tables' and status = 'ok'"),
        1
    );
    // Rows that a trigger keeps out of their new partition leave no pairs.
    run(
        &mut c,
        "create function nothing() returns trigger language plpgsql as 'begin return null; end'; create trigger n before insert on p2 for each row execute function nothing(); insert into p1 values (3, 3)",
    );
    assert_eq!(
        Refused::of(c.batch_execute("update p set id = 12 where id = 3")).code,
        "0A000"
    );
    // Postgres shows a row that a MERGE moves to no UPDATE trigger, as docs/guide.md says.
    run(
        &mut c,
        "drop trigger n on p2; merge into p using (values (3)) v (id) on p.id = v.id when matched then update set id = 13;
        merge into p using (values (13)) v (id) on p.id = v.id when matched then update set n = 4",
    );
    assert_eq!(heads(&mut c), ["p.insert 3", "p.update 13"]);
    run(&mut c, "select outbox.detach_table('p'); delete from p; delete from p3");
    assert_eq!(heads(&mut c), Vec::<String>::new());
    assert_eq!(
        pg.one::<i64>(
            "select count(*) from outbox.attached_tables where relation::text like 'p_' or relation::text = 'p'"
        ),
        0
    );
}

/// When key or chosen columns are renamed, that is followed; dropping one is refused.
#[test]
fn named_columns_are_followed_when_they_are_renamed_and_cannot_be_dropped() {
    let pg = start();
    pg.exec("create role shop login; create role other login; grant create on schema public to shop, other; select outbox.grant_publisher('shop')");
    let mut c = pg.client_as("shop", "postgres");
    run(
        &mut c,
        "create table t (x int, id int primary key, a text, b int); alter table t drop column x; insert into t values (1, 'x', 1);
        select outbox.attach_table('t', columns => '{id,a}', payload => 'changed', condition => 'b > 0')",
    );
    let mut admin = pg.client();
    run(
        &mut c,
        "alter table t rename column a to \"A \"\"%1$s\"; update t set \"A \"\"%1$s\" = 'y'",
    );
    assert_eq!(taken(&mut admin), [event("t.update", "1", json!({"A \"%1$s": "y"}))]);
    // In a transaction with other statements, back and forth, and by a superuser.
    run(
        &mut c,
        "begin; alter table t rename column id to a; alter table t rename to u; update u set \"A \"\"%1$s\" = 'z'; rollback",
    );
    run(
        &mut admin,
        "alter table t rename column id to b2; alter table t rename column b2 to nr; alter table t rename column \"A \"\"%1$s\" to a",
    );
    run(
        &mut c,
        "update t set a = 'w'; insert into t values (2, 'k', 2); update t set nr = 3 where nr = 2",
    );
    assert_eq!(
        heads(&mut admin),
        ["t.update 1", "t.insert 2", "t.delete 2", "t.insert 3"]
    );
    let said: String = pg.one("select definition from outbox.attached_tables");
    assert!(
        said.contains("\"key\": [\"nr\"]") && said.contains("\"columns\": [\"nr\", \"a\"]"),
        "{said}"
    );
    assert_eq!(
        pg.one::<String>("select publisher::text from outbox.attached_tables"),
        "shop"
    );

    // Other columns may come and go; a changed type is followed.
    run(
        &mut c,
        "alter table t add column more int; alter table t rename column more to less; alter table t drop column less; alter table t alter column nr type bigint, alter column a type varchar(9)",
    );
    run(&mut c, "update t set a = 'v' where nr = 1");
    assert_eq!(heads(&mut admin), ["t.update 1"]);
    for (sql, said) in [
        (
            "alter table t drop column nr",
            "column \"nr\" of attached table public.t is published",
        ),
        (
            "alter table t drop column a cascade",
            "column \"a\" of attached table public.t is published",
        ),
        (
            "alter table t drop column b",
            "the condition of attached table public.t would no longer fit",
        ),
        (
            "alter table t rename column b to b2",
            "the condition of attached table public.t would no longer fit",
        ),
    ] {
        let refused = Refused::of(c.batch_execute(sql));
        assert_eq!(refused.code, "2BP01", "{sql}: {refused:?}");
        assert!(refused.message.contains(said), "{sql}: {refused:?}");
    }
    run(
        &mut admin,
        "create type color as enum ('red'); alter table t add column c color",
    );
    run(&mut c, "select outbox.attach_table('t', key => '{c,nr}')");
    let refused = Refused::of(admin.batch_execute("drop type color cascade"));
    assert_eq!(refused.code, "2BP01", "{refused:?}");
    run(
        &mut c,
        "begin; select outbox.detach_table('t'); alter table t drop column c; select outbox.attach_table('t'); commit; delete from t where nr = 1",
    );
    assert_eq!(heads(&mut admin), ["t.delete 1"]);

    // Renaming a column runs no code of the owner.
    let forged = "true) from (select 1) x; create table injected (); select 1 from (select 1) new where (select (true";
    run(&mut c, "select outbox.attach_table('t', condition => 'nr > 0')");
    run(
        &mut c,
        &format!(
            "do $x$ declare f oid := (select tgfoid from pg_trigger where tgrelid = 't'::regclass and tgname = 'outbox_relay_insert'); \
            begin execute format('comment on function %s() is %L', f::regproc, replace(obj_description(f, 'pg_proc'), 'nr > 0', '{forged}')); end $x$"
        ),
    );
    Refused::of(admin.batch_execute("alter table t rename column nr to other"));
    assert_eq!(pg.one::<Option<String>>("select to_regclass('injected')::text"), None);
    run(&mut c, "select outbox.attach_table('t')");
    // Tables of others are not affected.
    let mut other = pg.client_as("other", "postgres");
    run(
        &mut other,
        "create table mine (id int, a int); alter table mine rename column a to b; alter table mine drop column b; create table part (like mine) partition by range (id); create table part1 partition of part for values from (0) to (9); drop table part, mine",
    );
    // An owner who no longer may publish.
    run(&mut other, "create table mine (id int primary key, a int)");
    run(
        &mut admin,
        "select outbox.grant_publisher('other'), outbox.attach_table('mine'), outbox.revoke_publisher('other')",
    );
    assert_eq!(
        Refused::of(other.batch_execute("alter table mine rename column id to nr")).code,
        "42501"
    );
    run(&mut other, "alter table mine rename column a to b");
    run(&mut admin, "alter table mine rename column id to nr");
    run(&mut admin, "select outbox.grant_publisher('other')");
    run(&mut other, "insert into mine values (1, 1); update mine set b = 2");
    assert_eq!(heads(&mut admin), ["mine.insert 1", "mine.update 1"]);
}

#[test]
fn partitions_and_children_that_come_later_are_published_and_dumps_bring_them() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table p (id int primary key, n int) partition by range (id); create table parent (id int primary key, n int);
        create table p1 partition of p for values from (0) to (10); create function f() returns trigger language plpgsql as 'begin return null; end';
        create trigger zz after insert on p for each statement execute function f()",
    );
    run(
        &mut c,
        "select outbox.attach_table('p'); select outbox.attach_table('parent')",
    );
    run(
        &mut c,
        "create table p2 partition of p for values from (10) to (20) partition by range (id); create table p21 partition of p2 for values from (10) to (15)",
    );
    run(
        &mut c,
        "create table p3 (n int, id int not null); alter table p attach partition p3 for values from (30) to (40)",
    );
    run(
        &mut c,
        "create table child () inherits (parent); create table other (n int, id int not null); alter table other inherit parent",
    );
    run(
        &mut c,
        "insert into p2 values (11, 1); insert into p21 values (12, 1); insert into p3 (id) values (31); insert into child values (1, 1); insert into other (id) values (2)",
    );
    assert_eq!(
        heads(&mut c),
        [
            "p.insert 11",
            "p.insert 12",
            "p.insert 31",
            "parent.insert 1",
            "parent.insert 2"
        ]
    );
    // All in one transaction, and after a savepoint.
    run(
        &mut c,
        "begin; create table q (id int primary key, n int) partition by range (id); select outbox.attach_table('q'); savepoint a; \
        create table q1 (n int, id int not null); savepoint b; alter table q attach partition q1 for values from (0) to (10); commit; \
        insert into q1 (id) values (1); select outbox.detach_table('q'); drop table q",
    );
    assert_eq!(heads(&mut c), ["q.insert 1"]);
    // If a column is dropped in all tables, the error names the parent; a child that keeps it as its own continues.
    for (sql, relation) in [
        ("alter table parent drop column id", "parent"),
        ("alter table only parent drop column id", "parent"),
        (
            "alter table child no inherit parent; alter table child drop column id",
            "child",
        ),
    ] {
        let refused = Refused::of(c.batch_execute(sql));
        let expected = format!("column \"id\" of attached table public.{relation} is published");
        assert_eq!((refused.code.as_str(), refused.message), ("2BP01", expected), "{sql}");
    }
    // Renamed in all partitions at once.
    run(
        &mut c,
        "alter table p rename column id to nr; alter table parent rename column id to nr",
    );
    run(
        &mut c,
        "update p3 set n = 1; update child set n = 2; alter table p detach partition p3; update p3 set n = 2; select outbox.detach_table('p3'); update p3 set n = 3",
    );
    assert_eq!(heads(&mut c), ["p.update 31", "parent.update 1", "p.update 31"]);
    assert_eq!(
        pg.one::<i64>("select count(*) from outbox.health() where \"check\" = 'attached tables' and status = 'ok'"),
        1
    );

    run(&mut c, "alter table p disable trigger zz");
    let dump = pg.pg_dump("postgres");
    for (name, single) in [("copy1", ""), ("copy2", "begin;")] {
        pg.exec(&format!("create database {name}"));
        let end = if single.is_empty() { "" } else { "commit;" };
        pg.restore(name, &format!("{single}\n{dump}\n{end}"));
        let mut copy = pg.client_as("postgres", name);
        run(
            &mut copy,
            "set search_path = public; alter table p rename column nr to id; update p21 set n = 9; insert into p values (1, 1)",
        );
        assert_eq!(heads(&mut copy), ["p.update 11", "p.update 12", "p.insert 1"]);
    }
    // Nothing of the extension is in the way of later statements.
    run(
        &mut c,
        "drop extension outbox_relay cascade; alter table p rename column nr to id; create table p9 partition of p for values from (90) to (99)",
    );
}

/// It has one trigger for each operation: that of the parent that was attached last, or its own.
#[test]
fn a_child_of_several_attached_parents_is_well() {
    let pg = start();
    let mut c = pg.client();
    let said = || -> Option<String> {
        pg.client()
            .query_one(
                "select hint from outbox.health() where \"check\" = 'attached tables'",
                &[],
            )
            .expect("a row")
            .get(0)
    };
    run(
        &mut c,
        "create table a (id int, n int); create table b (id int, m int); create table child (own int) inherits (a, b);
         select outbox.attach_table('a', key => '{id}'); select outbox.attach_table('b', key => '{id}')",
    );
    assert_eq!(said(), None);
    run(
        &mut c,
        "insert into child (id) values (1); update a set n = 2; update b set m = 3; delete from child",
    );
    assert_eq!(heads(&mut c), ["b.insert 1", "a.update 1", "b.update 1", "b.delete 1"]);
    // By itself, and less than its parents.
    run(
        &mut c,
        "select outbox.attach_table('child', key => '{own}', operations => 'insert'); insert into child (own) values (5)",
    );
    assert_eq!(said(), None);
    assert_eq!(heads(&mut c), ["child.insert 5"]);
    // Without triggers, with some of them, and with one that only has such a name, it is named.
    run(&mut c, "select outbox.detach_table('child')");
    assert!(said().is_some_and(|hint| hint.contains("attach_table('public.b'")));
    run(
        &mut c,
        "create function f() returns trigger language plpgsql as 'begin return null; end';
         create trigger outbox_relay_insert after insert on child for each statement execute function f()",
    );
    assert!(said().is_some());
    run(
        &mut c,
        "select outbox.attach_table('a', key => '{id}'); select outbox.attach_table('b', key => '{id}')",
    );
    assert_eq!(said(), None);
    run(&mut c, "drop trigger outbox_relay_delete on child");
    assert!(said().is_some());
}
