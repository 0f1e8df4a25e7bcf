//! Whose rights an attached table runs with: always those of its owner. Nobody lends the owner more by attaching or
//! altering the table, and the owner lends nobody more than the publishing of its rows.

use kit::{Postgres, Refused};
use serde_json::json;

use super::{event, heads, run, start, taken};

/// Roles `shop` and `mallory`, which may create tables and functions. `public.noted()` notes as whom it runs.
fn with_notes() -> Postgres {
    let pg = start();
    pg.exec(
        "create role shop login;
         create role mallory login;
         grant create on schema public to shop, mallory;
         create table public.ran (who text);
         grant insert on public.ran to public;
         create function public.noted() returns boolean language plpgsql as $$
            begin insert into public.ran values (current_user); return true; end $$",
    );
    pg
}

/// As whom it ran since the last call.
fn ran_as(pg: &Postgres) -> Vec<String> {
    let mut client = pg.client();
    let rows = client.query("select distinct who from public.ran order by 1", &[]);
    let found = rows.expect("notes").iter().map(|row| row.get(0)).collect();
    client.batch_execute("delete from public.ran").expect("a superuser");
    found
}

/// A table's owner runs code when its rows are published: casts of its types to JSON.
#[test]
fn an_attached_table_that_is_given_away_lends_its_owner_nothing() {
    let pg = start();
    pg.exec(
        "create role shop login;
         create role team;
         grant create on schema public to shop, team;
         create table orders (id integer primary key);
         create table parts (id integer primary key) partition by range (id);
         create table part partition of parts for values from (0) to (9);
         select outbox.attach_table('orders'), outbox.attach_table('parts');
         alter table orders owner to shop;
         alter table parts owner to shop;
         alter table part owner to shop",
    );
    let mut shop = pg.client_as("shop", "postgres");
    run(
        &mut shop,
        "create type mood as enum ('well');
         create function to_json_of(mood) returns json language plpgsql
            as $$ begin raise exception 'it runs as %', current_user; end $$;
         create cast (mood as json) with function to_json_of(mood);
         alter table orders add column m mood;
         alter table parts add column m mood",
    );
    for table in ["orders", "parts", "part"] {
        let said = Refused::of(shop.simple_query(&format!("insert into {table} values (1, 'well')")));
        assert_eq!(
            said,
            Refused::new(
                "42501",
                &format!("table public.{table} has another owner than when it was attached"),
                "Its events would be published with the rights of \"postgres\".",
                &format!(
                    "Let its owner, if that is a publisher, or a superuser attach it again: SELECT outbox.attach_table('public.{table}', ...);"
                ),
            ),
            "{table}"
        );
    }
    // The new owner publishes in its own name.
    pg.exec("select outbox.grant_publisher('shop'), outbox.attach_table('orders')");
    let said = Refused::of(shop.simple_query("insert into orders values (1, 'well')"));
    assert_eq!(said.message, "it runs as shop");
    // A group's table, which a member has attached, given to a member.
    pg.exec("alter table orders drop column m; alter table orders owner to team; grant team to shop; select outbox.grant_publisher('team'), outbox.attach_table('orders'); alter table orders owner to shop");
    run(&mut shop, "insert into orders values (1)");
    let mut client = pg.client();
    assert_eq!(heads(&mut client), ["orders.insert 1"]);
}

/// Any role may make temporary tables, with triggers and comments of its own.
#[test]
fn a_forged_comment_stops_no_change_of_other_tables() {
    let pg = start();
    pg.exec(
        "create role nobody login;
         create table others (id integer primary key, a integer, b integer);
         create table ours (id integer primary key, a integer, b integer);
         select outbox.attach_table('ours', columns => '{id,a}')",
    );
    let mut nobody = pg.client_as("nobody", "postgres");
    for (name, said) in [
        ("f", "{not json"),
        ("g", "{"),
        ("h", "{}[]"),
        ("i", "{\"a\": \"\\ud800\"}"),
    ] {
        run(
            &mut nobody,
            &format!(
                "create temp table of_{name} (id integer);
                 create function pg_temp.{name}() returns trigger language plpgsql as 'begin return null; end';
                 create trigger outbox_relay_insert after insert on of_{name} for each row execute function pg_temp.{name}();
                 comment on function pg_temp.{name}() is 'Publishes rows as events, see outbox.attach_table(): {said}'"
            ),
        );
    }
    let mut client = pg.client();
    for statement in [
        "alter table others rename a to c",
        "alter table others add column d integer",
        "alter table others drop column b",
        "alter table ours rename a to c",
        "alter table ours drop column b",
        "create table child () inherits (ours)",
        "drop table others",
    ] {
        client
            .batch_execute(statement)
            .unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    run(&mut client, "insert into ours values (1, 2)");
    assert_eq!(
        taken(&mut client),
        [event("ours.insert", "1", json!({"id": 1, "c": 2}))]
    );
}

#[test]
fn a_table_is_attached_only_for_an_owner_who_may_publish() {
    let pg = with_notes();
    pg.exec(
        "create role team;
         create role clerk login in role team;
         create schema theirs;
         create table theirs.orders (id integer primary key);
         alter table theirs.orders owner to team;
         select outbox.grant_publisher('clerk')",
    );
    let attach = "select outbox.attach_table('theirs.orders')";
    let expected = Refused::new(
        "42501",
        "role \"team\" may not publish",
        "The events of table theirs.orders are published with the rights of its owner.",
        "Ask the administrator to run SELECT outbox.grant_publisher('team');",
    );
    let mut admin = pg.client();
    let mut clerk = pg.client_as("clerk", "postgres");
    run(&mut admin, "grant usage on schema theirs to clerk");
    // Neither the superuser's rights nor those of another member are lent to all members.
    assert_eq!(Refused::of(admin.simple_query(attach)), expected);
    assert_eq!(Refused::of(clerk.simple_query(attach)), expected);
    run(&mut admin, "select outbox.grant_publisher('team')");
    assert_eq!(
        Refused::of(clerk.simple_query(attach)),
        Refused::new(
            "42501",
            "role \"team\" may not create functions in schema \"theirs\"",
            "The function that publishes the rows of table theirs.orders belongs to the owner of the table.",
            "Run GRANT CREATE ON SCHEMA theirs TO team; or let a superuser attach the table.",
        )
    );
    assert_eq!(pg.one::<i64>("select count(*) from outbox.attached_tables"), 0);
    run(&mut admin, attach);
    run(&mut admin, "grant create on schema theirs to team");
    run(&mut clerk, attach);
    assert_eq!(
        pg.one::<String>("select distinct publisher::text from outbox.attached_tables"),
        "team"
    );
    run(&mut clerk, "insert into theirs.orders values (1)");
    assert_eq!(heads(&mut admin), ["orders.insert 1"]);
}

/// When a condition is only parsed, values of its literals are checked: by domains within arrays and composite types.
#[test]
fn whoever_attaches_or_alters_a_table_runs_no_code_of_its_owner() {
    let pg = with_notes();
    pg.exec("select outbox.grant_publisher('shop')");
    let mut shop = pg.client_as("shop", "postgres");
    run(
        &mut shop,
        "create function public.watch() returns boolean language plpgsql as $$ begin return public.noted(); end $$;
         create domain watched as integer check (public.watch());
         create type pair as (w watched);
         create table orders (id integer primary key, n integer, gone integer, tags watched[], p pair);
         select outbox.attach_table('orders', condition => $$'{1}'::public.watched[] is not null and '(1)'::public.pair is not null$$)",
    );
    assert_eq!(ran_as(&pg), ["shop"]);
    let mut admin = pg.client();
    for sql in [
        "alter table orders rename n to m",
        "alter table orders rename id to nr",
        "alter table orders drop gone",
        "select outbox.attach_table('orders', condition => $$tags <> '{1}' or p <> '(1)'::public.pair$$)",
    ] {
        run(&mut admin, sql);
        assert_eq!(ran_as(&pg), ["shop"], "{sql}");
    }
    // What the code changes in the session does not last.
    run(
        &mut shop,
        "create or replace function public.watch() returns boolean language plpgsql
            as $$ begin perform set_config('search_path', 'evil', false); return public.noted(); end $$",
    );
    run(&mut admin, "alter table orders rename m to n");
    assert_eq!(ran_as(&pg), ["shop"]);
    let path: String = admin.query_one("show search_path", &[]).expect("shown").get(0);
    assert_eq!(path, "\"$user\", public");
}

/// A role that may make triggers on a table may forge those of an attached table.
#[test]
fn a_trigger_of_another_role_is_not_taken_for_one_of_an_attached_table() {
    let pg = with_notes();
    pg.exec("select outbox.grant_publisher('shop')");
    let mut shop = pg.client_as("shop", "postgres");
    run(
        &mut shop,
        "create table parent (id integer primary key, n integer);
         select outbox.attach_table('parent', operations => 'insert');
         grant trigger on parent to mallory",
    );
    let mut mallory = pg.client_as("mallory", "postgres");
    run(
        &mut mallory,
        "create domain watched as integer check (public.noted());
         create function forged() returns trigger language plpgsql as $$ begin perform public.noted(); return null; end $$;
         comment on function forged() is $$Publishes rows as events, see outbox.attach_table(): {\"condition\": \"'{1}'::public.watched[] is not null\"}$$;
         create trigger outbox_relay_update after update on parent for each statement execute function forged()",
    );
    run(
        &mut shop,
        "alter table parent rename n to m; create table child () inherits (parent); insert into child values (1, 1)",
    );
    run(
        &mut pg.client(),
        "alter table parent rename m to n; update child set n = 2",
    );
    assert_eq!(ran_as(&pg), Vec::<String>::new());
    assert_eq!(heads(&mut pg.client()), ["parent.insert 1"]);
}

/// A child may have columns that its parent lacks, and so code of its own owner; a partition may not.
#[test]
fn a_child_of_another_owner_is_not_published() {
    let pg = with_notes();
    pg.exec(
        "select outbox.grant_publisher('shop');
         create table parent (id integer primary key);
         create table child () inherits (parent);
         create table parts (id integer primary key) partition by range (id);
         create table part partition of parts for values from (0) to (9);
         alter table parent owner to shop;
         alter table child owner to mallory;
         alter table parts owner to shop;
         alter table part owner to mallory",
    );
    let mut admin = pg.client();
    assert_eq!(
        Refused::of(admin.simple_query("select outbox.attach_table('parent')")),
        Refused::new(
            "42501",
            "table public.child belongs to \"mallory\", and not to the owner of public.parent",
            "Code of that role would run with the rights of \"shop\", as whom the rows are published.",
            "Run ALTER TABLE public.child OWNER TO shop; first.",
        )
    );
    run(
        &mut admin,
        "alter table child owner to shop; select outbox.attach_table('parent'), outbox.attach_table('parts'); alter table child owner to mallory",
    );
    let mut mallory = pg.client_as("mallory", "postgres");
    run(
        &mut mallory,
        "create type mood as enum ('well');
         create function to_json_of(mood) returns json language plpgsql as $$ begin perform public.noted(); return '1'; end $$;
         create cast (mood as json) with function to_json_of(mood);
         alter table child add column m mood",
    );
    let said = Refused::of(mallory.simple_query("insert into child values (1, 'well')"));
    assert_eq!(said.code, "42501");
    run(&mut mallory, "insert into part values (2)");
    assert_eq!(ran_as(&pg), Vec::<String>::new());
    assert_eq!(taken(&mut admin), [event("parts.insert", "2", json!({"id": 2}))]);
    let said: String =
        pg.one("select detail from outbox.health() where \"check\" = 'attached tables' and status = 'warn'");
    assert_eq!(said, "public.child belongs to \"mallory\", and publishes as \"shop\".");
    // A partition's columns, and their types, come from the owner of the whole.
    run(
        &mut admin,
        "select outbox.detach_table('parts'); select outbox.grant_publisher('mallory')",
    );
    assert_eq!(
        Refused::of(mallory.simple_query("select outbox.attach_table('part')")).message,
        "table public.parts belongs to \"shop\", and not to the owner of public.part"
    );
}

/// Whatever a role may do to tables of its own, health() does not tell an administrator to let it publish.
#[test]
fn a_forged_trigger_makes_health_recommend_no_grant() {
    let pg = with_notes();
    let forge = |table: &str| {
        format!(
            "create function {table}_f() returns trigger language plpgsql as 'begin return null; end';
             create trigger outbox_relay_insert after insert on {table} for each statement execute function {table}_f();
             create trigger outbox_relay_delete after delete on {table} for each statement execute function {table}_f();
             alter table {table} disable trigger outbox_relay_delete"
        )
    };
    let mut mallory = pg.client_as("mallory", "postgres");
    let check = "select concat_ws(' ', status, hint) from outbox.health() where \"check\" = 'attached tables'";
    run(&mut mallory, "create temp table passing (id integer)");
    run(&mut mallory, &forge("passing"));
    assert_eq!(pg.one::<String>(check), "ok");
    run(&mut mallory, "create table lasting (id integer)");
    run(&mut mallory, &forge("lasting"));
    let said: String = pg.one(check);
    assert!(
        said.contains("If it is meant to, run SELECT outbox.grant_publisher('mallory');")
            || !said.contains("grant_publisher"),
        "{said}"
    );
}
