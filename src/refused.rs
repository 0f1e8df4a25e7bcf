//! Events that Redis refused: those that wait, those that failed, and those that were accepted out of their turn. All SQL on
//! `refused_events` and `failed_events` but retention's. Needs a transaction.

use crate::care::{self, Kept};
use crate::outbox::{argument, query, run, text, value, words};
use relay::refusal::Record;

/// Streams of a backend that have refused events waiting, with the attempts of their heads.
pub fn refused_streams(number: i32, own_stream: &str) -> Vec<(String, u32)> {
    query(
        "select distinct on (stream) coalesce(e.stream, $2) as stream, r.attempts
        from outbox.refused_events r join outbox.events e on e.seq = r.seq
        where r.backend_number = $1 and r.accepted_in is null
        order by stream, r.seq",
        &[number.into(), argument(own_stream)],
        |row| {
            (
                text(row, 1).unwrap_or_default(),
                value::<i32>(row, 2).unwrap_or_default() as u32,
            )
        },
    )
}

/// Sequence numbers of the next refused events of a stream, oldest first. Those whose rows somebody deleted are forgotten.
pub fn refused_events(number: i32, stream: &str, own_stream: &str, count: usize) -> Vec<i64> {
    let found = query(
        "select r.seq from outbox.refused_events r join outbox.events e on e.seq = r.seq
        where r.backend_number = $1 and r.accepted_in is null and coalesce(e.stream, $2) = $3
        order by r.seq limit $4",
        &[
            number.into(),
            argument(own_stream),
            argument(stream),
            (count as i64).into(),
        ],
        |row| value(row, 1).unwrap_or_default(),
    );
    if found.is_empty() {
        run(
            "delete from outbox.refused_events r
            where r.backend_number = $1 and not exists (select from outbox.events e where e.seq = r.seq)",
            &[number.into()],
        );
    }
    found
}

/// The highest sequence number of a backend's events that were refused or have failed; 0: there is none.
pub fn highest_written_down(number: i32) -> i64 {
    query(
        "select greatest(
            (select max(seq) from outbox.refused_events where backend_number = $1),
            (select max(seq) from outbox.failed_events where backend_number = $1), 0)",
        &[number.into()],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or(0)
}

/// Whether an event was refused (and waits, or was accepted out of its turn) or has failed.
pub fn is_written_down(seq: i64, event_id: [u8; 16]) -> bool {
    query(
        "select exists (select from outbox.refused_events where seq = $1)
            or exists (select from outbox.failed_events where event_id = $2 and seq = $1)",
        &[seq.into(), pgrx::Uuid::from_bytes(event_id).into()],
        |row| value(row, 1),
    )
    .pop()
    .flatten()
    .unwrap_or(false)
}

/// Which of these events still wait to be tried again.
pub fn still_waiting(seqs: &[i64]) -> Vec<i64> {
    query(
        "select seq from outbox.refused_events where seq = any($1) and accepted_in is null order by seq",
        &[seqs.to_vec().into()],
        |row| value(row, 1).unwrap_or_default(),
    )
}

/// The events of a backend that wait to be tried again, behind `after`, at most `count`.
pub fn waiting(number: i32, after: i64, count: usize) -> Vec<i64> {
    query(
        "select seq from outbox.refused_events where backend_number = $1 and accepted_in is null and seq > $2 order by seq limit $3",
        &[number.into(), after.into(), (count as i64).into()],
        |row| value(row, 1).unwrap_or_default(),
    )
}

/// Redis has lost what came after batch `batch_number`: waiting events that were accepted since wait again, and the clock of retention
/// starts anew.
pub fn heal(number: i32, lane: Option<u16>, own_stream: &str, batch_number: u64) {
    match lane {
        None => run(
            "update outbox.refused_events set accepted_in = null where backend_number = $1 and accepted_in > $2",
            &[number.into(), (batch_number as i64).into()],
        ),
        // Each lane counts its own batches.
        Some(slot) => run(
            "update outbox.refused_events r set accepted_in = null from outbox.events e
            where e.seq = r.seq and r.backend_number = $1 and r.accepted_in > $2
                and outbox.hash_slot(coalesce(e.stream, $3)) = $4",
            &[
                number.into(),
                (batch_number as i64).into(),
                argument(own_stream),
                i32::from(slot).into(),
            ],
        ),
    };
    run(
        "delete from outbox.ticks t where t.backend_number = $1 and t.reached_at > (
            select min(o.reached_at) from outbox.ticks o where o.backend_number = $1)",
        &[number.into()],
    );
}

/// Writes down what became of refused events; returns how many failed. `batch_number`: in which those that had waited were accepted
/// (exactly_once), so that they wait again should Redis lose it.
pub fn record(number: i32, own_stream: &str, records: &[Record], batch_number: Option<u64>) -> u64 {
    let mut failed = 0;
    for record in records {
        match record {
            Record::Park { seq, attempts, error } => {
                run(
                    "insert into outbox.refused_events (seq, backend_number, attempts, last_error) values ($1, $2, $3, $4)
                    on conflict do nothing",
                    &[(*seq).into(), number.into(), (*attempts as i32).into(), words(error)],
                );
            }
            Record::Fail { seq, attempts, error } => failed += fail(&[*seq], *attempts, error),
            Record::Accepted { seq } => match batch_number {
                Some(batch_number) => {
                    run(
                        "update outbox.refused_events set accepted_in = $2 where seq = $1",
                        &[(*seq).into(), (batch_number as i64).into()],
                    );
                }
                None => {
                    run("delete from outbox.refused_events where seq = $1", &[(*seq).into()]);
                }
            },
            Record::RefusedAgain { seq, attempts, error } => {
                run(
                    "update outbox.refused_events set attempts = $2, last_error = $3 where seq = $1",
                    &[(*seq).into(), (*attempts as i32).into(), words(error)],
                );
            }
            Record::FailStream {
                stream,
                seq,
                attempts,
                error,
            } => {
                failed += fail(&[*seq], *attempts, error);
                let behind = refused_events(number, stream, own_stream, i32::MAX as usize);
                failed += fail(&behind, 1, error);
            }
        }
    }
    failed
}

/// Copies events to the failed ones; they no longer wait.
pub fn fail(seqs: &[i64], attempts: u32, error: &str) -> u64 {
    if seqs.is_empty() {
        return 0;
    }
    run(
        "delete from outbox.refused_events where seq = any($1)",
        &[seqs.to_vec().into()],
    );
    match care::is_careful() {
        false => copy_to_failed(seqs, attempts, error, care::ALL),
        true => seqs
            .iter()
            .map(|seq| care::as_much_as_can_be_read(|kept| copy_to_failed(&[*seq], attempts, error, kept)))
            .sum(),
    }
}

fn copy_to_failed(seqs: &[i64], attempts: u32, error: &str, kept: Kept) -> u64 {
    run(
        "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, event_type, source, backend, data,
            subject, stream, data_schema, publisher_config, max_retries, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number,
            case when $4 then e.event_type else '(not readable)' end, case when $4 then e.source else '(not readable)' end,
            case when $4 then e.backend else coalesce((select b.name from outbox.backends b where b.number = e.backend_number), '') end,
            case when $5 then e.data end, case when $4 then e.subject end, case when $4 then e.stream end,
            case when $4 then e.data_schema end, case when $5 then e.publisher_config end, e.max_retries, $2, $3
        from outbox.events e where e.seq = any($1)
        on conflict (event_id, seq) do nothing",
        &[
            seqs.to_vec().into(),
            (attempts as i32).into(),
            words(error),
            kept.texts.into(),
            kept.payload.into(),
        ],
    )
}
