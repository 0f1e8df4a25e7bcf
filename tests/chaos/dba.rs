//! Somebody who works at the server while everything else goes on, in separate sessions. Faults end these sessions like
//! all others; then the DBA repeats the work.

use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kit::Postgres;
use kit::postgres::{DB, USER};
use postgres::{Client, Config, Error, NoTls};

use crate::acts::Act;
use crate::dba_acts;

/// For how long an act is repeated. No fault lasts as long as this.
const PATIENCE: Duration = Duration::from_secs(60);

/// The settings at the start of a session of an act: publishers must not wait for long behind an act that waits for a
/// lock.
const SETUP: &str = "set lock_timeout = '3s'; set statement_timeout = '30s'; set application_name = 'dba'";

#[derive(Clone)]
pub(crate) struct Dba {
    config: Config,
    /// The directory of the installation's client programs.
    pub programs: PathBuf,
    /// The directory of the Unix socket.
    pub host: PathBuf,
}

impl Dba {
    pub(crate) fn of(pg: &Postgres) -> Self {
        Dba {
            config: pg.config(USER, DB),
            programs: pg.programs().to_path_buf(),
            host: pg.host().to_path_buf(),
        }
    }

    /// Repeats something that can be done twice until it succeeds. `Err`: the last obstacle.
    pub(crate) fn until_done<T>(
        &self,
        what: &str,
        deed: impl FnMut(&mut Client) -> Result<T, Error>,
    ) -> Result<T, String> {
        self.until_done_in(DB, what, deed)
    }

    pub(crate) fn until_done_in<T>(
        &self,
        database: &str,
        what: &str,
        mut deed: impl FnMut(&mut Client) -> Result<T, Error>,
    ) -> Result<T, String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let error = match self.connect(database).and_then(|mut client| deed(&mut client)) {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if Instant::now() >= deadline {
                return Err(format!("cannot {what}: {error:?}"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Runs statements one by one, and repeats each until it succeeds.
    pub(crate) fn run(&self, statements: &[&str]) -> Result<(), String> {
        statements
            .iter()
            .try_for_each(|sql| self.until_done(sql, |client| client.batch_execute(sql)))
    }

    /// Statements that may be refused.
    pub(crate) fn try_once(&self, sql: &str) -> Result<(), Error> {
        self.connect(DB)?.batch_execute(sql)
    }

    pub(crate) fn connect(&self, database: &str) -> Result<Client, Error> {
        let mut client = self.config.clone().dbname(database).connect(NoTls)?;
        client.batch_execute(SETUP)?;
        Ok(client)
    }

    /// Does it in a separate thread.
    pub(crate) fn start(&self, act: Act) -> JoinHandle<Result<(), String>> {
        let dba = self.clone();
        std::thread::spawn(move || dba_acts::perform(&dba, act))
    }
}
