//! The launcher: one process for the whole server, which starts a worker for each database that has the extension.
//!
//! The launcher is connected to no database, so it cannot see which ones have the extension. It therefore starts a
//! worker once in every database that the settings name; a worker that finds no extension reports this and ends. CREATE
//! EXTENSION announces itself (`shmem::announce`). The launcher sleeps until that happens, until the list of databases
//! or the settings change, or until a worker ends.

mod databases;
mod incarnation;
mod telling;

use crate::launcher::databases::FoundDatabase;
use crate::server::database_slot::{DatabaseSlot, SlotState};
use crate::server::guc;
use crate::server::process;
use crate::server::shmem;
use crate::server::standby;
use pgrx::{pg_guard, pg_sys};
use relay::delivery::backoff::Backoff;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long to wait before restarting a worker that ended before it was at work, so that one that always fails does not
/// restart in a loop.
const RESTARTS: Backoff = Backoff {
    exponential: true,
    delay: Duration::from_millis(200),
    max_delay: Duration::from_secs(60),
};
/// A worker that ends earlier than this without having been told to counts as failed.
const STEADY_AFTER: Duration = Duration::from_secs(10);
/// The log mentions failing workers after this many failures in a row.
const WORTH_A_WORD: u32 = 4;
/// How soon to try again while there is no free background worker process.
const RETRY_WAIT: Duration = Duration::from_secs(1);
/// How soon to look again while a statement holds the database exclusively.
const LOCKED_WAIT: Duration = Duration::from_millis(25);
const LONGEST_LOCKED_WAIT: Duration = Duration::from_secs(3);
/// A worker that is not at work after this long waits for something; others are started meanwhile.
const LONGEST_START: Duration = Duration::from_secs(5);

/// How many workers may look for the extension at once. Background worker processes are scarce, and other extensions
/// need some.
fn starting_at_once() -> usize {
    // SAFETY: a plain read of a setting.
    (unsafe { pg_sys::max_worker_processes } as usize / 4).clamp(2, 16)
}

/// Registers the launcher. The postmaster calls this once.
pub(crate) fn register() {
    let mut worker = description(
        c"outbox_relay launcher",
        c"outbox_relay launcher",
        c"outbox_relay_launcher",
    );
    worker.bgw_restart_time = 1;
    // SAFETY: a complete description, at the time when static workers are registered.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) };
}

/// Registers the process that watches a standby. The postmaster calls this once.
pub(crate) fn register_standby_watch() {
    let mut worker = description(
        c"outbox_relay standby",
        c"outbox_relay standby",
        c"outbox_relay_standby",
    );
    worker.bgw_flags = pg_sys::BGWORKER_SHMEM_ACCESS as i32;
    worker.bgw_start_time = pg_sys::BgWorkerStartTime::BgWorkerStart_PostmasterStart;
    // SAFETY: a complete description, at the time when static workers are registered.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) };
}

fn description(name: &std::ffi::CStr, kind: &std::ffi::CStr, function: &std::ffi::CStr) -> pg_sys::BackgroundWorker {
    let mut worker = pg_sys::BackgroundWorker {
        bgw_flags: (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as i32,
        // Only on a primary. After a promotion it starts at once.
        bgw_start_time: pg_sys::BgWorkerStartTime::BgWorkerStart_RecoveryFinished,
        bgw_restart_time: pg_sys::BGW_NEVER_RESTART,
        ..Default::default()
    };
    put(&mut worker.bgw_name, name);
    put(&mut worker.bgw_type, kind);
    put(&mut worker.bgw_library_name, c"outbox_relay");
    put(&mut worker.bgw_function_name, function);
    worker
}

/// Copies a text into a fixed field, cut to fit, zero-terminated.
fn put(field: &mut [std::ffi::c_char], text: &std::ffi::CStr) {
    let room = field.len() - 1;
    for (to, from) in field[..room].iter_mut().zip(text.to_bytes()) {
        *to = *from as std::ffi::c_char;
    }
}

/// Entry point of the process.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn outbox_relay_launcher(_argument: pg_sys::Datum) {
    process::take_signals();
    process::prepare_to_wait(c"OutboxRelayLauncher", None);
    // SAFETY: once, at the start; no database, for shared catalogs only.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
        shmem::attach_launcher(pg_sys::MyProcPid, pg_sys::MyLatch);
        pg_sys::before_shmem_exit(Some(leave), pg_sys::Datum::from(0));
    }
    crate::server::pinned::pin_settings();
    standby::note_promotion();
    incarnation::begin_incarnation();
    if std::fs::read_dir("pg_twophase").is_ok_and(|mut files| files.next().is_some()) {
        shmem::note_backends_prepared();
    }
    shmem::request_rescan();
    let mut launcher = Launcher::default();
    let mut timeout = Some(Duration::ZERO);
    loop {
        process::wait(timeout);
        if process::is_told_to_end() {
            // SAFETY: ends the process. With code 1 the postmaster starts it again if the server goes on.
            unsafe { pg_sys::proc_exit(1) };
        }
        process::handle_interrupts();
        if process::reload_if_told() {
            shmem::request_rescan();
        }
        timeout = launcher.step();
    }
}

#[pg_guard]
// SAFETY: only Postgres calls this, when the process ends.
unsafe extern "C-unwind" fn leave(_code: i32, _argument: pg_sys::Datum) {
    shmem::detach_launcher();
}

struct Started {
    handle: *mut pg_sys::BackgroundWorkerHandle,
    at: Instant,
}

/// What is known of a database.
struct Database {
    name: String,
    is_template: bool,
    is_open: bool,
    /// Whether to look for the extension: no worker has looked yet, or a commit has announced it since.
    look: bool,
    /// Whether the extension was ever seen there. Only then is a missing worker logged.
    has_extension: bool,
    worker: Option<Started>,
    /// Failed starts in a row.
    failures: u32,
    not_before: Option<Instant>,
    locked_since: Option<Instant>,
}

impl Database {
    fn of(found: FoundDatabase) -> Self {
        Self {
            name: found.name,
            is_template: found.is_template,
            is_open: found.is_open,
            look: true,
            has_extension: false,
            worker: None,
            failures: 0,
            not_before: None,
            locked_since: None,
        }
    }

    /// Whether a worker has to be started there.
    fn lacks_worker(&self, id: pg_sys::Oid) -> bool {
        // A worker that an earlier launcher started is known only by its slot.
        let stranger = || shmem::database_slot_of(id).is_some_and(|slot| slot.pid() != 0);
        self.look && self.worker.is_none() && !stranger()
    }

    /// Starts a worker there, unless it has to wait. `starting`: how many others are not at work yet.
    fn try_start(&mut self, id: pg_sys::Oid, starting: usize) -> Attempt {
        if !self.is_open || !guc::serves(&self.name) {
            return Attempt::LeftOut;
        }
        let wait = self.not_before.map(|at| at.saturating_duration_since(Instant::now()));
        if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
            return Attempt::Later(wait);
        }
        if self.has_extension {
            match shmem::claim_database_slot(id) {
                Some(slot) if slot.state() == SlotState::Absent => slot.set_state(SlotState::Wanted),
                Some(_) => {}
                None => return Attempt::NoneFree,
            }
        }
        if starting >= starting_at_once() {
            // The launcher is woken when one of the started workers is at work or has ended.
            return Attempt::Later(RETRY_WAIT);
        }
        if databases::is_locked(id) {
            let since = *self.locked_since.get_or_insert_with(Instant::now);
            if since.elapsed() < LONGEST_LOCKED_WAIT {
                return Attempt::Later(LOCKED_WAIT);
            }
        }
        match shmem::claim_database_slot(id).is_some_and(|slot| start(slot, self)) {
            true => Attempt::Started,
            false => Attempt::NoneFree,
        }
    }

    /// Notes what the catalog says now.
    fn learn(&mut self, found: FoundDatabase) {
        (self.name, self.is_template, self.is_open) = (found.name, found.is_template, found.is_open);
    }
}

/// What became of an attempt to start a worker.
enum Attempt {
    Started,
    /// The settings or an administrator exclude the database.
    LeftOut,
    /// To be tried again after this time.
    Later(Duration),
    /// No slot or no process is free.
    NoneFree,
}

#[derive(Default)]
struct Launcher {
    /// By OID. A dropped database stays here until its worker has ended.
    databases: BTreeMap<u32, Database>,
    /// The list of databases could not be read and has to be read again.
    list_due: bool,
    /// Since when there have been too few processes, and when that was last logged.
    short: Option<(Instant, Option<Instant>)>,
    /// When it was last logged that databases have no worker because the settings or an administrator exclude them.
    left_out_said: Option<Instant>,
    /// When it was last logged that workers fail.
    failing_said: Option<Instant>,
}

impl Launcher {
    /// One round; returns when to come back if nothing wakes the launcher.
    fn step(&mut self) -> Option<Duration> {
        let (announced, everywhere) = shmem::take_announced();
        let is_new = |oid: &pg_sys::Oid| !self.databases.contains_key(&oid.to_u32());
        if shmem::take_rescan() || everywhere || self.list_due || announced.iter().any(is_new) {
            self.list_again();
        }
        for (oid, database) in &mut self.databases {
            let is_announced = announced.iter().any(|a| a.to_u32() == *oid);
            if is_announced {
                (database.has_extension, database.failures, database.not_before) = (true, 0, None);
            }
            database.look |= is_announced || everywhere;
        }
        self.bury();
        let again = self.start_wanted();
        match self.list_due {
            true => Some(again.map_or(RETRY_WAIT, |again| again.min(RETRY_WAIT))),
            false => again,
        }
    }

    /// Notes which databases were created, dropped or renamed.
    fn list_again(&mut self) {
        let found = databases::list();
        self.list_due = found.is_none();
        let Some(found) = found else {
            return;
        };
        let has_gone = |oid: u32| found.iter().all(|f| f.oid.to_u32() != oid);
        self.databases
            .retain(|oid, database| database.worker.is_some() || !has_gone(*oid));
        for slot in shmem::database_slots().filter(|slot| slot.pid() == 0) {
            let oid = slot.database().to_u32();
            if has_gone(oid) && !self.databases.contains_key(&oid) {
                shmem::take_back(slot);
            }
        }
        for found in found {
            match self.databases.get_mut(&found.oid.to_u32()) {
                Some(known) => known.learn(found),
                None => {
                    self.databases.insert(found.oid.to_u32(), Database::of(found));
                }
            }
        }
    }

    /// Forgets workers that have ended.
    fn bury(&mut self) {
        let mut failed = false;
        for (oid, database) in &mut self.databases {
            let Some(started) = &database.worker else {
                continue;
            };
            let mut pid = 0;
            // SAFETY: a handle of this process, which is freed when it is no longer needed.
            let status = unsafe { pg_sys::GetBackgroundWorkerPid(started.handle, &mut pid) };
            if status != pg_sys::BgwHandleStatus::BGWH_STOPPED {
                continue;
            }
            // SAFETY: allocated by RegisterDynamicBackgroundWorker for this process.
            unsafe { pg_sys::pfree(started.handle.cast()) };
            let lived = started.at.elapsed();
            database.worker = None;
            let Some(slot) = shmem::database_slot_of(pg_sys::Oid::from(*oid)) else {
                continue;
            };
            if slot.pid() != 0 {
                // This worker found one that an earlier launcher had started, and left the slot to it.
                database.look = true;
                continue;
            }
            let state = slot.state();
            database.has_extension |= state == SlotState::Running || state == SlotState::Mismatched;
            match state {
                // It was told to leave; start it again.
                SlotState::Wanted => (database.look, database.failures) = (true, 0),
                SlotState::Absent => (database.has_extension, database.failures) = (database.look, 0),
                // What happens in the database is unknown until it is served again.
                SlotState::Unserved => {
                    (database.look, database.failures) = (true, 0);
                    continue;
                }
                // The worker ended without giving a reason, so the extension may be there.
                _ => {
                    failed = true;
                    database.look = true;
                    let was_steady = state == SlotState::Running && lived >= STEADY_AFTER;
                    database.failures = if was_steady { 0 } else { database.failures + 1 };
                    let wait = RESTARTS.wait(database.failures.max(1), fastrand::f64());
                    database.not_before = Some(Instant::now() + wait);
                }
            }
            match database.look {
                true if database.failures >= WORTH_A_WORD => slot.set_state(SlotState::Failing),
                true => slot.set_state(SlotState::Wanted),
                // If there were events before, publishers may be at work: the slot keeps the highest number of the
                // events.
                false if slot.numbers.get().is_none() => shmem::take_back(slot),
                false => {}
            }
        }
        if failed {
            // The database may be gone or renamed.
            self.list_again();
        }
    }

    /// Starts the workers that are due, as far as processes are free. Returns when to come back.
    fn start_wanted(&mut self) -> Option<Duration> {
        let mut again: Option<Duration> = None;
        let mut sooner = |wait: Duration| again = Some(again.map_or(wait, |a| a.min(wait)));
        let (mut waiting, mut left_out) = (Vec::new(), Vec::new());
        let mut starting = self.starting();
        // Databases that are known to have the extension come first, templates last.
        let mut order: Vec<u32> = self.databases.keys().copied().collect();
        order.sort_by_key(|oid| {
            let database = &self.databases[oid];
            (!database.has_extension, database.is_template)
        });
        for oid in order {
            let id = pg_sys::Oid::from(oid);
            let Some(database) = self
                .databases
                .get_mut(&oid)
                .filter(|database| database.lacks_worker(id))
            else {
                continue;
            };
            match database.try_start(id, starting) {
                Attempt::Started => starting += 1,
                Attempt::LeftOut => left_out.extend(database.has_extension.then_some(oid)),
                Attempt::Later(wait) => sooner(wait),
                Attempt::NoneFree => {
                    sooner(RETRY_WAIT);
                    waiting.push(oid);
                }
            }
        }
        if let Some(wait) = self.tell_of_left_out(&left_out) {
            sooner(wait);
        }
        for oid in &waiting {
            if let Some(slot) = shmem::database_slot_of(pg_sys::Oid::from(*oid)) {
                slot.set_state(SlotState::Short);
            }
        }
        self.tell_of_shortage(&waiting);
        self.tell_of_failures();
        again
    }

    /// How many workers have been started and are not at work yet.
    fn starting(&self) -> usize {
        let is_starting = |(oid, database): &(&u32, &Database)| {
            let slot = shmem::database_slot_of(pg_sys::Oid::from(**oid));
            let is_new = database.worker.as_ref().is_some_and(|w| w.at.elapsed() < LONGEST_START);
            is_new && slot.is_some_and(|slot| slot.state() == SlotState::Starting)
        };
        self.databases.iter().filter(is_starting).count()
    }
}

/// Starts a worker; false if no process is free.
fn start(slot: &'static DatabaseSlot, database: &mut Database) -> bool {
    let name = std::ffi::CString::new(format!("outbox_relay worker {}", database.name)).unwrap_or_default();
    let mut worker = description(&name, c"outbox_relay worker", c"outbox_relay_worker");
    worker.bgw_main_arg = pg_sys::Datum::from(shmem::address_of(slot));
    let mut handle = std::ptr::null_mut();
    let before = slot.state();
    // Set before registering: the worker may be at work before that call returns.
    slot.set_state(SlotState::Starting);
    // SAFETY: a complete description; the handle is kept in the process's own memory.
    let registered = unsafe {
        worker.bgw_notify_pid = pg_sys::MyProcPid;
        let before = pg_sys::CurrentMemoryContext;
        pg_sys::CurrentMemoryContext = pg_sys::TopMemoryContext;
        let registered = pg_sys::RegisterDynamicBackgroundWorker(&mut worker, &mut handle);
        pg_sys::CurrentMemoryContext = before;
        registered
    };
    if !registered {
        slot.set_state(before);
        return false;
    }
    // Cleared now: the worker may not see an announcement that comes later.
    (database.look, database.locked_since) = (false, None);
    database.worker = Some(Started {
        handle,
        at: Instant::now(),
    });
    true
}
