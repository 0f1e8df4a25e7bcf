//! `outbox.test_backend(name)`: asks the worker whether it can use a backend. Only the worker has the passwords.

use crate::functions::status;
use crate::functions::waiting::rest;
use crate::server::encoding::words_to_server;
use crate::server::error::expect_arguments;
use crate::server::questions::SEPARATOR;
use crate::server::shmem;
use crate::tables::sql::text_array;
use pgrx::pg_sys;
use std::borrow::Cow;
use std::time::{Duration, Instant};

/// How often to look for the answer.
const LOOK_MS: i64 = 5;
/// How long a worker may be missing. A worker that has ended is started again within this time.
const PATIENCE: Duration = Duration::from_secs(3);

crate::sql_function!(ask_worker, pg_finfo_ask_worker);

/// `outbox.ask_worker(backend_number, limit_ms)`, strict. Returns latency in us, server, version, role, address, error.
fn ask_worker(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    expect_arguments(fcinfo, 2);
    // SAFETY: two arguments of type integer.
    let (number, limit_ms) = unsafe {
        let arguments = (*fcinfo).args.as_slice(2);
        (*fcinfo).isnull = false;
        (arguments[0].value.value() as i32, arguments[1].value.value() as i32)
    };
    let answer = match answer(number, Duration::from_millis(limit_ms.max(0) as u64)) {
        Ok(answer) => answer,
        Err(error) => format!("{}{error}", String::from(SEPARATOR).repeat(5)),
    };
    text_array(
        answer
            .split(SEPARATOR)
            .map(|field| Cow::Owned(words_to_server(field).into_owned())),
    )
}

/// The worker's answer; an error if it gives none, with the reason.
fn answer(number: i32, limit: Duration) -> Result<String, String> {
    let there = || match status::worker_here() {
        (Some(pid), "running") => Ok(pid),
        (_, state) => Err(format!("there is no worker: {state}")),
    };
    // One that is starting is waited for, as one that comes back.
    let mut pid = match status::worker_here() {
        (_, "starting") => None,
        _ => Some(there()?),
    };
    let Some(asked) = shmem::ask_about(number) else {
        return Err("too many backends are being tested: try again".to_owned());
    };
    let announce = || {
        shmem::database_slot_here()
            .into_iter()
            .for_each(|slot| slot.announce_question())
    };
    announce();
    let start = Instant::now();
    let mut seen_at = start;
    loop {
        if let Some(answer) = asked.answer() {
            return Ok(answer);
        }
        let now = Instant::now();
        if now - start >= limit {
            return Err(format!("no answer within {} s", limit.as_secs()));
        }
        match there() {
            Ok(same) if Some(same) == pid => seen_at = now,
            Ok(other) => {
                (pid, seen_at) = (Some(other), now);
                asked.ask_again();
                announce();
            }
            Err(error) if now - seen_at >= PATIENCE => return Err(error),
            Err(_) => {}
        }
        rest(LOOK_MS);
    }
}
