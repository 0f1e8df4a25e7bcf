//! Finds triggers of ours that somebody has switched off, as `pg_restore --disable-triggers` does, and the rows that
//! came meanwhile. Such rows carry transaction ids of another cluster: they would be sent when this cluster reaches
//! these ids, or never.

use crate::tables::found_row::FoundRow;
use crate::tables::sql::{query, query_value, run, run_named};
use crate::tables::tick_columns::{COLUMNS, SELECTED, VALUES, tick_of, tick_parameters};
use crate::tables::trusted;
use pgrx::pg_sys;
use relay::reading::foreign::{Judge, Written, latest};
use relay::reading::snapshot::Tick;

/// The state of our triggers, and the last state of `outbox.events`'s trigger in which all rows had passed through it.
pub(crate) struct TriggerLook {
    pub broken: Vec<BrokenTrigger>,
    /// The state of the trigger, and the table's file.
    pub triggers: Option<String>,
    pub filenode: Option<pg_sys::Oid>,
    pub known_triggers: Option<String>,
    pub known_filenode: Option<pg_sys::Oid>,
    pub known: Tick,
    /// Whether a row carries the id of a future transaction.
    has_future_xid: bool,
    /// The transaction that last changed the trigger. 0: unknown.
    pub touched_by: u64,
}

/// A trigger of ours that is missing, or not enabled as it should be.
#[derive(Clone)]
pub(crate) struct BrokenTrigger {
    pub table: String,
    pub name: String,
    /// A description of what is wrong.
    pub found: String,
    /// Whether it was switched off, as `pg_restore --disable-triggers` does temporarily.
    pub is_disabled: bool,
}

impl BrokenTrigger {
    /// From a row of `outbox.broken_triggers()`.
    fn of(row: &FoundRow<'_>) -> Self {
        let found = row.text("found").unwrap_or_default();
        Self {
            table: row.text("relation").unwrap_or_default(),
            name: row.text("name").unwrap_or_default(),
            is_disabled: found == "disabled",
            found,
        }
    }
}

impl TriggerLook {
    /// Whether rows may have come without the trigger since.
    pub(crate) fn is_touched(&self) -> bool {
        self.triggers != self.known_triggers || self.has_future_xid
    }

    /// Whether the table was rewritten since.
    pub(crate) fn is_rewritten(&self) -> bool {
        self.filenode != self.known_filenode
    }
}

/// The state of the trigger of `outbox.events`, as a text that differs after every change of the trigger.
pub(crate) fn trigger_state() -> Option<String> {
    query_value("select triggers from outbox.trigger_state()", &[])
}

/// Examines our triggers, in a transaction.
pub(crate) fn look() -> Option<TriggerLook> {
    let broken = query(
        "select relation, name, found from outbox.broken_triggers()",
        &[],
        BrokenTrigger::of,
    );
    let has_future_xid = has_future_xid();
    query(
        &format!(
            "select s.triggers, s.filenode, t.triggers as known_triggers, t.filenode as known_filenode, {SELECTED}
            from outbox.trigger_state() s, outbox.known_triggers t"
        ),
        &[],
        |row| {
            Some(TriggerLook {
                broken: broken.clone(),
                triggers: row.value("triggers"),
                filenode: row.value("filenode"),
                known_triggers: row.value("known_triggers"),
                known_filenode: row.value("known_filenode"),
                known: Tick::clone(&*tick_of(row)?),
                has_future_xid,
                touched_by: row.value::<String>("triggers").map_or(0, |state| toucher(&state)),
            })
        },
    )
    .pop()
    .flatten()
}

/// The transaction in a trigger's state, which follows the OID.
fn toucher(state: &str) -> u64 {
    let xmin = state.split(' ').nth(1).and_then(|xmin| xmin.parse().ok());
    // SAFETY: reads the counter under its lock. The transaction that changed the trigger has begun by now.
    let next = unsafe { pg_sys::ReadNextFullTransactionId().value };
    xmin.map_or(0, |xmin| latest(xmin, next))
}

/// Sets a trigger to ENABLE ALWAYS, and creates it if it is missing. Waits a moment for transactions that write to its
/// table, and then raises an ERROR.
pub(crate) fn mend_trigger(table: &str, name: &str) {
    run("select outbox.mend_trigger($1, $2)", &[table.into(), name.into()]);
}

/// Records that as of this tick all rows have passed through the trigger in this state. `None`: the search for other
/// rows has begun, with this tick.
pub(crate) fn note_known(triggers: Option<&str>, filenode: Option<pg_sys::Oid>, tick: &Tick) {
    let state = [("triggers", triggers.into()), ("filenode", filenode.into())];
    run_named(
        &format!(
            "update outbox.known_triggers set triggers = $triggers, filenode = coalesce($filenode, filenode),
                ({COLUMNS}) = row({VALUES})"
        ),
        tick_parameters(tick).into_iter().chain(state),
    );
}

/// The highest number of any row.
pub(crate) fn last_seq() -> i64 {
    query_value("select coalesce(max(seq), 0) from outbox.events", &[]).unwrap_or(0)
}

/// Whether a row carries the id of a future transaction. Reads only the end of an index.
fn has_future_xid() -> bool {
    let highest: Option<String> = query_value("select max(xid)::text from outbox.events", &[]);
    // SAFETY: reads the counter under its lock. All transactions of this cluster that the rows carry have begun by now.
    let next_xid = unsafe { pg_sys::ReadNextFullTransactionId().value };
    highest
        .and_then(|xid| xid.parse::<u64>().ok())
        .is_some_and(|xid| xid >= next_xid)
}

/// Examines `count` rows after `after`, up to `upto`. Returns the last number that it examined; `None`: there are no
/// more rows.
pub(crate) fn look_at_rows(judge: &mut Judge, after: i64, upto: i64, count: i64) -> Option<i64> {
    let piece = query(
        // A row whose payload was erased (outbox.erase) was last written by another transaction. The check reads only a
        // short publisher_config, because one stored out of line may not be readable.
        "with piece as (select seq, xid::text::bigint as xid,
                case when pg_column_size(publisher_config) < 40 and publisher_config::text = outbox.erased_config()::text
                    then xid::xid else xmin end::text::bigint as xmin
            from outbox.events where seq > $1 and seq <= $2 order by seq limit $3)
        select (select max(seq) from piece) as last, array_agg(seq order by seq) as seqs, array_agg(xid order by seq) as xids,
            array_agg(xmin order by seq) as xmins
        from piece where xid <> xmin or xmin in (select p.xmin from piece p where p.xid <> p.xmin)",
        &[after.into(), upto.into(), count.into()],
        |row| {
            let numbers = |column| row.value::<Vec<i64>>(column).unwrap_or_default();
            let others = numbers("xids").into_iter().zip(numbers("xmins"));
            let rows = numbers("seqs").into_iter().zip(others).map(|(seq, (xid, xmin))| Written {
                seq,
                xid: xid as u64,
                xmin: xmin as u32,
            });
            (row.value::<i64>("last"), rows.collect::<Vec<_>>())
        },
    );
    let (last, rows) = piece.into_iter().next()?;
    // SAFETY: reads the counter under its lock; the rows were read before.
    judge.look_at(&rows, unsafe { pg_sys::ReadNextFullTransactionId().value });
    last
}

/// Gives the rows new numbers in their order, and records them as restored, so that recovery looks for them in the
/// streams before they are sent. The backend is found by its number, or by its name if no backend has that number.
pub(crate) fn publish_anew(seqs: &[i64]) -> u64 {
    trusted::moving(|| {
        run(
            "with gone as (
                delete from outbox.events e where e.seq = any($1) returning e.*
            ), placed as (
                select g.*, case when not exists (select from outbox.backends b where b.number = g.backend_number) then
                        (select b.number from outbox.backends b where b.name = g.backend) end as other_number
                from gone g
            ), noted as (
                insert into outbox.restores (backend_number, xid)
                select distinct coalesce(p.other_number, p.backend_number), pg_current_xact_id() from placed p
            )
            insert into outbox.events (xid, seq, created_at, event_id, backend_number, branch, event_type, source, backend, data, subject,
                stream, data_schema, publisher_config, max_retries)
            select pg_current_xact_id(), outbox.draw_seq(), p.created_at, p.event_id, coalesce(p.other_number, p.backend_number),
                p.branch, p.event_type, p.source, p.backend, p.data, p.subject, p.stream, p.data_schema, p.publisher_config, p.max_retries
            from (select * from placed order by seq) p
            returning seq",
            &[seqs.to_vec().into()],
        )
    })
}
