//! The launcher: one process for the whole server, which starts a worker for each database that has the extension.
//!
//! It is connected to no database, so it cannot see where the extension is: it starts a worker in every database that is served, and
//! those that find nothing say so and end. After that it sleeps until somebody creates the extension or a database,
//! a worker ends, or the settings change.

use crate::guc::{self, LogLevel};
use crate::ownership;
use crate::process::{self, log};
use crate::shmem::{self, Slot, SlotState};
use pgrx::{pg_guard, pg_sys};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Between two starts of the same worker, so that one that fails does not spin.
const RESTART_WAIT: Duration = Duration::from_secs(1);
/// While no process can be had, or a database is held.
const RETRY_WAIT: Duration = Duration::from_secs(1);
/// How many workers may be looking for the extension at once: with many databases, processes are scarce.
const STARTING_AT_ONCE: usize = 2;

/// Registers the launcher; called once, by the postmaster.
pub fn register() {
    let mut worker = description(
        c"outbox_relay launcher",
        c"outbox_relay launcher",
        c"outbox_relay_launcher",
    );
    worker.bgw_restart_time = 1;
    // SAFETY: a complete description, at the time for static workers.
    unsafe { pg_sys::RegisterBackgroundWorker(&mut worker) };
}

fn description(name: &std::ffi::CStr, kind: &std::ffi::CStr, function: &std::ffi::CStr) -> pg_sys::BackgroundWorker {
    let mut worker = pg_sys::BackgroundWorker {
        bgw_flags: (pg_sys::BGWORKER_SHMEM_ACCESS | pg_sys::BGWORKER_BACKEND_DATABASE_CONNECTION) as i32,
        // Only on a primary; after a promotion at once.
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
    // SAFETY: once, at the start; no database, for shared catalogs only.
    unsafe {
        pg_sys::BackgroundWorkerInitializeConnection(std::ptr::null(), std::ptr::null(), 0);
        shmem::set_launcher_latch(pg_sys::MyLatch);
    }
    ownership::begin_incarnation();
    // Workers of a launcher before this one are not ours to watch: look again at those without a process.
    for slot in shmem::slots().filter(|s| s.pid() == 0) {
        slot.set_state(SlotState::Wanted);
    }
    shmem::request_rescan();
    let mut launcher = Launcher {
        workers: HashMap::new(),
        short_since: None,
        warned: Vec::new(),
    };
    let mut timeout = Some(Duration::ZERO);
    loop {
        process::wait(None, timeout);
        if process::is_told_to_end() {
            // SAFETY: ends the process; code 1, so that it is started again if the server goes on.
            unsafe { pg_sys::proc_exit(1) };
        }
        process::handle_interrupts();
        if process::reload_if_told() {
            shmem::request_rescan();
        }
        timeout = launcher.step();
    }
}

struct Started {
    handle: *mut pg_sys::BackgroundWorkerHandle,
    at: Instant,
}

struct Launcher {
    /// By database.
    workers: HashMap<u32, Started>,
    /// Since when there have been too few processes.
    short_since: Option<Instant>,
    /// Databases that the log has named since then.
    warned: Vec<String>,
}

impl Launcher {
    /// One round; returns when to come back without being woken.
    fn step(&mut self) -> Option<Duration> {
        let mut databases = None;
        if shmem::take_rescan() {
            let found = self.databases();
            for (oid, name) in &found {
                if guc::serves(name)
                    && let Some(slot) = shmem::claim_slot(*oid)
                    && slot.state() == SlotState::Absent
                {
                    slot.set_state(SlotState::Wanted);
                }
            }
            databases = Some(found);
        }
        self.bury();
        let mut again = None;
        let mut waiting = Vec::new();
        for slot in shmem::slots() {
            if slot.state() != SlotState::Wanted
                || self.workers.contains_key(&slot.database().to_u32())
                || slot.pid() != 0
            {
                continue;
            }
            if slot.is_held() {
                again = Some(RETRY_WAIT);
                continue;
            }
            let known = databases.get_or_insert_with(|| self.databases());
            match known.iter().find(|(oid, _)| *oid == slot.database()) {
                None => slot.free(),
                Some((_, name)) if !guc::serves(name) => slot.set_state(SlotState::Absent),
                Some((_, name)) => {
                    if self.starting() >= STARTING_AT_ONCE {
                        // Woken when one of them has found out.
                        again = Some(RETRY_WAIT);
                    } else if !self.start(slot, name) {
                        again = Some(RETRY_WAIT);
                        waiting.push(name.clone());
                    }
                }
            }
        }
        self.tell_of_shortage(waiting);
        again
    }

    /// Warns, once for each database that has to wait; not of the moments in which others look for the extension.
    fn tell_of_shortage(&mut self, waiting: Vec<String>) {
        if waiting.is_empty() {
            (self.short_since, self.warned) = (None, Vec::new());
            return;
        }
        let since = *self.short_since.get_or_insert_with(Instant::now);
        if since.elapsed() < RETRY_WAIT || waiting.iter().all(|name| self.warned.contains(name)) {
            return;
        }
        let names: Vec<String> = waiting.iter().map(|name| format!("\"{name}\"")).collect();
        log(
            LogLevel::Warning,
            "too few background worker processes for outbox_relay",
            Some(&format!(
                "No worker could be started for {}; it is tried again each second.",
                names.join(", ")
            )),
            Some("Raise max_worker_processes: each database with the extension needs one, and the launcher one more."),
        );
        self.warned = waiting;
    }

    fn starting(&self) -> usize {
        shmem::slots().filter(|s| s.state() == SlotState::Starting).count()
    }

    /// Forgets workers that have ended; those that are still wanted are started again, after a while.
    fn bury(&mut self) {
        self.workers.retain(|database, started| {
            let mut pid = 0;
            // SAFETY: a handle of this process, freed once it is done with.
            let status = unsafe { pg_sys::GetBackgroundWorkerPid(started.handle, &mut pid) };
            if status != pg_sys::BgwHandleStatus::BGWH_STOPPED {
                return true;
            }
            let slot = shmem::slot_of(pg_sys::Oid::from(*database));
            // Died without a word: not for want of the extension.
            if let Some(slot) = slot.filter(|s| s.state() != SlotState::Absent) {
                slot.detach();
                slot.set_state(SlotState::Wanted);
            }
            let wanted = slot.is_some_and(|s| s.state() == SlotState::Wanted && !s.is_held());
            if wanted && started.at.elapsed() < RESTART_WAIT {
                std::thread::sleep(Duration::from_millis(100));
            }
            // SAFETY: allocated by RegisterDynamicBackgroundWorker for this process.
            unsafe { pg_sys::pfree(started.handle.cast()) };
            false
        });
    }

    fn start(&mut self, slot: &'static Slot, database: &str) -> bool {
        let name = std::ffi::CString::new(format!("outbox_relay worker {database}")).unwrap_or_default();
        let mut worker = description(&name, c"outbox_relay worker", c"outbox_relay_worker");
        worker.bgw_main_arg = pg_sys::Datum::from(shmem::index_of(slot));
        let mut handle = std::ptr::null_mut();
        // SAFETY: a complete description; the handle is kept in the process's own memory.
        let registered = unsafe {
            worker.bgw_notify_pid = pg_sys::MyProcPid;
            let before = pg_sys::CurrentMemoryContext;
            pg_sys::CurrentMemoryContext = pg_sys::TopMemoryContext;
            let registered = pg_sys::RegisterDynamicBackgroundWorker(&mut worker, &mut handle);
            pg_sys::CurrentMemoryContext = before;
            registered
        };
        if registered {
            slot.set_state(SlotState::Starting);
            self.workers.insert(
                slot.database().to_u32(),
                Started {
                    handle,
                    at: Instant::now(),
                },
            );
        }
        registered
    }

    /// All databases that take connections.
    fn databases(&self) -> Vec<(pg_sys::Oid, String)> {
        process::transaction(|| {
            let mut found = Vec::new();
            // SAFETY: a scan of a shared catalog; the tuple's fixed columns are never null.
            unsafe {
                let rel = pg_sys::table_open(pg_sys::DatabaseRelationId, pg_sys::AccessShareLock as _);
                let columns = crate::rows::Columns::at(
                    rel,
                    vec![
                        pg_sys::Anum_pg_database_oid as usize,
                        pg_sys::Anum_pg_database_datname as usize,
                        pg_sys::Anum_pg_database_datallowconn as usize,
                    ],
                );
                let scan = pg_sys::table_beginscan_catalog(rel, 0, std::ptr::null_mut());
                loop {
                    let tuple = pg_sys::heap_getnext(scan, pg_sys::ScanDirection::ForwardScanDirection);
                    if tuple.is_null() {
                        break;
                    }
                    let row = columns.take_apart(tuple);
                    let (Some(oid), Some(name), Some(allows)) = (row.datum(0), row.datum(1), row.datum(2)) else {
                        continue;
                    };
                    if allows.value() as u8 != 0 {
                        let name = std::ffi::CStr::from_ptr((*name.cast_mut_ptr::<pg_sys::NameData>()).data.as_ptr());
                        found.push((
                            pg_sys::Oid::from(oid.value() as u32),
                            name.to_string_lossy().into_owned(),
                        ));
                    }
                }
                pg_sys::table_endscan(scan);
                pg_sys::table_close(rel, pg_sys::AccessShareLock as _);
            }
            found
        })
        .unwrap_or_else(|error| {
            log(
                LogLevel::Warning,
                &format!("could not list the databases: {error}"),
                None,
                None,
            );
            Vec::new()
        })
    }
}
