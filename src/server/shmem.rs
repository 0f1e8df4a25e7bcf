//! The shared memory: a *slot* for each database that has a worker or is to have one ([`DatabaseSlot`]), and a header
//! for all.
//!
//! The launcher assigns a slot to each database that is to have a worker. A session that publishes in a database
//! without a slot assigns one too. Only the launcher takes slots back: when the database has been dropped, or when
//! nothing was ever published there.

use crate::server::database_slot::{DatabaseSlot, SlotState, set_latch};
use crate::server::meters;
use crate::server::questions::{Asked, Heard, QUESTIONS, Question};
use crate::server::unguarded::{self, NamedLock};
use pgrx::pg_sys;
use std::cell::Cell;
use std::mem::size_of;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Slots in addition to two for each of `max_worker_processes`. They are for databases that wait for a process, so that
/// their sessions can see that.
const ROOM: usize = 1_024;
/// How many databases can be announced between two rounds of the launcher. If there are more, it looks into all.
const ANNOUNCEMENTS: usize = 64;

/// The header. The slots follow it in memory.
#[repr(C)]
struct Shared {
    /// How many slots there are.
    slot_count: AtomicUsize,
    /// Changes whenever a slot is assigned or taken back.
    generation: AtomicU64,
    /// Whether the last database that needed a slot got none.
    is_full: AtomicBool,
    /// Whether databases may have been created, dropped or changed.
    rescan: AtomicBool,
    /// Whether more databases were announced than fit.
    look_everywhere: AtomicBool,
    /// Databases in which the extension was created. 0: free entry.
    announced: [AtomicU32; ANNOUNCEMENTS],
    /// Whether a transaction that created the extension was prepared since the server's start.
    extension_prepared: AtomicBool,
    /// Whether a transaction that changed backends was prepared, or may have been before the server's start.
    backends_prepared: AtomicBool,
    launcher_latch: AtomicPtr<pg_sys::Latch>,
    /// 0: there is no launcher.
    launcher_pid: AtomicI32,
    questions: [Question; QUESTIONS],
    /// The incarnation: this run of the server, from its start, promotion or crash to its end. Zeroes: not set yet.
    incarnation: [AtomicU64; 2],
    /// Where it began, see [`Began`].
    started_at_lsn: AtomicU64,
    first_xid: AtomicU64,
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(ptr::null_mut());

thread_local! {
    /// The slot of the process's own database, or that it has none, as of a generation.
    static HERE: Cell<(u64, Option<&'static DatabaseSlot>)> = const { Cell::new((u64::MAX, None)) };
}

fn slots_wanted() -> usize {
    if relay::fault::is_mutated(relay::fault::Mutation::FewDatabaseSlots) {
        return max_worker_processes() / 2;
    }
    2 * max_worker_processes() + ROOM
}

fn max_worker_processes() -> usize {
    // SAFETY: a plain read of a setting that does not change after the server's start.
    unsafe { pg_sys::max_worker_processes }.max(0) as usize
}

fn size(slots: usize) -> usize {
    size_of::<Shared>() + slots * size_of::<DatabaseSlot>()
}

/// Requests the shared memory.
///
/// # Safety
/// At the only time when space may be requested.
pub(crate) unsafe fn request() {
    // SAFETY: the caller's promise.
    unsafe { unguarded::RequestAddinShmemSpace(size(slots_wanted()) + meters::size()) };
}

/// Finds or creates the shared memory.
///
/// # Safety
/// When Postgres's shared memory exists, in a frame that holds nothing.
pub(crate) unsafe fn attach() {
    // SAFETY: the caller's promise; the lock is the one intended for this. Zeroes are the valid empty state of every
    // field.
    unsafe {
        let lock = NamedLock::AddinShmemInit.get();
        unguarded::LWLockAcquire(lock, pg_sys::LWLockMode::LW_EXCLUSIVE);
        let mut found = false;
        let size = size(slots_wanted());
        let block = unguarded::ShmemInitStruct(c"outbox_relay".as_ptr(), size, &mut found).cast::<Shared>();
        if !found {
            ptr::write_bytes(block.cast::<u8>(), 0, size);
            (*block).slot_count.store(slots_wanted(), Ordering::Relaxed);
        }
        SHARED.store(block, Ordering::Release);
        meters::attach();
        unguarded::LWLockRelease(lock);
    }
}

fn shared() -> Option<&'static Shared> {
    // SAFETY: null, or the block that lives as long as the server; all its fields are atomics.
    unsafe { SHARED.load(Ordering::Acquire).as_ref() }
}

fn all_slots() -> &'static [DatabaseSlot] {
    let Some(shared) = shared() else {
        return &[];
    };
    // SAFETY: this many slots follow the header, whose size is a multiple of their alignment.
    unsafe {
        let first = ptr::from_ref(shared).add(1).cast::<DatabaseSlot>();
        std::slice::from_raw_parts(first, shared.slot_count.load(Ordering::Relaxed))
    }
}

const _: () = assert!(size_of::<Shared>().is_multiple_of(align_of::<DatabaseSlot>()));

/// Whether the library was preloaded, so that workers can exist.
pub(crate) fn is_attached() -> bool {
    shared().is_some()
}

/// The slot of the session's own database, if it has one. This is one comparison, unless slots were assigned or taken
/// back since.
pub(crate) fn database_slot_here() -> Option<&'static DatabaseSlot> {
    let generation = shared()?.generation.load(Ordering::Acquire);
    let (known, slot) = HERE.get();
    if known == generation {
        return slot;
    }
    // SAFETY: a plain read of the process's own variable.
    let slot = database_slot_of(unsafe { pg_sys::MyDatabaseId });
    HERE.set((generation, slot));
    slot
}

/// The slot of a database, if it has one.
pub(crate) fn database_slot_of(database: pg_sys::Oid) -> Option<&'static DatabaseSlot> {
    database_slots().find(|slot| slot.database() == database)
}

/// The slot of a database, which is assigned if it has none. `None`: the library is not preloaded, or all slots are
/// taken.
pub(crate) fn claim_database_slot(database: pg_sys::Oid) -> Option<&'static DatabaseSlot> {
    if let Some(slot) = database_slot_of(database) {
        return Some(slot);
    }
    let shared = shared()?;
    let claimed = all_slots().iter().find(|slot| slot.take_for(database));
    shared.is_full.store(claimed.is_none(), Ordering::Release);
    let claimed = claimed?;
    // Two processes may have assigned one at the same time: the lower slot wins, and the other is freed.
    let winner = database_slot_of(database)?;
    if !ptr::eq(winner, claimed) {
        claimed.free();
    }
    shared.generation.fetch_add(1, Ordering::AcqRel);
    Some(winner)
}

/// As [`claim_database_slot`], for the session's own database.
pub(crate) fn claim_database_slot_here() -> Option<&'static DatabaseSlot> {
    // SAFETY: a plain read of the process's own variable.
    database_slot_here().or_else(|| claim_database_slot(unsafe { pg_sys::MyDatabaseId }))
}

/// Takes back a slot that has no worker, and the database's meters. Only the launcher may call this.
pub(crate) fn take_back(slot: &DatabaseSlot) {
    meters::keep_only(slot.database(), |_| false);
    slot.set_state(SlotState::Absent);
    slot.tell_trouble("");
    slot.numbers.forget();
    slot.free();
    if let Some(shared) = shared() {
        shared.generation.fetch_add(1, Ordering::AcqRel);
    }
}

/// All slots in use.
pub(crate) fn database_slots() -> impl Iterator<Item = &'static DatabaseSlot> {
    all_slots().iter().filter(|slot| slot.is_taken())
}

/// Whether there are more databases than slots.
pub(crate) fn is_full() -> bool {
    shared().is_some_and(|s| s.is_full.load(Ordering::Acquire))
}

/// The address of a slot, for its worker: its place and its database. The database is part of it because the slot may
/// be assigned to another one meanwhile.
pub(crate) fn address_of(slot: &'static DatabaseSlot) -> u64 {
    let base = all_slots().as_ptr();
    let index = (std::ptr::from_ref(slot).addr() - base.addr()) / size_of::<DatabaseSlot>();
    (index as u64) << 32 | u64::from(slot.database().to_u32())
}

pub(crate) fn database_slot_at(address: u64) -> Option<&'static DatabaseSlot> {
    let slot = all_slots().get((address >> 32) as usize)?;
    (u64::from(slot.database().to_u32()) == address & u64::from(u32::MAX)).then_some(slot)
}

/// Registers the launcher.
pub(crate) fn attach_launcher(pid: i32, latch: *mut pg_sys::Latch) {
    if let Some(shared) = shared() {
        shared.launcher_latch.store(latch, Ordering::Release);
        shared.launcher_pid.store(pid, Ordering::Release);
    }
}

/// Unregisters the launcher.
pub(crate) fn detach_launcher() {
    if let Some(shared) = shared() {
        shared.launcher_pid.store(0, Ordering::Release);
    }
}

pub(crate) fn wake_launcher() {
    if let Some(shared) = shared() {
        set_latch(&shared.launcher_latch);
    }
}

/// Where a run of the server began: the position in the WAL and the transaction id.
#[derive(Clone, Copy)]
pub(crate) struct Began {
    pub started_at: u64,
    pub first_xid: u64,
}

/// The incarnation of this server, and where it began: as the launcher noted when it first started.
pub(crate) fn incarnation() -> Option<([u8; 16], Began)> {
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

/// Sets the incarnation, if it is not set.
pub(crate) fn name_incarnation(name: [u8; 16], began: Began) {
    if let Some(shared) = shared().filter(|_| incarnation().is_none()) {
        let name = u128::from_be_bytes(name);
        shared.started_at_lsn.store(began.started_at, Ordering::Release);
        shared.first_xid.store(began.first_xid, Ordering::Release);
        shared.incarnation[1].store(name as u64, Ordering::Release);
        shared.incarnation[0].store((name >> 64) as u64, Ordering::Release);
    }
}

/// The process id of the launcher, if there is one.
pub(crate) fn launcher_pid() -> Option<i32> {
    let pid = shared()?.launcher_pid.load(Ordering::Acquire);
    (pid != 0).then_some(pid)
}

/// Makes the launcher look at the list of databases again.
pub(crate) fn request_rescan() {
    if let Some(shared) = shared() {
        shared.rescan.store(true, Ordering::Release);
        set_latch(&shared.launcher_latch);
    }
}

pub(crate) fn take_rescan() -> bool {
    shared().is_some_and(|s| s.rescan.swap(false, Ordering::AcqRel))
}

/// Tells the launcher that the extension was created in a database.
pub(crate) fn announce(database: pg_sys::Oid) {
    let Some(shared) = shared() else {
        return;
    };
    let database = database.to_u32();
    let noted = shared.announced.iter().any(|entry| {
        let before = entry.compare_exchange(0, database, Ordering::AcqRel, Ordering::Acquire);
        before.is_ok() || before == Err(database)
    });
    if !noted {
        shared.look_everywhere.store(true, Ordering::Release);
    }
    set_latch(&shared.launcher_latch);
}

/// The databases that were announced, and whether there may be more.
pub(crate) fn take_announced() -> (Vec<pg_sys::Oid>, bool) {
    let Some(shared) = shared() else {
        return (Vec::new(), false);
    };
    let announced = shared.announced.iter().map(|entry| entry.swap(0, Ordering::AcqRel));
    (
        announced
            .filter(|database| *database != 0)
            .map(pg_sys::Oid::from)
            .collect(),
        shared.look_everywhere.swap(false, Ordering::AcqRel),
    )
}

/// Notes that a transaction which created the extension was prepared. It is not known which COMMIT PREPARED will be the
/// one of this transaction.
pub(crate) fn note_extension_prepared() {
    if let Some(shared) = shared() {
        shared.extension_prepared.store(true, Ordering::Release);
    }
}

pub(crate) fn is_extension_prepared() -> bool {
    shared().is_some_and(|s| s.extension_prepared.load(Ordering::Acquire))
}

/// Notes that a transaction which changed backends was prepared.
pub(crate) fn note_backends_prepared() {
    if let Some(shared) = shared() {
        shared.backends_prepared.store(true, Ordering::Release);
    }
}

pub(crate) fn are_backends_prepared() -> bool {
    shared().is_some_and(|s| s.backends_prepared.load(Ordering::Acquire))
}

/// Asks this database's worker about a backend. `None`: no place for another question is free.
pub(crate) fn ask_about(backend: i32) -> Option<Asked> {
    // SAFETY: a plain read of the process's own variable.
    Question::ask(&shared()?.questions, unsafe { pg_sys::MyDatabaseId }, backend)
}

/// The next question to the worker of this database.
pub(crate) fn hear_question() -> Option<Heard> {
    // SAFETY: as above.
    Question::hear(&shared()?.questions, unsafe { pg_sys::MyDatabaseId })
}
