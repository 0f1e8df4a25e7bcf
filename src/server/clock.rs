//! Clocks that can be read anywhere, even in a callback that must not fail.

/// Milliseconds of a clock that all processes share and that nobody can set.
pub(crate) fn since_boot_ms() -> u64 {
    let time = read(libc::CLOCK_MONOTONIC);
    time.tv_sec as u64 * 1_000 + time.tv_nsec as u64 / 1_000_000
}

/// The time of day, in microseconds since 1970.
pub(crate) fn wall_us() -> i64 {
    let time = read(libc::CLOCK_REALTIME);
    time.tv_sec * 1_000_000 + time.tv_nsec / 1_000
}

fn read(clock: libc::clockid_t) -> libc::timespec {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: reads a clock that always exists.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time
}
