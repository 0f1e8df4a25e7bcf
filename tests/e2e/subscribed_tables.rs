//! Tables of users that a subscription fills: what their triggers do is done by this server, and not by the server from
//! which the rows come.

use kit::owners::{LOGICAL, wait_applied};
use kit::{Postgres, QUICK, Redis, Stack, types, wait_until};

/// A server whose table `orders` a subscription fills. For each row, an ALWAYS trigger executes the row's statement.
fn subscribed() -> (Postgres, Stack) {
    let old = Postgres::with(LOGICAL).start();
    let settings = [LOGICAL, QUICK].concat();
    let new = Stack::of(Postgres::with(&settings), Redis::start());
    let table = "create table orders (id integer generated always as identity primary key, statement text)";
    old.exec(&format!("{table}; create publication orders for table orders"));
    new.pg.exec(&format!(
        "{table};
         create function execute_it() returns trigger language plpgsql as $$ begin execute new.statement; return null; end $$;
         create trigger execute_it after insert on orders for each row execute function execute_it();
         alter table orders enable always trigger execute_it"
    ));
    new.pg.exec(&format!(
        "create subscription old connection 'host={} port=5432 dbname=postgres user=postgres' publication orders",
        old.host().display()
    ));
    wait_until("the table to be copied", || {
        new.pg
            .one::<bool>("select count(*) > 0 and bool_and(srsubstate = 'r') from pg_subscription_rel")
    });
    (old, new)
}

/// Before, a plain INSERT stopped the subscription, and other events waited for a take-over.
#[test]
fn triggers_publish_and_change_as_in_any_session() {
    let (old, new) = subscribed();
    let run = |statement: &str| {
        old.exec(&format!("insert into orders (statement) values ($${statement}$$)"));
        wait_applied(&old);
    };
    let insert = |kind: &str| format!("insert into outbox.events (event_type, source) values ('{kind}', 's')");
    let publish = |kind: &str| format!("select outbox.publish_event('{kind}', 's')");
    run(&publish("published"));
    run(&insert("inserted"));
    run(
        "insert into outbox.scheduled_events (event_type, source, scheduled_at) values ('scheduled', 's', now() + interval '1ms')",
    );
    new.wait_events(3);
    // With a trigger of somebody else, publish_event() inserts by a statement, too.
    new.pg.exec(
        "create function other() returns trigger language plpgsql as 'begin return new; end';
         create trigger other before insert on outbox.events for each row execute function other();
         alter table outbox.events enable always trigger other",
    );
    run(&publish("published too"));
    run(&insert("inserted too"));
    run("insert into outbox.backends (name) values ('another')");
    run("update outbox.backends set enabled = false where name = 'another'");
    run("select outbox.publish_event('cancelled', 's', scheduled_at => now() + interval '1 hour')");
    run("delete from outbox.scheduled_events");
    run("insert into outbox.routes (event_type, backend) values ('none', 'another')");
    assert_eq!(
        types(&new.wait_events(5)),
        ["published", "inserted", "scheduled", "published too", "inserted too"]
    );
    let counts = new.pg.one::<String>(
        "select concat_ws(' ', (select count(*) from outbox.held_events), (select count(*) from outbox.held_scheduled),
            (select count(*) from outbox.scheduled_events), (select count(*) from outbox.routes),
            (select enabled from outbox.backends where name = 'another'))",
    );
    assert_eq!(counts, "0 0 0 1 f");
    let errors = "select sum(apply_error_count + sync_error_count)::bigint from pg_stat_subscription_stats";
    assert_eq!(new.pg.one::<i64>(errors), 0);
    new.pg.exec("drop subscription old");
}
