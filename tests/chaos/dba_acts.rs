//! Acts on the relay's tables, indexes and sequence, beside everything else.

use std::process::Command;
use std::time::{Duration, Instant};

use kit::postgres::{DB, USER};
use postgres::Error;

use crate::acts::{Act, Change, Ending, Identity, Index, LockMode, Rows, Tables};
use crate::dba::Dba;

type Outcome = Result<(), String>;

/// Everything is healthy again when this returns. `Err`: an obstacle lasted for too long.
pub(crate) fn perform(dba: &Dba, act: Act) -> Outcome {
    match act {
        Act::SwapIndex(index) => swap(dba, index),
        Act::Reindex(index) => dba.run(&[&format!("reindex index concurrently outbox.{}", index.name())]),
        Act::WithoutIndex(index, time) => without(dba, index, time),
        Act::Repack => repack(dba),
        Act::VacuumFull => dba.run(&["vacuum full outbox.events"]),
        Act::Cluster => dba.run(&["cluster outbox.events using events_xid_idx"]),
        Act::LogTrigger(time) => log_trigger(dba, time),
        Act::Truncate(identity) => truncate(dba, identity),
        Act::Sequence(change, ending, time) => sequence(dba, change, ending, time),
        Act::LockTables(tables, mode, time) => lock_tables(dba, tables, mode, time),
        Act::LockRows(rows, time) => lock(dba, lock_of(rows), time),
        Act::PauseAll(..) | Act::Stop(..) | Act::CopyDatabase(..) | Act::CloneServer(..) => {
            unreachable!("{act:?} is not done beside everything else")
        }
    }
}

/// Repairs what an interrupted act may have left behind. Also the last thing that the DBA does.
pub(crate) fn mend(dba: &Dba) -> Outcome {
    for index in [Index::PrimaryKey, Index::EventId, Index::Xid] {
        ensure(dba, index)?;
    }
    end_log(dba)?;
    mend_sequence(dba)
}

// --- indexes

impl Index {
    fn name(self) -> &'static str {
        match self {
            Index::PrimaryKey => "events_pkey",
            Index::EventId => "events_event_id_idx",
            Index::Xid => "events_xid_idx",
        }
    }

    /// `CREATE ... CONCURRENTLY` of an index that can take this one's place.
    fn create(self, name: &str) -> String {
        let (unique, columns) = match self {
            Index::PrimaryKey => ("unique ", "seq"),
            Index::EventId => ("unique ", "event_id, branch"),
            Index::Xid => ("", "xid, seq"),
        };
        format!("create {unique}index concurrently {name} on outbox.events ({columns})")
    }

    fn drop(self) -> String {
        match self {
            Index::PrimaryKey => "alter table outbox.events drop constraint if exists events_pkey".to_string(),
            _ => format!("drop index if exists outbox.{}", self.name()),
        }
    }

    /// Gives the new index the place of the dropped one.
    fn put(self, name: &str) -> String {
        match self {
            // A constraint that uses the index renames it as well.
            Index::PrimaryKey => {
                format!("alter table outbox.events add constraint events_pkey primary key using index {name}")
            }
            _ => format!("alter index outbox.{name} rename to {}", self.name()),
        }
    }
}

const SECOND: &str = "events_second_idx";

fn second(dba: &Dba, index: Index) -> Outcome {
    let create = index.create(SECOND);
    dba.until_done(&create, |client| {
        // An interrupted `CREATE INDEX CONCURRENTLY` leaves an invalid index behind.
        client.batch_execute(&format!("drop index if exists outbox.{SECOND}"))?;
        client.batch_execute(&create)
    })
}

fn swap(dba: &Dba, index: Index) -> Outcome {
    second(dba, index)?;
    if matches!(index, Index::PrimaryKey) {
        let swap = format!(
            "alter table outbox.events drop constraint events_pkey, add constraint events_pkey primary key using index {SECOND}"
        );
        // It may also be done although the server went away before it could answer.
        dba.until_done(&swap, |client| {
            if exists(client, SECOND)? {
                client.batch_execute(&swap)?;
            }
            Ok(())
        })?;
    } else {
        dba.run(&[&format!("drop index concurrently if exists outbox.{}", index.name())])?;
    }
    ensure(dba, index)
}

fn without(dba: &Dba, index: Index, time: Duration) -> Outcome {
    dba.run(&[&index.drop()])?;
    std::thread::sleep(time);
    ensure(dba, index)
}

/// Creates the index if it does not exist.
fn ensure(dba: &Dba, index: Index) -> Outcome {
    let have = |name| dba.until_done("look for an index", |client| exists(client, name));
    while !have(index.name())? {
        if !have(SECOND)? {
            second(dba, index)?;
        }
        let put = index.put(SECOND);
        dba.until_done(&put, |client| {
            if exists(client, SECOND)? {
                client.batch_execute(&put)?;
            }
            Ok(())
        })?;
    }
    dba.run(&[&format!("drop index if exists outbox.{SECOND}")])
}

fn exists(client: &mut postgres::Client, index: &str) -> Result<bool, Error> {
    let row = client.query_one(
        "select exists (select from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid \
             where i.indrelid = 'outbox.events'::pg_catalog.regclass and c.relname = $1 and i.indisvalid)",
        &[&index],
    )?;
    Ok(row.get(0))
}

// --- rewriting the table

/// Runs pg_repack where it is installed; otherwise does what pg_repack does to a table, without its log.
fn repack(dba: &Dba) -> Outcome {
    let have = "select exists (select from pg_catalog.pg_available_extensions where name = 'pg_repack')";
    let have = dba
        .until_done(have, |client| client.query_one(have, &[]))?
        .get::<_, bool>(0);
    let program = dba.programs.join("pg_repack");
    if !have || !program.exists() {
        return dba.run(&["vacuum full outbox.events"]);
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // This is how the triggers and logs of an interrupted run are removed.
        dba.run(&[
            "drop extension if exists pg_repack cascade",
            "create extension pg_repack",
        ])?;
        let output = Command::new(&program)
            .args([
                "--table",
                "outbox.events",
                "--wait-timeout",
                "5",
                "--no-superuser-check",
            ])
            .args(["--username", USER, "--dbname", DB, "--host"])
            .arg(&dba.host)
            .output()
            .map_err(|error| format!("cannot run pg_repack: {error}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        // An interrupted REINDEX CONCURRENTLY leaves an invalid index, which pg_repack does not copy.
        let warns = |line: &str| line.contains("WARNING") && !line.contains("skipping invalid index");
        if output.status.success() && !said.lines().any(warns) {
            return dba.run(&["drop extension if exists pg_repack cascade"]);
        }
        if Instant::now() >= deadline {
            return Err(format!("pg_repack: {said}"));
        }
    }
}

/// As a tool does that copies a table under load: its log must have every row that is inserted from now on.
fn log_trigger(dba: &Dba, time: Duration) -> Outcome {
    dba.until_done("create a log trigger", |client| {
        client.batch_execute(
            "begin; \
             lock table outbox.events in share row exclusive mode; \
             drop trigger if exists chaos_log on outbox.events; \
             create trigger chaos_log after insert on outbox.events for each row execute function chaos.log_event(); \
             alter table outbox.events enable always trigger chaos_log; \
             delete from chaos.event_log; delete from chaos.before_log; \
             insert into chaos.before_log select event_id, seq from outbox.events; \
             commit",
        )
    })?;
    std::thread::sleep(time);
    end_log(dba)
}

/// Compares the log with the rows that were inserted since, and removes the log.
fn end_log(dba: &Dba) -> Outcome {
    dba.until_done("end a log trigger", |client| {
        let row = client.query_one(
            "select exists (select from pg_catalog.pg_trigger \
                 where tgrelid = 'outbox.events'::pg_catalog.regclass and tgname = 'chaos_log')",
            &[],
        )?;
        if row.get(0) {
            client.batch_execute(
                "begin; \
                 lock table outbox.events in access exclusive mode; \
                 insert into chaos.unlogged \
                     select e.event_id, e.seq, (select l.line from chaos.event_log l where l.event_id = e.event_id limit 1) \
                     from outbox.events e \
                     where not exists (select from chaos.before_log b where b.event_id = e.event_id and b.seq = e.seq) \
                         and not exists (select from chaos.event_log l where l.event_id = e.event_id and l.line = e::text); \
                 drop trigger chaos_log on outbox.events; \
                 commit",
            )?;
        }
        Ok(())
    })
}

/// Events that TRUNCATE removes before a cursor has passed them may have been sent or not; and so may events that were
/// sent, if Redis loses them.
fn truncate(dba: &Dba, identity: Identity) -> Outcome {
    let identity = match identity {
        Identity::Restart => "restart identity",
        Identity::Continue => "continue identity",
    };
    dba.until_done("truncate the events", |client| {
        client.batch_execute(&format!(
            "begin; \
             lock table outbox.events in access exclusive mode; \
             insert into chaos.truncated \
                 select e.event_id, e.stream, exists (select from outbox.cursors c \
                     where c.backend_number = e.backend_number and outbox.is_delivered(c, e.xid, e.seq)) \
                 from outbox.events e on conflict do nothing; \
             truncate outbox.events {identity}; \
             commit"
        ))
    })
}

// --- the sequence

const SEQUENCE: &str = "outbox.events_seq_seq";

fn sequence(dba: &Dba, change: Change, ending: Ending, time: Duration) -> Outcome {
    let set = |value: &str| format!("select pg_catalog.setval('{SEQUENCE}', {value}) from {SEQUENCE}");
    let alter = |what: &str| format!("alter sequence {SEQUENCE} {what}");
    let last: i64 = dba
        .until_done("look at the sequence", |client| {
            client.query_one(&format!("select last_value from {SEQUENCE}"), &[])
        })?
        .get(0);
    let statement = match change {
        Change::SetOne => set("1"),
        Change::SetHalf => set("greatest(last_value / 2, 1)"),
        Change::SetAhead | Change::AheadAndBack => set("last_value + 1000000"),
        Change::Restart => alter("restart"),
        Change::Cache => alter("cache 50"),
        Change::Increment => alter("increment by 7"),
        Change::Decrement => alter("increment by -1"),
        Change::Cycle => alter("cycle"),
        Change::MaxValue => alter(&format!("maxvalue {}", last + 50)),
        Change::Type => alter("as integer"),
        Change::NoOwner => alter("owned by none"),
    };
    let ending = match ending {
        Ending::Commit => "commit",
        Ending::Rollback => "rollback",
    };
    // Meanwhile a few numbers beyond the last value may have been drawn; then the change is refused, which loses
    // nothing.
    if let Err(error) = dba.try_once(&format!("begin; {statement}; {ending}")) {
        eprintln!("{statement}: {error}");
    }
    std::thread::sleep(time);
    if matches!(change, Change::AheadAndBack) {
        // Nobody has drawn a number between the two statements.
        dba.run(&[&set(&(last + 10_000).to_string())])?;
        std::thread::sleep(time);
    }
    mend_sequence(dba)
}

/// Sets it as it was created, above all numbers that are in use.
fn mend_sequence(dba: &Dba) -> Outcome {
    dba.until_done("mend the sequence", |client| {
        client.batch_execute(&format!(
            "begin; \
             lock table outbox.events in share row exclusive mode; \
             alter sequence {SEQUENCE} as bigint increment by 1 no minvalue no maxvalue no cycle cache 1 owned by outbox.events.seq; \
             select pg_catalog.setval('{SEQUENCE}', e.most) from {SEQUENCE} s, (select max(seq) as most from outbox.events) e \
                 where s.last_value < e.most; \
             commit"
        ))
    })
}

// --- locks

impl LockMode {
    fn words(self) -> &'static str {
        match self {
            LockMode::Share => "share",
            LockMode::ShareRowExclusive => "share row exclusive",
            LockMode::AccessExclusive => "access exclusive",
        }
    }
}

fn lock_tables(dba: &Dba, tables: Tables, mode: LockMode, time: Duration) -> Outcome {
    let rows = dba.until_done("look for our tables", |client| {
        client.query(
            "select c.oid::pg_catalog.regclass::text from pg_catalog.pg_class c \
             where c.relnamespace = 'outbox'::pg_catalog.regnamespace and c.relkind = 'r' order by c.relname",
            &[],
        )
    })?;
    let names: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    let names = match tables {
        Tables::One(number) => names[usize::try_from(number).expect("a small number") % names.len()].to_string(),
        Tables::All => names.join(", "),
    };
    lock(dba, &format!("lock table {names} in {} mode", mode.words()), time)
}

fn lock_of(rows: Rows) -> &'static str {
    match rows {
        Rows::Cursors => "select from outbox.cursors for update",
        Rows::FailedEvents => "select from outbox.failed_events for update",
        Rows::Backends => "select from outbox.backends for update",
        Rows::OldEvents => "delete from outbox.events where seq < (select max(seq) / 2 from outbox.events)",
        Rows::All => {
            "select from outbox.cursors for update; select from outbox.failed_events for update; \
             delete from outbox.events where seq < (select max(seq) / 2 from outbox.events)"
        }
    }
}

/// Holds the lock for this time, and rolls back.
fn lock(dba: &Dba, statement: &str, time: Duration) -> Outcome {
    let mut client = dba.until_done(statement, |_| {
        let mut client = dba.connect(DB)?;
        client.batch_execute(&format!("begin; {statement}"))?;
        Ok(client)
    })?;
    std::thread::sleep(time);
    // The session may have been terminated.
    let _ = client.batch_execute("rollback");
    Ok(())
}
