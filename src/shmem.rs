//! What processes share: a slot for each database that has or may get a worker. Atomics only, so that a commit can wake the worker
//! without locks, allocation or failure.

use pgrx::{pg_guard, pg_sys};
use relay::numbers::Highest;
use std::mem::size_of;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

/// Most databases that can have a worker at once; far above any `max_worker_processes`.
const SLOTS: usize = 256;

/// A worker that has not looked for so long needs more time than one that just has: what it needs has left the caches.
const COLD_AFTER_MS: u64 = 10;

/// What a slot's worker is doing. Next states in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SlotState {
    /// No worker wanted: the extension is not there, or the database is not served. [Wanted]
    Absent = 0,
    /// The launcher is asked to start one. [Starting, Absent]
    Wanted = 1,
    /// Started, looking for the extension. [Running, Mismatched, Absent, Wanted]
    Starting = 2,
    /// At work. [Wanted, Absent]
    Running = 3,
    /// Idle: the library and the extension's SQL have different versions. [Running, Wanted, Absent]
    Mismatched = 4,
}

impl SlotState {
    fn from_u8(value: u8) -> Self {
        match value {
            1 => Self::Wanted,
            2 => Self::Starting,
            3 => Self::Running,
            4 => Self::Mismatched,
            _ => Self::Absent,
        }
    }
}

/// What a worker hears of commits.
#[repr(u8)]
enum Work {
    /// Nothing was committed: who commits events wakes the worker.
    None = 0,
    Some = 1,
    /// Nothing was committed, and nobody need wake the worker: it looks in a moment anyway.
    Asleep = 2,
}

/// One database.
#[repr(C)]
pub struct Slot {
    /// Its OID; 0: the slot is free.
    database: AtomicU32,
    state: AtomicU8,
    /// Whether events were committed since the worker last looked, see [`Work`].
    work: AtomicU8,
    /// Scheduled events were committed since the worker last looked.
    schedule: AtomicBool,
    /// Events are being published, after a while without any.
    publishing: AtomicBool,
    /// Somebody asked for an attempt now.
    nudge: AtomicBool,
    pid: AtomicI32,
    /// Process that needs the database to itself (DROP DATABASE and its kind); 0: none.
    holder: AtomicI32,
    /// The worker's latch, in shared memory too; null: none.
    latch: AtomicPtr<pg_sys::Latch>,
    /// When the worker last looked for events, see [`clock_ms`].
    looked_at_ms: AtomicU64,
    /// The highest number that an event was given, see `numbers.rs`.
    pub numbers: Highest,
    /// The sequence that gives them.
    sequence: AtomicU32,
}

#[repr(C)]
struct Shared {
    /// A new database may have come with the extension in it.
    rescan: AtomicBool,
    launcher_latch: AtomicPtr<pg_sys::Latch>,
    /// Names this run of the server, from its start, promotion or crash to its end; zeroes: not named yet.
    incarnation: [AtomicU64; 2],
    /// Where it began, see [`Began`].
    started_at_lsn: AtomicU64,
    first_xid: AtomicU64,
    slots: [Slot; SLOTS],
}

/// Place of `AddinShmemInitLock` in the array (lwlocknames.h, Postgres 15 to 18).
const ADDIN_SHMEM_INIT_LOCK: usize = 21;

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());
static mut PREVIOUS_REQUEST_HOOK: pg_sys::shmem_request_hook_type = None;
static mut PREVIOUS_STARTUP_HOOK: pg_sys::shmem_startup_hook_type = None;

/// Asks for the shared memory; called once, by the postmaster.
pub fn install() {
    // SAFETY: the postmaster is single-threaded and calls this once, before any child exists.
    unsafe {
        PREVIOUS_REQUEST_HOOK = pg_sys::shmem_request_hook;
        pg_sys::shmem_request_hook = Some(request);
        PREVIOUS_STARTUP_HOOK = pg_sys::shmem_startup_hook;
        pg_sys::shmem_startup_hook = Some(startup);
    }
}

#[pg_guard]
// SAFETY: called by Postgres alone, as a hook.
unsafe extern "C-unwind" fn request() {
    // SAFETY: Postgres calls this hook at the one moment at which space may be asked for.
    unsafe {
        if let Some(previous) = PREVIOUS_REQUEST_HOOK {
            previous();
        }
        pg_sys::RequestAddinShmemSpace(size_of::<Shared>());
    }
}

#[pg_guard]
// SAFETY: called by Postgres alone, as a hook.
unsafe extern "C-unwind" fn startup() {
    // SAFETY: Postgres calls this hook once its shared memory exists; the lock is the one meant for it. A fresh block
    // (also after a crash of a child) is zeroed, which is the valid empty state of every field.
    unsafe {
        if let Some(previous) = PREVIOUS_STARTUP_HOOK {
            previous();
        }
        let lock = &raw mut (*pg_sys::MainLWLockArray.add(ADDIN_SHMEM_INIT_LOCK)).lock;
        pg_sys::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let mut found = false;
        let block = pg_sys::ShmemInitStruct(c"outbox_relay".as_ptr(), size_of::<Shared>(), &mut found);
        if !found {
            ptr::write_bytes(block.cast::<u8>(), 0, size_of::<Shared>());
        }
        SHARED.store(block.cast(), Ordering::Release);
        pg_sys::LWLockRelease(lock);
    }
}

fn shared() -> Option<&'static Shared> {
    // SAFETY: null, or the block that lives as long as the server; all its fields are atomics.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
}

/// Whether the library was preloaded, so that workers can exist.
pub fn is_attached() -> bool {
    shared().is_some()
}

/// Milliseconds of a clock that all processes share.
fn clock_ms() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: reads a clock that there always is.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000 + time.tv_nsec as u64 / 1_000_000
}

fn set_latch(latch: &AtomicPtr<pg_sys::Latch>) {
    let latch = latch.load(Ordering::Acquire);
    if !latch.is_null() {
        // SAFETY: a process latch lies in shared memory for the server's life. If its owner has gone, a stranger
        // wakes for nothing. SetLatch neither allocates nor fails.
        unsafe { pg_sys::SetLatch(latch) };
    }
}

/// The slot of a database, if it has one.
pub fn slot_of(database: pg_sys::Oid) -> Option<&'static Slot> {
    shared()?
        .slots
        .iter()
        .find(|s| s.database.load(Ordering::Acquire) == database.to_u32())
}

/// The slot of a database, made if need be; `None` when not preloaded or all are taken.
pub fn claim_slot(database: pg_sys::Oid) -> Option<&'static Slot> {
    if let Some(slot) = slot_of(database) {
        return Some(slot);
    }
    let claimed = shared()?.slots.iter().find(|s| {
        s.database
            .compare_exchange(0, database.to_u32(), Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    })?;
    // Two processes may have claimed at once: the lower slot wins, and the other is given back.
    let winner = slot_of(database)?;
    if !ptr::eq(winner, claimed) {
        claimed.database.store(0, Ordering::Release);
    }
    Some(winner)
}

/// All slots in use.
pub fn slots() -> impl Iterator<Item = &'static Slot> {
    shared()
        .into_iter()
        .flat_map(|s| s.slots.iter())
        .filter(|s| s.database.load(Ordering::Acquire) != 0)
}

pub fn index_of(slot: &'static Slot) -> usize {
    let base = shared().map_or(ptr::null(), |s| s.slots.as_ptr());
    (std::ptr::from_ref(slot).addr() - base.addr()) / size_of::<Slot>()
}

pub fn slot_at(index: usize) -> Option<&'static Slot> {
    shared()?.slots.get(index)
}

pub fn set_launcher_latch(latch: *mut pg_sys::Latch) {
    if let Some(shared) = shared() {
        shared.launcher_latch.store(latch, Ordering::Release);
    }
}

pub fn wake_launcher() {
    if let Some(shared) = shared() {
        set_latch(&shared.launcher_latch);
    }
}

/// Where a run of the server began: in the WAL, and among the ids of transactions.
#[derive(Clone, Copy)]
pub struct Began {
    pub started_at: u64,
    pub first_xid: u64,
}

/// This run of the server, and where it began: as said by the launcher, the first time that it starts.
pub fn incarnation() -> Option<([u8; 16], Began)> {
    let shared = shared()?;
    let [high, low] = [0, 1].map(|half| shared.incarnation[half].load(Ordering::Acquire));
    let name = (u128::from(high) << 64 | u128::from(low)).to_be_bytes();
    (high != 0).then(|| {
        let began = Began {
            started_at: shared.started_at_lsn.load(Ordering::Acquire),
            first_xid: shared.first_xid.load(Ordering::Acquire),
        };
        (name, began)
    })
}

/// Names this run of the server, if it has no name.
pub fn name_incarnation(name: [u8; 16], began: Began) {
    if let Some(shared) = shared().filter(|_| incarnation().is_none()) {
        let name = u128::from_be_bytes(name);
        shared.started_at_lsn.store(began.started_at, Ordering::Release);
        shared.first_xid.store(began.first_xid, Ordering::Release);
        shared.incarnation[1].store(name as u64, Ordering::Release);
        shared.incarnation[0].store((name >> 64) as u64, Ordering::Release);
    }
}

/// Makes the launcher look at all databases again.
pub fn request_rescan() {
    if let Some(shared) = shared() {
        shared.rescan.store(true, Ordering::Release);
        set_latch(&shared.launcher_latch);
    }
}

pub fn take_rescan() -> bool {
    shared().is_some_and(|s| s.rescan.swap(false, Ordering::AcqRel))
}

impl Slot {
    pub fn database(&self) -> pg_sys::Oid {
        pg_sys::Oid::from(self.database.load(Ordering::Acquire))
    }

    pub fn state(&self) -> SlotState {
        SlotState::from_u8(self.state.load(Ordering::Acquire))
    }

    pub fn set_state(&self, state: SlotState) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub fn free(&self) {
        self.set_state(SlotState::Absent);
        self.numbers.forget();
        self.database.store(0, Ordering::Release);
    }

    /// Events are numbered by this sequence. Whether another did before, or none.
    pub fn numbered_by(&self, sequence: pg_sys::Oid) -> bool {
        self.sequence.swap(sequence.to_u32(), Ordering::AcqRel) != sequence.to_u32()
    }

    pub fn pid(&self) -> i32 {
        self.pid.load(Ordering::Acquire)
    }

    /// The worker has come.
    pub fn attach(&self, pid: i32, latch: *mut pg_sys::Latch) {
        self.work.store(Work::Some as u8, Ordering::Release);
        self.schedule.store(true, Ordering::Release);
        self.latch.store(latch, Ordering::Release);
        self.pid.store(pid, Ordering::Release);
    }

    /// The worker goes.
    pub fn detach(&self) {
        self.latch.store(ptr::null_mut(), Ordering::Release);
        self.pid.store(0, Ordering::Release);
    }

    /// Events were committed. A burst is one wake: the first to raise the flag sets the latch.
    pub fn announce_work(&self) {
        if self.work.swap(Work::Some as u8, Ordering::SeqCst) == Work::None as u8 {
            set_latch(&self.latch);
        }
    }

    /// Events are being published. A worker that has not looked for a while is woken, to be ready when they are committed.
    pub fn announce_publishing(&self) {
        let idle_ms = clock_ms().saturating_sub(self.looked_at_ms.load(Ordering::Relaxed));
        if idle_ms >= COLD_AFTER_MS && !self.has_work() && !self.publishing.swap(true, Ordering::SeqCst) {
            set_latch(&self.latch);
        }
    }

    /// Whether that was announced. It counts as a look.
    pub fn take_publishing(&self) -> bool {
        let is_publishing = self.publishing.swap(false, Ordering::SeqCst);
        if is_publishing {
            self.looks();
        }
        is_publishing
    }

    /// The worker looks, now.
    fn looks(&self) {
        self.looked_at_ms.store(clock_ms(), Ordering::Relaxed);
    }

    pub fn announce_schedule(&self) {
        if !self.schedule.swap(true, Ordering::SeqCst) {
            set_latch(&self.latch);
        }
    }

    pub fn nudge(&self) {
        self.nudge.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub fn wake(&self) {
        set_latch(&self.latch);
    }

    pub fn has_work(&self) -> bool {
        self.work.load(Ordering::Acquire) == Work::Some as u8
    }

    /// The worker is about to sleep for a moment, and need not be woken.
    pub fn sleep(&self) {
        self.change_work(Work::None, Work::Asleep);
    }

    pub fn wake_up(&self) {
        self.change_work(Work::Asleep, Work::None);
    }

    fn change_work(&self, from: Work, to: Work) {
        // Otherwise there is work meanwhile.
        let _ = self
            .work
            .compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Lowers the flag; the snapshot must be taken after, so that what is committed later raises it again.
    pub fn take_work(&self) {
        self.looks();
        self.work.swap(Work::None as u8, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    pub fn take_schedule(&self) -> bool {
        self.schedule.swap(false, Ordering::SeqCst)
    }

    pub fn take_nudge(&self) -> bool {
        self.nudge.swap(false, Ordering::SeqCst)
    }

    /// A process wants the database to itself; one at a time is enough, the database's own lock orders the rest.
    pub fn hold(&self, pid: i32) {
        self.holder.store(pid, Ordering::SeqCst);
        set_latch(&self.latch);
    }

    pub fn release(&self, pid: i32) {
        let _ = self.holder.compare_exchange(pid, 0, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Whether a living process holds the database.
    pub fn is_held(&self) -> bool {
        let holder = self.holder.load(Ordering::SeqCst);
        if holder == 0 {
            return false;
        }
        // SAFETY: signal 0 only asks whether the process exists.
        if unsafe { libc::kill(holder, 0) } == 0 {
            return true;
        }
        self.release(holder);
        false
    }
}
