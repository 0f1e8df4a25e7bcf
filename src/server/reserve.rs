//! Memory that each process keeps back for the time when it gets no more.
//!
//! Then Postgres raises an ERROR, and our code must leave with it. That needs some memory too. pgrx copies each ERROR
//! that crosses Rust: without memory for the copy, its guard catches the ERROR of its own copying, again and again,
//! until Postgres has no place for another one, which is a PANIC of the server. And where Rust gets no memory, it ends
//! the process, and so all sessions.
//!
//! So the reserve is given up when an ERROR says that memory has run out, and when Rust gets none. Whoever enters our
//! code next takes it again, or is refused with an ERROR. What is larger than the reserve, or can be done without, is
//! asked for (`relay::failure::memory`). If all that does not help, the process ends by itself, with a FATAL error.
//! Only the main thread can do so: another thread waits for memory, and after a while asks the main thread to end.

use crate::server::{out_of_memory, scoped, unguarded};
use pgrx::PgSqlErrorCode;
use relay::failure::memory;
use relay::fault;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Enough for a few copies of an ERROR. A memory context that has grown takes a megabyte at once, even for a small one.
/// Nothing is written into the reserve, so it is address space and no memory.
const SIZE: usize = 4 << 20;

/// How long a thread beside the main thread waits for memory before it asks the main thread to end the process: others
/// may free some.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long it then still waits. The main thread may be waiting for a lock of this thread, or for a disk.
const LAST_PATIENCE: Duration = Duration::from_secs(60);
const TRY_AGAIN: Duration = Duration::from_millis(100);

/// What a thread waits for in vain, in bytes. 0: none does.
static MISSED: AtomicUsize = AtomicUsize::new(0);
static KEPT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());

/// Keeps the reserve. False: there is no memory for it.
#[inline]
pub(crate) fn take() -> bool {
    !KEPT.load(Ordering::Relaxed).is_null() || take_again()
}

#[cold]
fn take_again() -> bool {
    let mut new = mapped();
    if new.is_null() {
        // Freed memory may still belong to the allocator.
        // SAFETY: gives back what is free.
        unsafe { libc::malloc_trim(0) };
        new = mapped();
    }
    if new.is_null() {
        return false;
    }
    let before = KEPT.swap(new, Ordering::Relaxed);
    release(before);
    true
}

/// As much new memory as the reserve has; null: there is not so much.
fn mapped() -> *mut c_void {
    let (access, kind) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: new memory, which nobody else knows.
    let new = unsafe { libc::mmap(ptr::null_mut(), SIZE, access, kind, -1, 0) };
    match new == libc::MAP_FAILED {
        true => ptr::null_mut(),
        false => new,
    }
}

/// Whether as much memory as the reserve has is there beside it.
pub(crate) fn is_there_more() -> bool {
    release(mapped())
}

/// Gives the reserve up. False: it was given up before.
fn give_up() -> bool {
    release(KEPT.swap(ptr::null_mut(), Ordering::Relaxed))
}

fn release(memory: *mut c_void) -> bool {
    // SAFETY: memory of this size that only the caller has, because it was exchanged.
    !memory.is_null() && unsafe { libc::munmap(memory, SIZE) == 0 }
}

/// Gives the reserve up if the error that is being reported is that memory has run out.
///
/// # Safety
/// Within a callback for error reports.
pub(crate) unsafe fn give_up_if_needed() {
    // SAFETY: the caller's promise.
    if unsafe { unguarded::geterrcode() } == PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY as i32 {
        give_up();
    }
}

/// Runs `f`, and gives the reserve up if memory runs out meanwhile. Panics pass.
pub(crate) fn watching<R>(f: impl FnOnce() -> R) -> R {
    // No pg_guard: it must not unwind, and does not fail.
    // SAFETY: only Postgres calls this.
    unsafe extern "C-unwind" fn on_error(_none: *mut c_void) {
        // SAFETY: called while an error is reported.
        unsafe { give_up_if_needed() };
    }
    // SAFETY: the callback ignores its argument; a panic is caught.
    let outcome =
        unsafe { scoped::with_error_callback(on_error, ptr::null_mut(), || catch_unwind(AssertUnwindSafe(f))) };
    outcome.unwrap_or_else(|payload| resume_unwind(payload))
}

/// The memory of all Rust code in this library: the system's, and the reserve if that has none.
struct Memory;

#[global_allocator]
static MEMORY: Memory = Memory;

/// The result of `get`. Null only if whoever asks can do without it, or nothing helps.
#[inline]
fn gotten(size: usize, get: impl Fn() -> *mut u8) -> *mut u8 {
    let get = || match fault::is_starved() {
        true => ptr::null_mut(),
        false => get(),
    };
    let memory = get();
    match memory.is_null() {
        true => gotten_after_all(size, get),
        false => memory,
    }
}

#[cold]
fn gotten_after_all(size: usize, get: impl Fn() -> *mut u8) -> *mut u8 {
    if memory::is_asking() {
        return ptr::null_mut();
    }
    if size < SIZE {
        give_up();
    }
    // Another thread may have given it up.
    let mut memory = get();
    if memory.is_null() && is_main_thread() {
        out_of_memory::end_process(size);
    }
    let mut waited = Duration::ZERO;
    while memory.is_null() && waited < PATIENCE + LAST_PATIENCE {
        if waited == PATIENCE {
            MISSED.store(size, Ordering::Relaxed);
            // SAFETY: Postgres's handler sets the latch of the main thread, which alone takes signals.
            unsafe { libc::kill(libc::getpid(), libc::SIGUSR1) };
        }
        thread::sleep(TRY_AGAIN);
        waited += TRY_AGAIN;
        memory = get();
    }
    memory
}

/// Ends the process if another of its threads waits for memory in vain. In the main thread.
pub(crate) fn end_if_a_thread_gets_none() {
    let missed = MISSED.load(Ordering::Relaxed);
    if missed > 0 {
        out_of_memory::end_process(missed);
    }
}

fn is_main_thread() -> bool {
    // SAFETY: they only tell numbers.
    unsafe { libc::gettid() == libc::getpid() }
}

// SAFETY: the system's allocator does the work. The reserve is memory of its own.
unsafe impl GlobalAlloc for Memory {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        gotten(layout.size(), || unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        gotten(layout.size(), || unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise. What fails leaves the memory as it was.
        gotten(size, || unsafe { System.realloc(memory, layout, size) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) };
    }
}
