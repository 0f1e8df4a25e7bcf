//! The inbox: consume_once() is true once for each consumer and event, whatever is committed, rolled back or
//! concurrent; with a worker in the database and without one, and for roles that have only a grant.

use kit::{Postgres, Refused, holds_for, wait_eq, wait_until};
use postgres::{Client, Error};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;
use uuid::Uuid;

fn start() -> Postgres {
    let pg = Postgres::start();
    pg.extension();
    pg
}

fn once(client: &mut Client, consumer: &str, id: Uuid) -> Result<bool, Error> {
    let row = client.query_one("select outbox.consume_once($1, $2)", &[&consumer, &id])?;
    Ok(row.get(0))
}

fn many(client: &mut Client, consumer: &str, ids: &[Uuid]) -> Result<Vec<Uuid>, Error> {
    let rows = client.query("select outbox.consume_once($1, $2::uuid[])", &[&consumer, &ids])?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

fn noted(pg: &Postgres) -> i64 {
    pg.one("select count(*) from outbox.inbox")
}

/// Calls it in another session, within a transaction at this level that then commits; returns once it waits for a lock.
fn waiting(pg: &Postgres, level: &str, id: Uuid) -> JoinHandle<Result<bool, Error>> {
    let mut client = pg.client();
    client
        .batch_execute(&format!("begin isolation level {level}; select 1"))
        .unwrap();
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).unwrap().get(0);
    let other = std::thread::spawn(move || {
        let first = once(&mut client, "billing", id)?;
        client.batch_execute("commit")?;
        Ok(first)
    });
    wait_until("the other to wait", || {
        pg.one(&format!(
            "select exists (select from pg_locks where pid = {pid} and not granted)"
        ))
    });
    other
}

#[test]
fn an_event_is_new_once_to_each_consumer() {
    let pg = start();
    let mut client = pg.client();
    let id = Uuid::new_v4();
    assert!(once(&mut client, "billing", id).unwrap());
    assert!(!once(&mut client, "billing", id).unwrap());
    assert!(once(&mut client, "shipping", id).unwrap());
    assert!(!once(&mut pg.client(), "billing", id).unwrap());
    // As drivers send it: everything as untyped text, or only the id.
    let untyped = format!("select outbox.consume_once('billing', '{id}')");
    assert!(!pg.one::<bool>(&untyped));
    assert!(!pg.one::<bool>(&format!(
        "select outbox.consume_once(event_id => '{id}', consumer => 'billing')"
    )));
}

#[test]
fn a_rolled_back_event_was_not_consumed() {
    let pg = start();
    let mut client = pg.client();
    let id = Uuid::new_v4();
    let mut all = client.transaction().unwrap();
    assert!(
        all.query_one("select outbox.consume_once('c', $1)", &[&id])
            .unwrap()
            .get::<_, bool>(0)
    );
    assert!(
        !all.query_one("select outbox.consume_once('c', $1)", &[&id])
            .unwrap()
            .get::<_, bool>(0)
    );
    all.rollback().unwrap();
    client.batch_execute("begin; savepoint s").unwrap();
    assert!(once(&mut client, "c", id).unwrap());
    client.batch_execute("rollback to s").unwrap();
    assert!(once(&mut client, "c", id).unwrap());
    client.batch_execute("prepare transaction 'two'").unwrap();
    client.batch_execute("rollback prepared 'two'").unwrap();
    assert!(once(&mut client, "c", id).unwrap());
    assert_eq!(noted(&pg), 1);
}

#[test]
fn a_concurrent_call_waits_for_the_first_to_commit_or_roll_back() {
    let pg = start();
    for (end, answer) in [("commit", false), ("rollback", true)] {
        let id = Uuid::new_v4();
        let mut first = pg.client();
        first.batch_execute("begin").unwrap();
        assert!(once(&mut first, "billing", id).unwrap());
        let other = waiting(&pg, "read committed", id);
        first.batch_execute(end).unwrap();
        assert_eq!(other.join().unwrap().unwrap(), answer, "after {end}");
        assert!(!once(&mut first, "billing", id).unwrap());
    }
}

/// A snapshot cannot see rows that were committed after it, so the only right answer is an error.
#[test]
fn stricter_levels_of_isolation_give_the_right_answer_or_a_serialization_failure() {
    let pg = start();
    for level in ["repeatable read", "serializable"] {
        for (end, answer) in [("commit", None), ("rollback", Some(true))] {
            let id = Uuid::new_v4();
            let mut first = pg.client();
            first.batch_execute(&format!("begin isolation level {level}")).unwrap();
            assert!(once(&mut first, "billing", id).unwrap());
            let other = waiting(&pg, level, id);
            first.batch_execute(end).unwrap();
            let said = other.join().unwrap();
            match answer {
                Some(answer) => assert_eq!(said.unwrap(), answer, "{level}, {end}"),
                None => assert_eq!(Refused::of(said).code, "40001", "{level}, {end}"),
            }
        }
        // Events that its snapshot sees, and events that it has recorded itself.
        let (known, new) = (Uuid::new_v4(), Uuid::new_v4());
        let mut client = pg.client();
        once(&mut client, "billing", known).unwrap();
        client.batch_execute(&format!("begin isolation level {level}")).unwrap();
        assert!(!once(&mut client, "billing", known).unwrap());
        assert!(once(&mut client, "billing", new).unwrap());
        assert!(!once(&mut client, "billing", new).unwrap());
        client.batch_execute("commit").unwrap();
    }
}

#[test]
fn a_call_with_several_ids_returns_the_new_ones_in_the_given_order() {
    let pg = start();
    let mut client = pg.client();
    let mut ids: Vec<Uuid> = (0..50).map(|_| Uuid::new_v4()).collect();
    once(&mut client, "c", ids[3]).unwrap();
    once(&mut client, "c", ids[40]).unwrap();
    ids.push(ids[7]);
    let new = many(&mut client, "c", &ids).unwrap();
    let expected: Vec<Uuid> = (0..50).filter(|i| ![3, 40].contains(i)).map(|i| ids[i]).collect();
    assert_eq!(new, expected);
    assert_eq!(many(&mut client, "c", &ids).unwrap(), Vec::<Uuid>::new());
    assert_eq!(many(&mut client, "c", &[]).unwrap(), Vec::<Uuid>::new());
    let texts: i64 = pg.one(&format!(
        "select count(*) from outbox.consume_once('c', array['{}', '{}'])",
        ids[0],
        Uuid::new_v4()
    ));
    assert_eq!(texts, 1);
}

/// Each session has the same ids in another order; processed in the given order, they would wait for each other in a
/// circle.
#[test]
fn calls_with_ids_in_common_do_not_deadlock() {
    let pg = start();
    let ids: Vec<Uuid> = (0..400).map(|_| Uuid::new_v4()).collect();
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        for session in 0..4 {
            let (tell, mut client) = (tell.clone(), pg.client());
            let mut ids = ids.clone();
            scope.spawn(move || {
                for round in 0..10 {
                    match session % 2 {
                        0 => ids.reverse(),
                        _ => ids.rotate_left(37),
                    }
                    let consumer = format!("c{round}");
                    let new = many(&mut client, &consumer, &ids).expect("no deadlock");
                    tell.send(new.len()).unwrap();
                }
            });
        }
    });
    drop(tell);
    assert_eq!(
        told.iter().sum::<usize>(),
        4_000,
        "each id is new once to each of ten consumers"
    );
}

#[test]
fn arguments_without_a_meaning_are_refused() {
    let pg = start();
    let mut client = pg.client();
    for (sql, code) in [
        ("select outbox.consume_once(null, gen_random_uuid())", "22004"),
        ("select outbox.consume_once('c', null::uuid)", "22004"),
        ("select outbox.consume_once('c', null::uuid[])", "22004"),
        ("select outbox.consume_once('c', array[null]::uuid[])", "22004"),
        ("select outbox.consume_once('', gen_random_uuid())", "23514"),
        (
            "select outbox.consume_once(repeat('x', 256), gen_random_uuid())",
            "23514",
        ),
        ("select outbox.consume_once('c', 'no id')", "22P02"),
    ] {
        assert_eq!(Refused::of(client.simple_query(sql)).code, code, "{sql}");
    }
    assert_eq!(noted(&pg), 0);
}

/// Entries have the id as text, and many drivers say that it is one. Whatever they say, Postgres finds one function.
#[test]
fn an_id_may_be_typed_as_text_and_no_call_is_ambiguous() {
    let pg = start();
    pg.exec("create role billing login; select outbox.grant_consumer('billing')");
    let mut client = pg.client_as("billing", "postgres");
    let id = Uuid::new_v4();
    for consumer in ["'c'", "'c'::text", "'c'::varchar", "'c'::char(1)", "'c'::name"] {
        for cast in ["::uuid", "::text", "::varchar", "::varchar(36)", "::char(36)"] {
            let mut transaction = client.transaction().unwrap();
            let call = format!("select outbox.consume_once({consumer}, '{id}'{cast})");
            for expected in [true, false] {
                let row = transaction
                    .query_one(&call, &[])
                    .unwrap_or_else(|error| panic!("{call}: {error:?}"));
                assert_eq!(row.get::<_, bool>(0), expected, "{call}");
            }
            transaction.rollback().unwrap();
        }
        // No name becomes a bpchar.
        if consumer == "'c'::name" {
            continue;
        }
        for ids in ["array[]::uuid[]", "array[]::text[]", "array[]::varchar[]"] {
            let call = format!("select outbox.consume_once({consumer}, {ids})");
            assert_eq!(client.query(&call, &[]).unwrap().len(), 0, "{call}");
        }
    }
    for consumer in ["'c'", "$2", "'c'::text", "'c'::varchar", "'c'::name"] {
        for named in ["{}, {}", "consumer => {}, event_id => {}"] {
            let mut values = [consumer, "$1"].into_iter();
            let arguments: String = named
                .split("{}")
                .flat_map(|part| [part, values.next().unwrap_or("")])
                .collect();
            let call = format!("select outbox.consume_once({arguments})");
            let statement = client
                .prepare(&call)
                .unwrap_or_else(|error| panic!("{call}: {error:?}"));
            assert_eq!(statement.params()[0], postgres::types::Type::UUID, "{call}");
        }
    }
    for cast in ["", "::text", "::varchar"] {
        let sql = format!("select outbox.consume_once('c', 'no id'{cast})");
        assert_eq!(Refused::of(client.simple_query(&sql)).code, "22P02", "{sql}");
    }
    assert_eq!(
        Refused::of(client.simple_query("select outbox.consume_once('c', null::text)")).code,
        "22004"
    );
}

#[test]
fn a_role_with_the_grant_consumes_and_reads_nothing() {
    let pg = start();
    pg.exec(
        "create role billing login; create role shipping login; create role intern login in role billing; \
         select outbox.grant_consumer('billing', '{billing,billing_*}'); select outbox.grant_consumer('shipping')",
    );
    let id = Uuid::new_v4();
    let mut billing = pg.client_as("billing", "postgres");
    let mut shipping = pg.client_as("shipping", "postgres");
    assert!(once(&mut billing, "billing", id).unwrap());
    assert!(once(&mut billing, "billing_eu", id).unwrap());
    assert!(!once(&mut pg.client_as("intern", "postgres"), "billing", id).unwrap());
    assert_eq!(many(&mut billing, "billing", &[id]).unwrap(), Vec::<Uuid>::new());
    assert!(once(&mut shipping, "shipping", id).unwrap());
    // No role can find out what a consumer of another name has handled, or record events for it. In a pattern, _ is an
    // ordinary character.
    for (client, consumer) in [
        (&mut billing, "shipping"),
        (&mut pg.client_as("billing", "postgres"), "billingXeu"),
    ] {
        for known in [id, Uuid::new_v4()] {
            let said = Refused::of(once(client, consumer, known));
            assert_eq!(said.code, "42501");
            assert_eq!(said.message, format!("permission denied for consumer \"{consumer}\""));
            assert!(said.hint.unwrap().contains("outbox.grant_consumer"));
        }
        let said = Refused::of(client.execute(
            "insert into outbox.inbox (consumer, event_id) values ($1, $2) on conflict do nothing",
            &[&consumer, &id],
        ));
        assert_eq!(said.code, "42501");
    }
    for sql in [
        "select * from outbox.inbox",
        "select event_id from outbox.inbox",
        "insert into outbox.inbox (consumer, event_id) values ('billing', gen_random_uuid()) returning event_id",
        "insert into outbox.inbox values ('billing', gen_random_uuid(), 'infinity')",
        "update outbox.inbox set consumer = 'x'",
        "delete from outbox.inbox",
        "insert into outbox.consumer_grants values ('billing', '*')",
        "select outbox.grant_consumer('billing')",
        "select outbox.publish_event('t', 's')",
    ] {
        assert_eq!(Refused::of(billing.simple_query(sql)).code, "42501", "{sql}");
    }
    // The last grant counts.
    pg.exec("select outbox.grant_consumer('shipping', '{other}')");
    assert_eq!(Refused::of(once(&mut shipping, "shipping", id)).code, "42501");
    pg.exec("select outbox.revoke_consumer('shipping')");
    let said = Refused::of(once(&mut shipping, "other", id));
    assert_eq!(
        (said.code.as_str(), said.message.as_str()),
        ("42501", "permission denied for schema outbox")
    );
    // A role that may also publish keeps that right.
    pg.exec("select outbox.grant_publisher('billing'); select outbox.revoke_consumer('billing')");
    billing.batch_execute("select outbox.publish_event('t', 's')").unwrap();
    assert_eq!(Refused::of(once(&mut billing, "billing", id)).code, "42501");
    assert_eq!(pg.one::<i64>("select count(*) from outbox.consumer_grants"), 0);
}

/// A consumer's database needs no relay: the library may not even be preloaded.
#[test]
fn the_inbox_works_and_is_purged_without_a_worker() {
    let pg = Postgres::with(&[("shared_preload_libraries", "")]).start();
    pg.extension();
    let mut client = pg.client();
    let (old, new) = (Uuid::new_v4(), Uuid::new_v4());
    assert!(once(&mut client, "c", old).unwrap());
    assert!(once(&mut client, "c", new).unwrap());
    assert!(!once(&mut client, "c", old).unwrap());
    pg.exec(&format!(
        "update outbox.inbox set consumed_at = now() - interval '8 days' where event_id = '{old}'"
    ));
    let late: String = pg.one("select detail from outbox.health() where \"check\" = 'inbox' and status = 'warn'");
    assert!(late.contains("outbox_relay.inbox_retention (7 days)"), "{late}");
    pg.exec("call outbox.purge()");
    assert!(!once(&mut client, "c", new).unwrap());
    assert!(once(&mut client, "c", old).unwrap());
    assert_eq!(noted(&pg), 2);
}

#[test]
fn the_worker_purges_consumed_events_older_than_their_retention() {
    let pg = Postgres::with(&[("outbox_relay.inbox_retention", "1d")]).start();
    pg.extension();
    pg.wait_worker("postgres");
    pg.exec(
        "insert into outbox.inbox (consumer, event_id, consumed_at) \
         select 'c', gen_random_uuid(), now() - interval '2 days' from generate_series(1, 1000); \
         insert into outbox.inbox (consumer, event_id, consumed_at) \
         select 'c', gen_random_uuid(), now() - interval '23 hours' from generate_series(1, 10)",
    );
    pg.reload();
    wait_eq("entries", 10, || noted(&pg));
    pg.set("outbox_relay.inbox_retention", "-1");
    pg.exec("update outbox.inbox set consumed_at = '-infinity'");
    holds_for(Duration::from_millis(300), "all are kept", || noted(&pg) == 10);
    pg.exec("call outbox.purge()");
    assert_eq!(noted(&pg), 10);
}

/// Otherwise a consumer that is restored from a dump, with its data, would handle again the events that this data
/// contains.
#[test]
fn a_dump_brings_the_inbox_and_its_grants() {
    let pg = start();
    let id = Uuid::new_v4();
    pg.exec("create database restored");
    pg.exec("create role billing login; select outbox.grant_consumer('billing', '{billing}')");
    once(&mut pg.client(), "billing", id).unwrap();
    pg.restore("restored", &pg.pg_dump("postgres"));
    let mut billing = pg.client_as("billing", "restored");
    assert!(!once(&mut billing, "billing", id).unwrap());
    assert!(once(&mut billing, "billing", Uuid::new_v4()).unwrap());
    assert_eq!(Refused::of(once(&mut billing, "shipping", id)).code, "42501");
}
