//! Threads beside the process's main thread. They touch nothing of Postgres, and get no signals.

use crate::server::reserve;
use pgrx::pg_sys;
use std::io;
use std::thread;
use std::time::Duration;

/// How long the main thread has to notice by itself that the postmaster is gone.
const GRACE: Duration = Duration::from_secs(1);

/// Starts a thread with all signals blocked in it: only the main thread handles signals. There must be memory for more
/// than its stack: the C library ends the process if a new thread cannot have its variables.
pub(crate) fn without_signals<R>(spawn: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
    if !reserve::is_there_more() {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    // SAFETY: the mask is saved, and restored on all paths: spawn returns its errors.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let spawned = spawn();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        spawned
    }
}

/// Makes this process end soon after its postmaster, whatever its main thread does then. Postgres looks only where it
/// waits for a latch: a process that computes, runs a trigger of others or waits for a lock of shared memory lives on,
/// and as long as it does, the server cannot start again.
pub(crate) fn end_with_the_postmaster() -> io::Result<()> {
    // SAFETY: a plain read. The descriptor stays open as long as the process.
    let alive = unsafe { pg_sys::postmaster_alive_fds[pg_sys::POSTMASTER_FD_WATCH as usize] };
    let watch = move || {
        wait_for_end_of_file(alive);
        thread::sleep(GRACE);
        // SAFETY: ends the process with its threads. Without a postmaster, what is in shared memory has no further use.
        unsafe { libc::_exit(1) }
    };
    without_signals(|| {
        let thread = thread::Builder::new().name("postmaster".into());
        thread.stack_size(64 * 1024).spawn(watch).map(drop)
    })
}

/// Waits until everybody who could write to the pipe has gone. Nobody ever does write.
fn wait_for_end_of_file(pipe: i32) {
    let mut waited = libc::pollfd {
        fd: pipe,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, which lives during the call. A negative result means that the call was interrupted.
    while unsafe { libc::poll(&mut waited, 1, -1) } <= 0 {}
}
