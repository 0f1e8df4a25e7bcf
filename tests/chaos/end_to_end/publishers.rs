//! Sessions that publish, and write the same to the ledger in the same transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kit::postgres::{DB, USER};
use kit::{Dice, Postgres};
use postgres::{Client, Config, Error, NoTls};

use super::STREAMS;

const KEYS: u64 = 24;

/// The publisher of a key holds the key's row until the commit, so versions are in the order of commits.
pub(super) const SCHEMA: &str = "
create table aggregates (key text primary key, version bigint not null default 0);
insert into aggregates select 'k' || n from generate_series(0, 23) n;
create table ledger (event_id uuid primary key, stream text not null, key text not null, version bigint not null);
-- The events of every third key are those of the row.
select outbox.attach_table('aggregates', backend => 'parcels', columns => '{key,version}', operations => 'update',
    condition => 'substr(key, 2)::integer % 3 = 2');
create function publish(key text, stream text) returns void language plpgsql as $$
declare
    v bigint;
    id uuid;
begin
    update aggregates a set version = a.version + 1 where a.key = publish.key returning a.version into strict v;
    if stream = 'parcels' then
        select h.event_id into strict id from outbox.published_here() h where h.subject = publish.key and (h.data ->> 'version')::bigint = v;
    else
        id := outbox.publish_event('changed', 'ledger', jsonb_build_object('key', key, 'version', v), key, stream => stream);
    end if;
    insert into ledger values (id, stream, key, v);
end
$$;";

pub(super) struct Publishers {
    stop: Arc<AtomicBool>,
    commits: Arc<AtomicU64>,
    thrown_out: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Publishers {
    pub(super) fn start(pg: &Postgres, sessions: u64, seed: u64) -> Self {
        let (stop, commits, thrown_out) = (Arc::default(), Arc::default(), Arc::default());
        let threads = (0..sessions)
            .map(|number| {
                let (config, dice) = (pg.config(USER, DB), Dice::of(seed, number));
                let (stop, commits, thrown_out) = (Arc::clone(&stop), Arc::clone(&commits), Arc::clone(&thrown_out));
                std::thread::spawn(move || live(&config, dice, &stop, &commits, &thrown_out))
            })
            .collect();
        Publishers {
            stop,
            commits,
            thrown_out,
            threads,
        }
    }

    /// How many commits were confirmed to them, and how often their sessions were terminated.
    pub(super) fn stop(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().expect("a publisher");
        }
        (
            self.commits.load(Ordering::Relaxed),
            self.thrown_out.load(Ordering::Relaxed),
        )
    }
}

fn live(config: &Config, mut dice: Dice, stop: &AtomicBool, commits: &AtomicU64, thrown_out: &AtomicU64) {
    let mut client: Option<Client> = None;
    while !stop.load(Ordering::Relaxed) {
        let Some(connected) = client.as_mut() else {
            client = config.connect(NoTls).ok();
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        match transaction(connected, &mut dice) {
            Ok(committed) => {
                commits.fetch_add(u64::from(committed), Ordering::Relaxed);
            }
            // A deadlock: two sessions have published for the same keys in another order.
            Err(error) if error.code().is_some_and(|code| code.code() == "40P01") => {}
            Err(error)
                if error
                    .as_db_error()
                    .is_some_and(|said| !said.code().code().starts_with("57")) =>
            {
                panic!("a publisher was refused: {error:?}")
            }
            Err(_) => {
                thrown_out.fetch_add(1, Ordering::Relaxed);
                client = None;
            }
        }
        std::thread::sleep(dice.millis(0, 25));
    }
}

/// Returns whether it was committed. After an ERROR the session rolls back when it begins again.
fn transaction(client: &mut Client, dice: &mut Dice) -> Result<bool, Error> {
    let mut transaction = client.transaction()?;
    for _ in 0..dice.between(1, 6) {
        let key = dice.below(KEYS);
        let stream = STREAMS[(key % STREAMS.len() as u64) as usize];
        transaction.execute("select publish($1, $2)", &[&format!("k{key}"), &stream])?;
    }
    if dice.one_in(6) {
        transaction.rollback()?;
        return Ok(false);
    }
    transaction.commit()?;
    Ok(true)
}
