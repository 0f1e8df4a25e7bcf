//! What an application without the extension would write to: a table with the columns, defaults and indexes of
//! `outbox.events`.

use kit::{Postgres, Stack};

pub(crate) const TABLE: &str = "create table bare (like outbox.events including indexes);
    create sequence bare_seq;
    alter table bare alter xid set default pg_current_xact_id(), alter seq set default nextval('bare_seq'),
       alter created_at set default clock_timestamp(), alter event_id set default gen_random_uuid(),
       alter backend set default 'default', alter backend_number set default 1, alter branch set default 0";

/// A payload of 200 bytes.
pub(crate) fn data(n: usize) -> String {
    format!(r#"{{"n": {}, "pad": "{}"}}"#, 1_000_000 + n, "x".repeat(174))
}

pub(crate) fn publish_sql() -> String {
    format!(
        "select outbox.publish_event('bench.publish', 'bench', '{}');\n",
        data(1)
    )
}

pub(crate) fn insert_sql() -> String {
    format!(
        "insert into bare (event_type, source, data) values ('bench.publish', 'bench', '{}');\n",
        data(1)
    )
}

/// The result of a run of pgbench.
pub(crate) struct Ran {
    pub tps: f64,
    pub transactions: u64,
}

/// Runs a script of one prepared statement, with this many clients, for this long.
pub(crate) fn pgbench(pg: &Postgres, script: &str, clients: u32, durable: bool, seconds: u32) -> Ran {
    let commit = if durable { "on" } else { "off" };
    pg.exec(&format!("alter database postgres set synchronous_commit to {commit}"));
    let (clients, seconds) = (clients.to_string(), seconds.to_string());
    #[rustfmt::skip]
    let arguments = [
        "-n", "-M", "prepared", "-c", &clients, "-j", "2", "-T", &seconds, "-f", "/dev/stdin", "postgres",
    ];
    let ran = pg.run("pgbench", &arguments, script);
    assert!(ran.ok, "pgbench failed: {}", ran.stderr);
    let number = |label: &str| {
        let line = ran.stdout.lines().find_map(|l| l.strip_prefix(label))?;
        line.split([' ', '/']).find_map(|word| word.parse::<f64>().ok())
    };
    Ran {
        tps: number("tps = ").expect("no tps in what pgbench printed"),
        transactions: number("number of transactions actually processed: ").expect("no transactions either") as u64,
    }
}

/// Both tables as at the start, after a checkpoint.
pub(crate) fn empty(stack: &Stack) {
    stack
        .pg
        .exec("truncate outbox.events cascade; truncate bare; checkpoint");
}
