//! Whether this data directory was a streaming standby that was promoted. Such a server takes over from a guard's owner
//! by itself; a copy of the same data does not (see `relay::guard::claim`).
//!
//! The server's start shows whether it is a standby (`standby.signal`), and its time as a standby shows whether it
//! streamed. Both are kept in a small file in the data directory, so that a restart of the standby or a crash after the
//! promotion does not lose them. The file names the directory's place, so that it is ignored in a copy.

use crate::server::guc::LogLevel;
use crate::server::place::{place, system};
use crate::server::process::{self, log};
use pgrx::{pg_guard, pg_sys};
use relay::guard::place::{Likeness, compare};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

const FILE: &str = "outbox_relay.standby";
const NEW_FILE: &str = "outbox_relay.standby.new";
/// How often to look whether anything was streamed: at first, and later.
const LOOK_WAIT: Duration = Duration::from_millis(100);
const LONGEST_LOOK_WAIT: Duration = Duration::from_secs(5);

/// How this run of the server began. Set by the postmaster, and inherited by its children.
static BEGAN_AS: AtomicU8 = AtomicU8::new(PRIMARY);
const PRIMARY: u8 = 0;
const STANDBY: u8 = 1;
/// With a recovery from an archive, perhaps up to a target.
const RECOVERY: u8 = 2;

/// Settings that end a recovery at a target.
const TARGETS: [&std::ffi::CStr; 5] = [
    c"recovery_target",
    c"recovery_target_lsn",
    c"recovery_target_name",
    c"recovery_target_time",
    c"recovery_target_xid",
];

/// Notes how this server starts. The postmaster calls this once, in the data directory. Returns whether the server
/// starts as a standby.
pub(crate) fn install() -> bool {
    let began_as = if Path::new("standby.signal").exists() {
        STANDBY
    } else if Path::new("recovery.signal").exists() {
        RECOVERY
    } else {
        PRIMARY
    };
    BEGAN_AS.store(began_as, Ordering::Relaxed);
    began_as == STANDBY
}

/// Entry point of the process that waits on a standby until something has been streamed, writes that down and ends.
#[pg_guard]
#[unsafe(no_mangle)]
pub extern "C-unwind" fn outbox_relay_standby(_argument: pg_sys::Datum) {
    process::take_signals();
    process::prepare_to_wait(c"OutboxRelayStandby", None);
    let mut wait = LOOK_WAIT;
    // SAFETY: reads shared state.
    while !process::is_told_to_end() && unsafe { pg_sys::RecoveryInProgress() } {
        if let Some(timeline) = streamed_timeline() {
            keep(&Seen::Streamed { timeline });
            break;
        }
        process::wait(Some(wait));
        wait = (wait + wait / 10).min(LONGEST_LOOK_WAIT);
    }
    // SAFETY: ends the process; it is not started again.
    unsafe { pg_sys::proc_exit(0) };
}

/// Notes a promotion. The launcher calls this when recovery has ended.
pub(crate) fn note_promotion() {
    // SAFETY: the timeline of a server that has recovered; existing settings, as text.
    let (present, has_target) = unsafe {
        let is_set = |name: &&std::ffi::CStr| {
            let value = pg_sys::GetConfigOption(name.as_ptr(), true, false);
            !value.is_null() && *value != 0
        };
        (pg_sys::GetWALInsertionTimeLine(), TARGETS.iter().any(is_set))
    };
    let is_promoted = match (BEGAN_AS.load(Ordering::Relaxed), seen()) {
        (STANDBY, _) if has_target => false,
        (STANDBY, Some(Seen::Streamed { .. })) => true,
        // Already noted before one of the server's processes crashed.
        (STANDBY, Some(Seen::Promoted { timeline })) if timeline == present => return,
        (STANDBY, _) => streamed_timeline().is_some(),
        (RECOVERY, _) => false,
        // The server ended right after the promotion, before it was noted.
        (_, Some(Seen::Streamed { timeline })) => timeline < present,
        (_, _) => return,
    };
    if is_promoted {
        keep(&Seen::Promoted { timeline: present });
    } else {
        // Usually there is no such file.
        let _ = fs::remove_file(FILE);
    }
}

/// The timeline that this data directory was last promoted to; 0: it never was.
pub(crate) fn promoted_to() -> u32 {
    match seen() {
        Some(Seen::Promoted { timeline }) => timeline,
        Some(Seen::Streamed { .. }) | None => 0,
    }
}

/// The timeline that was received from another server since the server started.
fn streamed_timeline() -> Option<u32> {
    let (mut before, mut timeline) = (0, 0);
    // SAFETY: reads what the WAL receiver has left, under its lock.
    let flushed = unsafe { pg_sys::GetWalRcvFlushRecPtr(&mut before, &mut timeline) };
    // At the point where streaming was to begin, both positions are equal.
    (flushed != before).then_some(timeline)
}

/// What is known of this data directory.
enum Seen {
    /// As a standby, it received this timeline from another server.
    Streamed { timeline: u32 },
    /// After that, it was promoted to this one.
    Promoted { timeline: u32 },
}

/// The content of the file, if it belongs to this directory.
fn seen() -> Option<Seen> {
    let text = fs::read_to_string(FILE).ok()?;
    let mut words = text.trim_end().splitn(4, ' ');
    let (kind, timeline) = (words.next()?, words.next()?.parse().ok()?);
    let (of_system, found) = (words.next()?, words.next()?);
    if of_system != system() || compare(found, &place()) == Likeness::Elsewhere {
        return None;
    }
    match kind {
        "streamed" => Some(Seen::Streamed { timeline }),
        "promoted" => Some(Seen::Promoted { timeline }),
        _ => None,
    }
}

fn keep(seen: &Seen) {
    let (kind, timeline) = match seen {
        Seen::Streamed { timeline } => ("streamed", timeline),
        Seen::Promoted { timeline } => ("promoted", timeline),
    };
    let text = format!("{kind} {timeline} {} {}\n", system(), place());
    if let Err(error) = write_durably(&text) {
        log(
            LogLevel::Warning,
            &format!("could not write {FILE}: {error}"),
            None,
            Some("If this standby is promoted and then restarted before it owns its backends, run outbox.take_over()."),
        );
    }
}

fn write_durably(text: &str) -> io::Result<()> {
    let mut file = File::create(NEW_FILE)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(NEW_FILE, FILE)?;
    File::open(".")?.sync_all()
}
