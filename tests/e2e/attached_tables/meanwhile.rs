//! Others change or attach a table while it is being attached.

use super::{heads, run, start};
use kit::{Refused, wait_until};

/// It would name a column that is gone, and no statement on the table could succeed.
#[test]
fn a_table_is_attached_as_it_is_when_others_have_changed_it() {
    let pg = start();
    let mut c = pg.client();
    run(
        &mut c,
        "create table t (id int primary key, a int, k int); create table l (k int) partition by list (k); create table l1 (k int)",
    );
    let waits =
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and query like '%attach_table%')";
    for (change, attach) in [
        (
            "alter table t rename a to b",
            "select outbox.attach_table('t', columns => '{a}')",
        ),
        (
            "alter table l attach partition l1 for values in (1)",
            "select outbox.attach_table('l')",
        ),
    ] {
        let mut other = pg.client();
        run(&mut other, &format!("begin; {change}"));
        let mut session = pg.client();
        let attaching = std::thread::spawn(move || session.batch_execute(attach));
        wait_until("the call to wait", || pg.one::<bool>(waits));
        run(&mut other, "commit");
        let outcome = attaching.join().expect("it does not panic");
        match change.contains("rename") {
            true => assert_eq!(Refused::of(outcome).code, "42703"),
            false => outcome.expect("the table is attached"),
        }
    }
    run(&mut c, "insert into t values (1, 1, 1); insert into l1 values (1)");
    assert_eq!(heads(&mut c), ["l.insert -"]);
}

/// Several instances of an application may run the same migration when they start.
#[test]
fn sessions_that_attach_one_table_wait_for_each_other() {
    let pg = start();
    run(&mut pg.client(), "create table t (id int primary key)");
    let mut sessions = [0, 1, 2, 3].map(|_| pg.client());
    std::thread::scope(|scope| {
        for session in &mut sessions {
            scope.spawn(|| {
                for _ in 0..25 {
                    run(session, "select outbox.attach_table('t')");
                    run(
                        session,
                        "select outbox.detach_table('t'); select outbox.attach_table('t')",
                    );
                }
            });
        }
    });
    let mut c = pg.client();
    run(&mut c, "insert into t values (1)");
    assert_eq!(heads(&mut c), ["t.insert 1"]);
}

/// Anybody can take any advisory lock, but not a lock of somebody else's table.
#[test]
fn nobody_without_rights_on_a_table_keeps_it_from_being_attached() {
    let pg = start();
    run(
        &mut pg.client(),
        "create table t (id int primary key); create role nobody login; grant select on t to nobody",
    );
    let mut nobody = pg.client_as("nobody", "postgres");
    run(
        &mut nobody,
        "select pg_advisory_lock(k.oid::int, o.oid::int) from pg_class k, pg_class o
             where k.relnamespace = 'pg_catalog'::regnamespace and k.relkind = 'r' and o.relname in ('t', 'events', 'backends');
         select pg_advisory_lock(oid::int) from pg_class where relname in ('t', 'events', 'backends')",
    );
    for mode in ["share update exclusive", "share row exclusive", "access exclusive"] {
        let refused = Refused::of(nobody.batch_execute(&format!("begin; lock table t in {mode} mode")));
        assert_eq!(refused.code, "42501", "{mode}");
        run(&mut nobody, "rollback");
    }
    run(
        &mut pg.client(),
        "set lock_timeout = '5s'; select outbox.attach_table('t'); select outbox.attach_table('t'); select outbox.detach_table('t')",
    );
}
