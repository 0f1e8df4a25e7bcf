//! The cost of an attached table for statements on it, compared with a plain table and with a hand-written row trigger;
//! and the cost of the inbox for a consumer, compared with a table of its own.

use crate::options::Scale;
use crate::report::{Goal, Row, Taken};
use crate::servers::stack;
use postgres::Client;
use std::time::Instant;

const TABLES: &str = "
create table plain (id int primary key, a text, n int);
create table attached (like plain including all);
create table by_hand (like plain including all);
select outbox.attach_table('attached');
create function by_hand() returns trigger language plpgsql as $$
begin
    perform outbox.publish_event('by_hand.update', '/postgres/public', to_jsonb(new), new.id::text);
    return null;
end $$;
create trigger by_hand after update on by_hand for each row execute function by_hand();";
const NAMES: [&str; 3] = ["plain", "attached", "by_hand"];
/// Statements of one row each.
const SINGLE: u32 = 5_000;

/// The relay is paused: the figure is only about the publisher.
pub(crate) fn measure(scale: &Scale) -> Taken {
    let stack = stack();
    let mut client = stack.pg.client();
    let mut run = |sql: &str| client.batch_execute(sql).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    run("update outbox.backends set enabled = false");
    run(TABLES);
    run(&format!(
        "insert into plain select i, 'some text ' || i, 0 from generate_series(1, {}) i; insert into by_hand select * from plain; \
         insert into attached select * from plain; truncate outbox.events",
        scale.bulk
    ));
    NAMES.iter().for_each(|table| run(&format!("vacuum analyze {table}")));
    let (mut single, mut bulk): ([Vec<f64>; 3], [Vec<f64>; 3]) = Default::default();
    for _ in 0..scale.runs {
        for (index, table) in NAMES.iter().enumerate() {
            let one = format!(
                "do $$ begin for i in 1..{SINGLE} loop update {table} set n = n + 1 where id = i; end loop; end $$"
            );
            single[index].push(took(&mut client, &one) / f64::from(SINGLE));
            bulk[index].push(took(&mut client, &format!("update {table} set n = n + 1")));
            client.batch_execute("truncate outbox.events").expect("a superuser");
        }
    }
    let rows = scale.bulk;
    let beside = |what: String, times: &[Vec<f64>; 3]| {
        [("a plain table", 0), ("a row trigger by hand", 2)]
            .map(|(name, other)| Row::longer(format!("{what}, beside {name}"), &times[1], &times[other], Goal::None))
    };
    Taken {
        rows: beside("UPDATE of one row of an attached table".to_owned(), &single)
            .into_iter()
            .chain(beside(format!("UPDATE of {rows} rows of an attached table"), &bulk))
            .collect(),
        ..Taken::default()
    }
}

pub(crate) fn measure_inbox(scale: &Scale) -> Taken {
    let stack = stack();
    let mut client = stack.pg.client();
    client
        .batch_execute(
            "create table handled (event_id uuid primary key, handled_at timestamptz not null default now())",
        )
        .expect("a table");
    let of = |work: &str| format!("do $$ begin for i in 1..{SINGLE} loop {work}; end loop; end $$");
    let own = of("insert into handled (event_id) values (gen_random_uuid()) on conflict do nothing");
    let inbox = of("perform outbox.consume_once('bench', gen_random_uuid())");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..scale.runs {
        theirs.push(took(&mut client, &own) / f64::from(SINGLE));
        ours.push(took(&mut client, &inbox) / f64::from(SINGLE));
    }
    let figure = "consume_once(), beside an INSERT into a table of one's own";
    Taken {
        rows: vec![Row::longer(figure, &ours, &theirs, Goal::None)],
        ..Taken::default()
    }
}

/// In milliseconds.
fn took(client: &mut Client, sql: &str) -> f64 {
    let start = Instant::now();
    client.batch_execute(sql).unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    start.elapsed().as_secs_f64() * 1e3
}
