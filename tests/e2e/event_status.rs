//! `outbox.event_status`: one row for each event, found without reading all retained events.

use kit::{Postgres, QUICK, Redis, Stack, wait_eq, wait_until};

/// The definition of the view as a plain query: each event with its status.
const PLAIN: &str = "select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend) as backend,
    coalesce(e.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)) as stream,
    e.created_at, null::timestamptz as scheduled_at,
    case
        when f.seq is not null then 'failed'
        when r.seq is not null then 'pending'
        when c.is_delivered then 'published'
        else 'pending'
    end as status,
    coalesce(f.attempts, r.attempts, case when c.is_delivered then 1 else 0 end) as attempts,
    coalesce(f.last_error, r.last_error) as last_error
from outbox.events e
    left join outbox.backends b on b.number = e.backend_number
    -- The cursor of the event's slot, where that has one.
    left join lateral (
        select outbox.is_delivered(k, e.xid, e.seq) as is_delivered
        from outbox.cursors k
        where k.backend_number = e.backend_number and k.slot in (-1, outbox.hash_slot(coalesce(e.stream, b.stream_name, '')))
        order by k.slot desc limit 1
    ) c on true
    left join outbox.failed_events f on f.event_id = e.event_id and f.seq = e.seq
    left join outbox.refused_events r on r.seq = e.seq and r.accepted_in is null
union all
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)),
    e.created_at, e.scheduled_at, 'scheduled', 0, null
from outbox.scheduled_events e
    left join outbox.backends b on b.number = e.backend_number
union all
-- Kept here longer than in outbox.events.
select e.event_id, e.event_type, e.source, e.subject, coalesce(b.name, e.backend),
    coalesce(e.stream, b.stream_name, pg_catalog.current_setting('outbox_relay.redis_stream_name', true)),
    e.created_at, null, 'failed', e.attempts, e.last_error
from outbox.failed_events e
    left join outbox.backends b on b.number = e.backend_number
where not exists (select from outbox.events o where o.event_id = e.event_id and o.seq = e.seq)";

const COLUMNS: &str =
    "event_id, event_type, source, subject, backend, stream, created_at, scheduled_at, status, attempts, last_error";

/// Statuses with their counts, after checking that the view equals the plain query.
fn statuses(pg: &Postgres) -> String {
    let differs = format!(
        "select count(*) from ((select {COLUMNS} from outbox.event_status except all select {COLUMNS} from ({PLAIN}) p)
            union all (select {COLUMNS} from ({PLAIN}) p except all select {COLUMNS} from outbox.event_status)) d"
    );
    assert_eq!(pg.one::<i64>(&differs), 0, "the view differs from what it is to say");
    pg.one(
        "select string_agg(format('%s %s', status, n), ', ' order by status)
        from (select status, count(*) as n from outbox.event_status group by status) s",
    )
}

#[test]
fn each_event_has_one_row_in_whatever_state_it_is() {
    let redis = Redis::start();
    redis.call(&["SET", "bad", "a string"]);
    redis.call(&["SET", "worse", "a string"]);
    let settings = [
        ("outbox_relay.retry_delay", "1h"),
        ("outbox_relay.retry_max_delay", "1h"),
    ];
    let stack = Stack::of(Postgres::with(QUICK).with(&settings), redis);
    let pg = &stack.pg;
    pg.exec("insert into outbox.backends (name, enabled) values ('paused', false)");
    let mut open = pg.client();
    open.batch_execute("begin; select outbox.publish_event('open', 'kit')")
        .unwrap();
    pg.exec(
        "select outbox.publish_event('sent', 'kit', subject => 's' || n) from generate_series(1, 50) n;
         select outbox.publish_event('waits', 'kit', backend => 'paused') from generate_series(1, 7);
         select outbox.publish_event('later', 'kit', scheduled_at => now() + interval '1 hour') from generate_series(1, 3);
         select outbox.publish_event('refused', 'kit', stream => 'bad') from generate_series(1, 4);
         select outbox.publish_event('failed', 'kit', stream => 'worse', max_retries => 1) from generate_series(1, 2)",
    );
    stack.wait_events(50);
    wait_eq("refused", 4, || {
        pg.one::<i64>("select count(*) from outbox.refused_events")
    });
    wait_eq("failed", 2, || {
        pg.one::<i64>("select count(*) from outbox.failed_events")
    });
    wait_eq(
        "the books",
        "failed 2, pending 11, published 50, scheduled 3".to_owned(),
        || statuses(pg),
    );
    // Committed after the cursor has passed it: late, but still delivered.
    pg.set("outbox_relay.enabled", "off");
    wait_until("the worker to leave", || pg.worker_pid("postgres").is_none());
    open.batch_execute("commit").unwrap();
    pg.exec("select outbox.publish_event('next', 'kit') from generate_series(1, 5)");
    assert_eq!(statuses(pg), "failed 2, pending 17, published 50, scheduled 3");
    // A backend that the worker has not seen yet, and a deleted one with its events.
    pg.exec("insert into outbox.backends (name) values ('new')");
    pg.exec("select outbox.publish_event('first', 'kit', backend => 'new')");
    assert_eq!(statuses(pg), "failed 2, pending 18, published 50, scheduled 3");
    pg.exec("delete from outbox.cursors");
    assert_eq!(statuses(pg), "failed 2, pending 68, scheduled 3");
}

/// Of the plan for many rows: which tables are read completely, and which indexes are used.
fn plan(pg: &Postgres, condition: &str) -> String {
    let rows = pg
        .client()
        .query(
            &format!("explain (costs off) select * from outbox.event_status {condition}"),
            &[],
        )
        .expect("explain");
    rows.iter()
        .map(|row| row.get::<_, String>(0))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
fn a_query_of_event_status_reads_only_the_requested_events() {
    let stack = Stack::with(&[]);
    let pg = &stack.pg;
    pg.exec(
        "do $$ begin for i in 1..200 loop
            insert into outbox.events (event_type, source) select 'many', 'kit' from generate_series(1, 500);
            commit;
        end loop; end $$",
    );
    wait_eq("pending", 0, || pg.one::<i64>("select pending from outbox.status"));
    pg.exec("analyze outbox.events; analyze outbox.cursors");
    for condition in [
        "where status = 'failed'",
        "where status = 'scheduled'",
        "where status = 'pending'",
        "order by created_at desc limit 20",
        "where status = 'published' order by created_at desc limit 20",
        "where subject = 'x' and created_at > now() - interval '1 ms'",
        "where event_id = '00000000-0000-0000-0000-000000000000'",
    ] {
        let plan = plan(pg, condition);
        assert!(!plan.contains("Seq Scan on events"), "{condition}: {plan}");
    }
    assert!(!plan(pg, "where status = 'failed'").contains("on events"));
}
