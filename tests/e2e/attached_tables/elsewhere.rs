//! Changes elsewhere that an attached table depends on: its type, a foreign table that it inherits from, its backend;
//! and columns whose values triggers do not see.

use super::{event, heads, run, start, taken};
use kit::{Refused, env};
use serde_json::json;

#[test]
fn a_column_that_is_renamed_through_a_type_or_a_foreign_table_is_followed() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create type item as (id int, a text, b int); create table t of item (primary key (id));
        create foreign data wrapper nothing; create server nowhere foreign data wrapper nothing;
        create foreign table f (id int, a text, b int) server nowhere; create table child () inherits (f);
        select outbox.attach_table('t', columns => '{id,a}', condition => 'b > 0');
        select outbox.attach_table('child', key => '{id}', columns => '{id,a}', condition => 'b > 0')",
    );
    run(
        &mut c,
        "alter type item rename attribute a to name cascade; alter type item rename attribute id to nr cascade;
        alter foreign table f rename column a to name; alter foreign table f rename column id to nr;
        insert into t values (1, 'x', 1); insert into child values (2, 'y', 1)",
    );
    assert_eq!(
        taken(&mut c),
        [
            event("t.insert", "1", json!({"nr": 1, "name": "x"})),
            event("child.insert", "2", json!({"nr": 2, "name": "y"})),
        ]
    );
    for sql in [
        "alter type item rename attribute b to c cascade",
        "alter type item drop attribute b cascade",
        "alter type item drop attribute name cascade",
        "alter foreign table f rename column b to c",
        "alter foreign table f drop column b",
        "alter foreign table f drop column name",
    ] {
        assert_eq!(Refused::of(c.batch_execute(sql)).code, "2BP01", "{sql}");
    }
    // A type without attached tables, and a partition that is made together with a schema.
    run(
        &mut c,
        "create type other as (a int); alter type other rename attribute a to b; alter type other rename to another;
        create table p (id int primary key) partition by range (id); select outbox.attach_table('p');
        create schema later create table p1 partition of public.p for values from (0) to (10);
        insert into later.p1 values (1)",
    );
    assert_eq!(heads(&mut c), ["p.insert 1"]);
}

#[test]
fn a_table_is_attached_only_for_a_backend_that_exists() {
    let pg = start();
    pg.exec("create role shop login; grant create on schema public to shop; select outbox.grant_publisher('shop')");
    let mut c = pg.client_as("shop", "postgres");
    run(&mut c, "create table t (id int primary key)");
    let said = Refused::of(c.simple_query("select outbox.attach_table('t', backend => 'orders')"));
    assert_eq!(
        (said.code.as_str(), said.message.as_str()),
        ("42704", "backend \"orders\" does not exist")
    );
    assert!(said.detail.is_some() && said.hint.is_some(), "{said:?}");
    pg.exec("insert into outbox.backends (name) values ('orders'), ('a \"b\\'), ('c')");
    for backend in ["a \"b\\", "", "orders"] {
        run(
            &mut c,
            &format!(
                "select outbox.attach_table('t', backend => '{backend}', condition => '''\"backend\": '' <> ''''')"
            ),
        );
    }
    let faults = || -> String {
        pg.one(
            "select coalesce(detail || ' ' || hint, status) from outbox.health() where \"check\" = 'attached tables'",
        )
    };
    assert_eq!(faults(), "ok");
    // Without its backend, statements on the table fail.
    pg.exec("update outbox.backends set name = 'renamed' where name = 'orders'");
    assert_eq!(Refused::of(c.batch_execute("insert into t values (1)")).code, "42704");
    let said = faults();
    assert!(
        said.starts_with("public.t is attached for a backend that does not exist: statements on it fail.")
            && said.contains("outbox.attach_table('public.t', ...)"),
        "{said}"
    );
}

/// Triggers see null in a virtual generated column.
#[test]
fn a_virtual_column_is_neither_key_nor_chosen_nor_a_condition() {
    if env::postgres_major() < 18 {
        return;
    }
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (id int primary key, a int, v int generated always as (a * 2) virtual, s int generated always as (a * 3) stored)",
    );
    for arguments in [
        "condition => 'v > 1'",
        "condition => 'old.v is distinct from new.v'",
        "columns => '{id,v}'",
        "key => '{v}'",
    ] {
        let said = Refused::of(c.simple_query(&format!("select outbox.attach_table('t', {arguments})")));
        assert_eq!(said.code, "0A000", "{arguments}: {said:?}");
        assert!(said.detail.is_some() && said.hint.is_some(), "{said:?}");
    }
    run(
        &mut c,
        "select outbox.attach_table('t', key => '{id}', columns => '{id,s}', condition => 's > 1'); insert into t (id, a) values (1, 2)",
    );
    assert_eq!(taken(&mut c), [event("t.insert", "1", json!({"id": 1, "s": 6}))]);
}
