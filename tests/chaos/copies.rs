//! Acts that must be alone: the server is stopped for a while, its database is copied, or a clone of the server is
//! started beside it. Events published in a copy are only in the copy's ledger, so the verdict calls them phantoms
//! wherever they turn up in the original's streams.

use std::time::{Duration, Instant};

use kit::postgres::DB;
use kit::{Mode, Postgres};
use postgres::{Client, Error};

use crate::acts::{CopyLife, Original, Return};
use crate::dba::Dba;
use crate::load::Gate;
use crate::postgres_faults::{sql, with_client};
use crate::site::{BACKENDS, Backend, Site};

type Outcome = Result<(), String>;

/// A database that no publisher uses.
const ELSEWHERE: &str = "template1";
const COPY: &str = "copy";

/// The server is stopped, and comes back after this time.
pub(crate) fn stop(site: &mut Site, gate: &Gate, mode: Mode, time: Duration) -> Outcome {
    settle(site);
    if mode == Mode::Smart {
        // A smart stop waits until all clients have left.
        gate.close();
        empty(&Dba::of(&site.pg))?;
    }
    site.pg.stop(mode);
    std::thread::sleep(time);
    site.pg.start_again();
    gate.open();
    Ok(())
}

pub(crate) fn copy_database(site: &Site, gate: &Gate, life: CopyLife, time: Duration) -> Outcome {
    settle(site);
    let dba = Dba::of(&site.pg);
    gate.close();
    let copied = empty(&dba).and_then(|()| {
        let create = format!("create database {COPY} template {DB}");
        dba.until_done_in(ELSEWHERE, &create, |client| {
            client.batch_execute(&format!("drop database if exists {COPY}"))?;
            client.batch_execute(&create)
        })
    });
    gate.open();
    copied?;
    let lived = live(site, &dba, life, time);
    remove_copy(&dba)?;
    lived
}

/// Also removes a copy that an interrupted run has left behind.
pub(crate) fn remove_copy(dba: &Dba) -> Outcome {
    let drop = format!("drop database if exists {COPY}");
    dba.until_done_in(ELSEWHERE, &drop, |client| client.batch_execute(&drop))
}

/// Waits until the database has no client session and no prepared transaction.
fn empty(dba: &Dba) -> Outcome {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let row = dba.until_done_in(ELSEWHERE, "look for sessions", |client| {
            client.query_one(
                "select (select count(*) from pg_catalog.pg_stat_activity where datname = $1 and backend_type = 'client backend'), \
                     (select count(*) from pg_catalog.pg_prepared_xacts)",
                &[&DB],
            )
        })?;
        let (sessions, prepared): (i64, i64) = (row.get(0), row.get(1));
        if (sessions, prepared) == (0, 0) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(format!("{sessions} sessions and {prepared} prepared transactions stay"));
        }
        if sessions == 0 {
            dba.until_done("end prepared transactions", |client| end_prepared(client, "commit"))?;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn end_prepared(client: &mut Client, end: &str) -> Result<(), Error> {
    let rows = client.query(
        "select gid from pg_catalog.pg_prepared_xacts where database = pg_catalog.current_database()",
        &[],
    )?;
    rows.iter()
        .try_for_each(|row| client.batch_execute(&format!("{end} prepared '{}'", row.get::<_, &str>(0))))
}

/// Publishes in the copy, and checks that the events are sent or not, as the copy's life says.
fn live(site: &Site, dba: &Dba, life: CopyLife, time: Duration) -> Outcome {
    dba.until_done_in(COPY, "publish in the copy", publish)?;
    if matches!(life, CopyLife::Silent) {
        std::thread::sleep(time);
        return Ok(());
    }
    // A Redis that has lost its last writes may have an earlier copy's streams again.
    delete_streams(site);
    dba.until_done_in(COPY, "take over in the copy", |client| {
        with_one_stream().try_for_each(|(backend, stream)| {
            client.batch_execute(&format!(
                "update outbox.backends set stream_name = '{0}' where name = '{1}'; select outbox.take_over('{1}')",
                copied(stream),
                backend.name
            ))
        })
    })?;
    std::thread::sleep(time);
    let arrived = with_one_stream()
        .try_for_each(|(backend, stream)| wait_sent(site, dba, backend.name, backend.store, &copied(stream)));
    delete_streams(site);
    arrived
}

fn delete_streams(site: &Site) {
    for (backend, stream) in with_one_stream() {
        site.stores[backend.store].primary().call(&["DEL", &copied(stream)]);
    }
}

/// The backends with one stream. What a copy publishes is sent nowhere before its backends have streams of their own,
/// and a template's stream is stored with each event.
fn with_one_stream() -> impl Iterator<Item = (&'static Backend, &'static str)> {
    BACKENDS
        .iter()
        .filter_map(|backend| Some((backend, backend.own_stream()?)))
}

fn copied(stream: &str) -> String {
    format!("{stream}-of-the-copy")
}

/// Waits until the streams hold what was published in the copy, and nothing that was pending when the copy was made.
fn wait_sent(site: &Site, dba: &Dba, backend: &str, store: usize, stream: &str) -> Outcome {
    let rows = dba.until_done_in(COPY, "read the copy's ledger", |client| {
        client.query(
            "select event_id::text from chaos.ledger where session = $1 and backend = $2 order by seq",
            &[&PUBLISHER, &backend],
        )
    })?;
    let expected: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let entries = site.stores[store].primary().entries(stream);
        let found: Vec<&str> = entries.iter().filter_map(|entry| entry.get("event_id")).collect();
        if found == expected {
            return Ok(());
        }
        if Instant::now() >= deadline || found.len() > expected.len() {
            return Err(format!(
                "{stream} should have {expected:?} after the take-over in the copy; it has {found:?}"
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

const PUBLISHER: &str = "copy";

/// Publishes a few events for each backend, to its own stream. Nobody else is connected to the copy.
fn publish(client: &mut Client) -> Result<(), Error> {
    client.batch_execute("begin")?;
    for (backend, _) in with_one_stream() {
        client.execute(
            "select chaos.publish($1, 1, false, 'k0', 3, $2, null, 'call', 0, null)",
            &[&PUBLISHER, &backend.name],
        )?;
    }
    client.batch_execute("commit")
}

/// Waits until no process of the relay is frozen or about to be killed, so that what follows finds a server that
/// answers.
fn settle(site: &Site) {
    if site.faults {
        site.pg.release();
    }
    std::thread::sleep(Duration::from_millis(200));
    with_client(site, "settle", |client| client.batch_execute("select"));
}

/// A server with the same history and the same settings, beside this one.
pub(crate) fn clone_server(site: &mut Site, original: Original, time: Duration) -> Outcome {
    settle(site);
    let clone = match original {
        Original::StoppedBefore(_) => {
            site.pg.stop(Mode::Fast);
            let clone = Postgres::copy_of(site.pg.data_dir());
            if site.faults { clone.faults() } else { clone }
        }
        _ => site.pg.base_backup(),
    };
    let mut clone = clone.stopped();
    clone.forget_points();
    match original {
        Original::Runs | Original::StoppedBefore(_) => {}
        Original::Paused => enable_all(site, false),
        Original::Stopped(mode, _) => drop(site.pg.stop(mode)),
    }
    clone.start_again();
    let published = publish_in_clone(&clone);
    std::thread::sleep(time);
    match original {
        Original::Runs => {}
        Original::Paused => enable_all(site, true),
        Original::Stopped(_, back) | Original::StoppedBefore(back) => {
            if back == Return::BesideTheClone {
                site.pg.start_again();
                std::thread::sleep(time / 2);
                drop(clone);
            } else {
                drop(clone);
                site.pg.start_again();
            }
        }
    }
    published
}

fn publish_in_clone(clone: &Postgres) -> Outcome {
    let dba = Dba::of(clone);
    dba.until_done("end the prepared transactions of the clone", |client| {
        end_prepared(client, "rollback")
    })?;
    dba.until_done("publish in the clone", publish)
}

pub(crate) fn enable_all(site: &Site, enabled: bool) {
    sql(
        site,
        &format!("update outbox.backends set enabled = {enabled} where enabled <> {enabled}"),
    );
}
