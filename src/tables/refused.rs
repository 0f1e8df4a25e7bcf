//! Events that Redis refused: those that wait, those that failed, and those that were accepted later than their turn.
//! All SQL on `refused_events` and `failed_events` is here, except for retention. Needs a transaction.

use crate::tables::care::{self, Kept};
use crate::tables::found_row::FoundRow;
use crate::tables::sql::{
    Parameter, all_words, argument, arguments, query_column, query_kept, query_named, query_value, run, run_named,
};
use relay::delivery::refusal::Record;
use std::collections::HashMap;
use std::rc::Rc;

/// The streams of a backend in which refused events wait, with the number of attempts of the first event in each. An
/// event that names no stream is in the backend's own.
pub(crate) fn refused_streams(number: i32, own_stream: &str) -> Vec<(String, u32)> {
    query_kept(
        "select distinct on (coalesce(r.stream, $2)) coalesce(r.stream, $2) as stream, r.attempts
        from outbox.refused_events r
        where r.backend_number = $1 and r.accepted_in is null
        order by coalesce(r.stream, $2), r.seq",
        &[number.into(), argument(own_stream)],
        |row| {
            (
                row.text("stream").unwrap_or_default(),
                row.value::<i32>("attempts").unwrap_or_default() as u32,
            )
        },
    )
}

/// Which waiting events of a stream are looked for.
pub(crate) struct StreamSearch {
    pub stream: Rc<str>,
    /// At most so many.
    pub count: usize,
    /// With this number or a higher one.
    pub first: i64,
}

/// Sequence numbers of the next refused events of each of these streams, oldest first.
pub(crate) fn next_waiting(number: i32, own_stream: &str, streams: &[StreamSearch]) -> Vec<Vec<i64>> {
    let mut found = vec![Vec::new(); streams.len()];
    let (own, named): (Vec<_>, Vec<_>) = (0..streams.len()).partition(|index| *streams[*index].stream == *own_stream);
    let counts = |indexes: &[usize]| -> Vec<i32> { indexes.iter().map(|index| streams[*index].count as i32).collect() };
    let firsts = |indexes: &[usize]| -> Vec<i64> { indexes.iter().map(|index| streams[*index].first).collect() };
    let mut note = |indexes: &[usize], rows: Vec<(i64, i64)>| {
        for (nth, seq) in rows {
            found[indexes[nth as usize - 1]].push(seq);
        }
    };
    let read = |row: &FoundRow<'_>| {
        let number = |column| row.value::<i64>(column).unwrap_or_default();
        (number("nth"), number("seq"))
    };
    if !named.is_empty() {
        let names: Vec<&str> = named.iter().map(|index| &*streams[*index].stream).collect();
        let rows = query_named(
            "select s.nth, w.seq
            from unnest($names, $counts, $firsts) with ordinality s(name, count, first, nth) cross join lateral (
                select r.seq from outbox.refused_events r
                where r.backend_number = $number and r.accepted_in is null and r.stream = s.name and r.seq >= s.first
                order by r.seq limit s.count) w
            order by s.nth, w.seq",
            [
                ("number", number.into()),
                ("names", arguments(&names)),
                ("counts", counts(&named).into()),
                ("firsts", firsts(&named).into()),
            ],
            read,
        );
        note(&named, rows);
    }
    if !own.is_empty() {
        let rows = query_named(
            "select 1::bigint as nth, w.seq from unnest($firsts) s(first) cross join lateral (
                (select r.seq from outbox.refused_events r
                    where r.backend_number = $number and r.accepted_in is null and r.stream is null and r.seq >= s.first
                    order by r.seq limit $count)
                union all
                (select r.seq from outbox.refused_events r
                    where r.backend_number = $number and r.accepted_in is null and r.stream = $name and r.seq >= s.first
                    order by r.seq limit $count)
            ) w order by w.seq limit $count",
            [
                ("number", number.into()),
                ("name", argument(own_stream)),
                ("count", counts(&own)[0].into()),
                ("firsts", firsts(&own).into()),
            ],
            read,
        );
        note(&own, rows);
    }
    found
}

/// Deletes these events from the refused ones.
pub(crate) fn forget(seqs: &[i64]) {
    run(
        "delete from outbox.refused_events where seq = any($1)",
        &[seqs.to_vec().into()],
    );
}

/// The highest number among a backend's events that were refused or have failed. 0: there are none.
pub(crate) fn highest_written_down(number: i32) -> i64 {
    highest_written_down_of(vec![number]).get(&number).copied().unwrap_or(0)
}

/// The same of several backends, by their numbers: a look at two indexes for each, since there may be millions of such
/// events.
pub(crate) fn highest_written_down_of(numbers: Vec<i32>) -> HashMap<i32, i64> {
    if numbers.is_empty() {
        return HashMap::new();
    }
    let found = query_kept(
        "select n.number, greatest(
            (select r.seq from outbox.refused_events r where r.backend_number::bigint = n.number order by r.backend_number::bigint desc, r.seq desc limit 1),
            (select f.seq from outbox.failed_events f where f.backend_number = n.number order by f.backend_number desc, f.seq desc limit 1)) as seq
        from unnest($1) n (number)",
        &[numbers.into()],
        |row| (row.value::<i32>("number"), row.value::<i64>("seq")),
    );
    let found = found.into_iter();
    found.filter_map(|(number, seq)| number.zip(seq)).collect()
}

/// Whether an event was refused (and waits, or was accepted out of its turn) or has failed.
pub(crate) fn is_written_down(seq: i64, event_id: [u8; 16]) -> bool {
    query_value(
        "select exists (select from outbox.refused_events where seq = $1)
            or exists (select from outbox.failed_events where event_id = $2 and seq = $1)",
        &[seq.into(), pgrx::Uuid::from_bytes(event_id).into()],
    )
    .unwrap_or(false)
}

/// Of these events, those that still wait to be tried again.
pub(crate) fn still_waiting(seqs: &[i64]) -> Vec<i64> {
    query_column(
        "select seq from outbox.refused_events where seq = any($1) and accepted_in is null order by seq",
        &[seqs.to_vec().into()],
    )
}

/// The events of a backend with numbers above `after` that wait to be tried again, at most `count`.
pub(crate) fn waiting(number: i32, after: i64, count: usize) -> Vec<i64> {
    query_named(
        "select r.seq from outbox.refused_events r
        where r.backend_number = $number and r.accepted_in is null and r.seq > 0 and r.seq > $after order by r.seq limit $count",
        [
            ("number", number.into()),
            ("after", after.into()),
            ("count", (count as i64).into()),
        ],
        |row| row.value("seq").unwrap_or_default(),
    )
}

/// Called when Redis has lost all batches after `batch_number`. Refused events that were accepted in one of them wait
/// again, and their retention starts again.
pub(crate) fn heal(number: i32, lane: Option<u16>, own_stream: &str, batch_number: u64) {
    match lane {
        None => run(
            "update outbox.refused_events set accepted_in = null where backend_number = $1 and accepted_in > $2",
            &[number.into(), (batch_number as i64).into()],
        ),
        // Each lane counts its own batches.
        Some(hash_slot) => run_named(
            "update outbox.refused_events r set accepted_in = null from outbox.events e
            where e.seq = r.seq and r.backend_number = $number and r.accepted_in > $batch_number
                and outbox.hash_slot(coalesce(e.stream, $own_stream)) = $slot",
            [
                ("number", number.into()),
                ("batch_number", (batch_number as i64).into()),
                ("own_stream", argument(own_stream)),
                ("slot", i32::from(hash_slot).into()),
            ],
        ),
    };
    run(
        "delete from outbox.ticks t where t.backend_number = $1 and t.reached_at > (
            select min(o.reached_at) from outbox.ticks o where o.backend_number = $1)",
        &[number.into()],
    );
}

/// Writes down what became of refused events, with one statement for each kind of record. Returns how many failed.
/// There is at most one record for an event. `batch_number`: the batch in which waiting events were accepted
/// (exactly_once); they wait again if Redis loses it. The statements are written so that the planner can only use the
/// indexes: it has no statistics of a table that has just grown, and would read all of it.
pub(crate) fn record(number: i32, records: &[Record], batch_number: Option<u64>) -> u64 {
    let (mut parked, mut failed, mut again, mut accepted) =
        (Notes::default(), Notes::default(), Notes::default(), Vec::new());
    for record in records {
        match record {
            Record::Park { seq, attempts, error } => parked.add(*seq, *attempts, error),
            Record::Fail { seq, attempts, error } => failed.add(*seq, *attempts, error),
            Record::RefusedAgain { seq, attempts, error } => again.add(*seq, *attempts, error),
            Record::Accepted { seq } => accepted.push(*seq),
        }
    }
    if !parked.seqs.is_empty() {
        run_named(
            "insert into outbox.refused_events (seq, backend_number, attempts, last_error, stream)
            select n.seq, $number, n.attempts, ($errors::text[])[n.error], e.stream
            from unnest($seqs, $attempts, $reasons) n(seq, attempts, error)
                cross join lateral (select o.stream from outbox.events o where o.seq = n.seq limit 1) e
            order by n.seq
            on conflict do nothing",
            parked.parameters(number),
        );
    }
    match batch_number {
        _ if accepted.is_empty() => {}
        Some(batch_number) => {
            run(
                "update outbox.refused_events set accepted_in = $2 where seq = any($1)",
                &[accepted.into(), (batch_number as i64).into()],
            );
        }
        None => forget(&accepted),
    }
    if !again.seqs.is_empty() {
        run_named(
            "update outbox.refused_events r set attempts = ($attempts::integer[])[array_position($seqs::bigint[], r.seq)],
                last_error = ($errors::text[])[($reasons::integer[])[array_position($seqs::bigint[], r.seq)]]
            where r.seq = any($seqs::bigint[]) and r.backend_number = $number",
            again.parameters(number),
        );
    }
    fail_all(number, &failed)
}

/// Events with their attempts and reasons, as parameters of a statement. Each different reason is stored once, because
/// there are few.
#[derive(Default)]
struct Notes<'a> {
    seqs: Vec<i64>,
    attempts: Vec<i32>,
    errors: Vec<&'a str>,
    /// For each event, the index of its reason in `errors`, from 1.
    reasons: Vec<i32>,
}

impl<'a> Notes<'a> {
    fn add(&mut self, seq: i64, attempts: u32, error: &'a str) {
        /// A new reason is compared with this many of the latest ones.
        const LOOKED_AT: usize = 8;
        let known = self
            .errors
            .iter()
            .rev()
            .take(LOOKED_AT)
            .position(|known| *known == error);
        if known.is_none() {
            self.errors.push(error);
        }
        self.seqs.push(seq);
        self.attempts.push(attempts as i32);
        self.reasons.push((self.errors.len() - known.unwrap_or(0)) as i32);
    }

    /// The notes of one event.
    fn only(&self, index: usize) -> Self {
        let mut one = Self::default();
        let error = self.errors[self.reasons[index] as usize - 1];
        one.add(self.seqs[index], self.attempts[index] as u32, error);
        one
    }

    /// The parameters: `errors` are all reasons; `reasons` has the index of each event's reason, from 1.
    fn parameters<'b>(&self, number: i32) -> [Parameter<'b>; 5] {
        [
            ("number", number.into()),
            ("seqs", self.seqs.clone().into()),
            ("attempts", self.attempts.clone().into()),
            ("errors", all_words(&self.errors)),
            ("reasons", self.reasons.clone().into()),
        ]
    }
}

/// Copies events to the failed events. They no longer wait.
fn fail_all(number: i32, failed: &Notes<'_>) -> u64 {
    if failed.seqs.is_empty() {
        return 0;
    }
    forget(&failed.seqs);
    match care::is_careful() {
        false => copy_to_failed(failed.parameters(number), care::ALL),
        true => (0..failed.seqs.len())
            .map(|index| {
                care::as_much_as_can_be_read(|kept| copy_to_failed(failed.only(index).parameters(number), kept))
            })
            .sum(),
    }
}

fn copy_to_failed(notes: [Parameter<'_>; 5], kept: Kept) -> u64 {
    let kept = [("texts", kept.texts.into()), ("payload", kept.payload.into())];
    run_named(
        "insert into outbox.failed_events (seq, xid, created_at, event_id, backend_number, branch, event_type, source, backend, data,
            subject, stream, data_schema, publisher_config, max_retries, published_by, attempts, last_error)
        select e.seq, e.xid, e.created_at, e.event_id, e.backend_number, e.branch,
            case when $texts then e.event_type else '(not readable)' end, case when $texts then e.source else '(not readable)' end,
            case when $texts then e.backend else coalesce((select b.name from outbox.backends b where b.number = e.backend_number), '') end,
            case when $payload then e.data end, case when $texts then e.subject end, case when $texts then e.stream end,
            case when $texts then e.data_schema end, case when $payload then e.publisher_config end, e.max_retries, e.published_by,
            n.attempts, ($errors::text[])[n.error]
        from unnest($seqs, $attempts, $reasons) n(seq, attempts, error)
            cross join lateral (select o.* from outbox.events o where o.seq = n.seq limit 1) e
        order by n.seq
        on conflict (event_id, seq) do nothing",
        notes.into_iter().chain(kept),
    )
}

/// Copies events to the failed events, all with one reason. They no longer wait.
pub(crate) fn fail(number: i32, seqs: &[i64], attempts: u32, error: &str) -> u64 {
    let mut failed = Notes::default();
    seqs.iter().for_each(|seq| failed.add(*seq, attempts, error));
    fail_all(number, &failed)
}
