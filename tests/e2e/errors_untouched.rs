//! The errors of other code are the same with the library and without it, byte for byte; and an ERROR of other code
//! below the relay's functions reaches the client unchanged.

use std::thread;

use kit::{Postgres, Stack, env, wait_until};
use postgres::error::DbError;

/// Statements that fail, each in another way. Most are utility statements: those went through a hook of the relay in
/// the past.
const FAILING: &str = r#"
\set VERBOSITY verbose
\set SHOW_CONTEXT always
create table parent (id integer primary key, v text not null check (v <> 'bad'), constraint v_unique unique (v));
insert into parent values (1, 'a'), (2, 'b');
create table child (id integer references parent);
create domain positive as integer check (value > 0);
create table domains (x positive, y integer);
insert into domains values (1, -1);
create table ranges (r int4range);
insert into ranges values ('[1,5)'), ('[2,6)');
insert into parent values (1, 'c');
insert into parent values (3, 'bad');
insert into parent values (3, null);
insert into child values (9);
delete from nowhere;
alter table parent add constraint above check (id > 100);
alter table parent add constraint lone exclude (v with =), alter id set not null, add constraint twice check (false);
alter table ranges add constraint apart exclude using gist (r with &&);
create unique index same on parent ((1));
alter table child add constraint none foreign key (id) references parent (v);
alter table domains add foreign key (y) references parent;
alter domain positive add constraint huge check (value > 1000);
alter table domains alter y type positive;
alter table parent alter v type integer using v::integer;
alter table domains add column z integer not null;
create table twice (a integer, a integer);
create view broken as select nope from parent;
create function broken() returns integer language sql as 'select nothing';
create function halting() returns void language plpgsql as $$ begin perform 1 / 0; end $$;
select halting();
create procedure raising() language plpgsql as $$ begin
  raise 'of our own' using errcode = 'UX001', detail = 'a detail', hint = 'a hint', column = 'c', constraint = 'k',
    datatype = 't', table = 'tt', schema = 's';
end $$;
call raising();
do $$ begin call raising(); end $$;
do $$ begin raise exception sqlstate 'P0XYZ'; end $$;
do $$ begin execute 'selec 1'; end $$;
do $$ begin insert into parent values (1, 'x'); end $$;
do 'begin x';
copy parent from stdin;
5	five
6	bad
\.
copy parent from stdin;
x	five
\.
copy parent (nope) to stdout;
copy parent from '/nowhere/at/all';
explain select * from nowhere;
explain analyze select 1 / 0;
prepare dividing (integer) as select 1 / $1;
execute dividing (0);
execute dividing ('x');
execute unknown;
begin;
declare c cursor for select 1 / (n - 2) from generate_series(1, 3) n;
fetch all from c;
rollback;
create table filled as select 1 / 0 as x;
create materialized view m as select 1 / x as y from (values (1)) v (x);
refresh materialized view nowhere;
vacuum nowhere;
analyze parent (nope);
lock table nowhere;
set nothing = 1;
set work_mem = 'much';
alter system set port = 'x';
create database "template1";
drop database nowhere;
alter database postgres rename to template1;
create role postgres;
drop owned by nobody;
grant select on nowhere to public;
create extension nowhere;
drop table parent;
drop schema public;
create trigger t before insert on parent execute function nowhere();
truncate parent;
create type t as enum ('a', 'a');
comment on column parent.nope is 'x';
reindex table nowhere;
cluster parent using nope;
listen;
checkpoint now;
release savepoint nowhere;
commit prepared 'nowhere';
set constraints nowhere deferred;
create event trigger e on nothing execute function halting();
security label on table parent is 'x';
load '/nowhere';
"#;

/// The output of a psql session for these statements, and the server's log for them.
fn shown(libraries: &str) -> (String, String) {
    let pg = Postgres::with(&[
        ("shared_preload_libraries", libraries),
        ("log_line_prefix", "%b "),
        ("log_error_verbosity", "verbose"),
        ("log_min_messages", "warning"),
        ("max_prepared_transactions", "4"),
    ])
    .start();
    let said = pg.run("psql", &["-f", "-"], FAILING);
    wait_until("the last statement in the log", || pg.log().contains("/nowhere\""));
    let log = pg.log();
    let of_others = ["postmaster ", "startup ", "outbox_relay "];
    let is_ours = |line: &&str| !of_others.iter().any(|name| line.starts_with(name)) && !line.contains("starting up");
    let from_first_error = log.lines().filter(is_ours).skip_while(|line| !line.contains("ERROR"));
    let logged: Vec<&str> = from_first_error.collect();
    (said.stdout + &said.stderr, logged.join("\n"))
}

#[test]
fn a_failing_statement_says_the_same_with_the_library_as_without() {
    let (without, logged_without) = shown("");
    assert!(without.matches("LOCATION:").count() > 55, "{without}");
    for part in [
        "CONSTRAINT NAME:",
        "COPY parent, line 2",
        "DATATYPE NAME:",
        "UX001",
        "QUERY:",
        "CONTEXT:",
    ] {
        assert!(without.contains(part), "no {part} in {without}");
    }
    let mut preloads = vec!["outbox_relay"];
    if !env::lacks(&["pg_stat_statements"]) {
        preloads.extend(["outbox_relay, pg_stat_statements", "pg_stat_statements, outbox_relay"]);
    }
    for libraries in preloads {
        let (with, logged_with) = shown(libraries);
        assert_same(&without, &with, libraries);
        assert_same(&logged_without, &logged_with, libraries);
    }
}

#[track_caller]
fn assert_same(without: &str, with: &str, libraries: &str) {
    for (without, with) in without.lines().zip(with.lines()) {
        assert_eq!(without, with, "with {libraries}");
    }
    assert_eq!(without.lines().count(), with.lines().count(), "with {libraries}");
}

/// A deadlock between two utility statements: detail and context name both.
#[test]
fn a_deadlock_says_the_same_with_the_library_as_without() {
    let details = ["", "outbox_relay"].map(|libraries| {
        let pg = Postgres::with(&[("shared_preload_libraries", libraries), ("deadlock_timeout", "50ms")]).start();
        pg.exec("create table a (n integer); create table b (n integer)");
        let mut first = pg.client();
        let mut second = pg.client();
        first.batch_execute("begin; lock table a").unwrap();
        second.batch_execute("begin; lock table b").unwrap();
        let other = thread::spawn(move || second.batch_execute("lock table a"));
        let outcomes = [first.batch_execute("lock table b"), other.join().unwrap()];
        drop(first);
        let error = outcomes.into_iter().find_map(Result::err).expect("one of them fails");
        let log = pg.log();
        let log = log
            .split_once("deadlock detected")
            .map_or("", |(_, log)| log)
            .to_owned();
        let queries = log.matches("lock table").count();
        (
            parts(error.as_db_error().unwrap())
                .chars()
                .filter(|c| !c.is_ascii_digit())
                .collect::<String>(),
            queries,
        )
    });
    assert_eq!(details[0], details[1]);
    assert!(details[0].1 >= 3, "{details:?}");
}

/// All parts of an error that a client gets.
fn parts(said: &DbError) -> String {
    format!(
        "{} {} {} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
        said.severity(),
        said.code().code(),
        said.message(),
        said.detail(),
        said.hint(),
        said.position(),
        said.where_(),
        said.schema(),
        said.table(),
        said.column(),
        said.datatype(),
        said.constraint(),
        said.file(),
        said.routine(),
    )
}

/// All that `raise` says.
#[track_caller]
fn expect_of_our_own(said: &DbError, sql: &str) {
    assert_eq!(
        (said.code().code(), said.message(), said.detail(), said.hint()),
        ("UX001", "of our own", Some("a detail"), Some("a hint")),
        "{sql}"
    );
    assert_eq!(
        (
            said.column(),
            said.constraint(),
            said.datatype(),
            said.table(),
            said.schema()
        ),
        (Some("c"), Some("k"), Some("t"), Some("tt"), Some("s")),
        "{sql}"
    );
}

fn refused(stack: &Stack, sql: &str) -> DbError {
    let error = stack.pg.client().batch_execute(sql).expect_err("it should be refused");
    error.as_db_error().expect("the server refused it").clone()
}

/// Another user's index on outbox.events, whose function raises errors with all fields.
#[test]
fn an_error_of_a_users_code_below_our_functions_arrives_whole() {
    let stack = Stack::start();
    stack.pg.exec(
        "create function raising(t text) returns text language plpgsql immutable as $$ begin
           if t like 'bad%' then
             raise 'of our own' using errcode = 'UX001', detail = 'a detail', hint = 'a hint', column = 'c', constraint = 'k',
               datatype = 't', table = 'tt', schema = 's';
           end if;
           return t;
         end $$;
         create index on outbox.events (raising(event_type));
         create unique index lone on outbox.events (subject)",
    );
    for sql in [
        "select outbox.publish_event('bad', 'kit')",
        "select outbox.publish_events('[{\"event_type\": \"bad\", \"source\": \"kit\"}]')",
        "insert into outbox.events (event_type, source) values ('bad', 'kit')",
        "do $$ begin perform outbox.publish_event('bad', 'kit'); end $$",
    ] {
        let said = refused(&stack, sql);
        expect_of_our_own(&said, sql);
        let context = said.where_().unwrap_or_default();
        assert!(
            context.contains("PL/pgSQL function public.raising(text) line 3 at RAISE")
                || context.contains("PL/pgSQL function raising(text) line 3 at RAISE"),
            "{sql}: {context}"
        );
        assert_eq!(context.matches("at RAISE").count(), 1, "{sql}: {context}");
        if sql.starts_with("do") {
            assert!(
                context.contains("PL/pgSQL function inline_code_block line 1 at PERFORM"),
                "{context}"
            );
        }
        assert_eq!(said.file(), Some("pl_exec.c"), "{sql}");
    }
    stack
        .pg
        .exec("select outbox.publish_event('good', 'kit', subject => 'once')");
    for sql in [
        "select outbox.publish_event('good', 'kit', subject => 'once')",
        "insert into outbox.events (event_type, source, subject) values ('good', 'kit', 'once')",
    ] {
        let said = refused(&stack, sql);
        assert_eq!(
            (said.code().code(), said.schema(), said.table(), said.constraint()),
            ("23505", Some("outbox"), Some("events"), Some("lone")),
            "{sql}"
        );
    }
    // The relay's own messages stay the same, and an error that is caught does no harm.
    let said = refused(&stack, "select outbox.publish_event('', 'kit')");
    assert_eq!(
        (said.code().code(), said.hint()),
        ("22023", Some("Pass a text of 1 to 255 characters."))
    );
    stack.pg.exec(
        "do $$ begin
           for n in 1..200 loop
             begin perform outbox.publish_event('bad', 'kit'); exception when sqlstate 'UX001' then null; end;
           end loop;
         end $$",
    );
}

/// The same below an SQL statement that a function of the relay executes: there the ERROR has to cross the relay's
/// stack frames.
#[test]
fn an_error_below_our_own_statements_arrives_whole() {
    let stack = Stack::start();
    stack.pg.exec(
        "create function raising() returns trigger language plpgsql as $$ begin
           raise 'of our own' using errcode = 'UX001', detail = 'a detail', hint = 'a hint', column = 'c', constraint = 'k',
             datatype = 't', table = 'tt', schema = 's';
         end $$;
         create trigger raising before insert on outbox.restores for each row execute function raising();
         alter table outbox.restores enable always trigger raising",
    );
    let said = refused(
        &stack,
        "do $$ begin insert into outbox.events (xid, event_type, source) values ('3', 'restored', 'kit'); end $$",
    );
    expect_of_our_own(&said, "a restored row");
    let context = said.where_().unwrap_or_default();
    for part in [
        "raising() line 2 at RAISE",
        "SQL statement \"insert into outbox.restores",
        "inline_code_block",
    ] {
        assert!(context.contains(part), "{context}");
    }
    assert_eq!(context.matches("inline_code_block").count(), 1, "{context}");
    assert_eq!(
        (said.file(), said.routine()),
        (Some("pl_exec.c"), Some("exec_stmt_raise"))
    );
}
