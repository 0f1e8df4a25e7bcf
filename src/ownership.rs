//! Who this server is to the guards: its incarnation, its place, its history.
//!
//! An incarnation is one run of the server, from a start, a promotion or a crash to its end. It is named in shared memory by the
//! launcher, and saved durably in the database before the first guard is claimed in its name: so whoever has a later copy of this
//! database knows it, and whoever has an earlier one doesn't.

use crate::process::{self, Aborted};
use crate::shmem::{self, Began};
use crate::tables::sql::{query, run, text, value, words};
use crate::{copies, guc, standby, ticker, uuid};
use pgrx::datum::DatumWithOid;
use pgrx::{pg_extern, pg_sys};
use relay::claim::Incarnation;
use relay::encode::hyphenated;
use relay::guard::Owner;
use relay::place::Place;
use std::ffi::{CStr, c_void};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::UNIX_EPOCH;

/// Incarnations that are remembered.
const KEPT_INCARNATIONS: i64 = 1_000;

// SAFETY: the declarations of access/timeline.h; called within a guard, since they may raise an ERROR.
unsafe extern "C-unwind" {
    fn tliInHistory(timeline: pg_sys::TimeLineID, history: *mut c_void) -> bool;
    fn readTimeLineHistory(timeline: pg_sys::TimeLineID) -> *mut c_void;
    fn tliSwitchPoint(
        timeline: pg_sys::TimeLineID,
        history: *mut c_void,
        next: *mut pg_sys::TimeLineID,
    ) -> pg_sys::XLogRecPtr;
}

/// Names this run of the server. Called by the launcher when it starts, which is right after recovery.
pub fn begin_incarnation() {
    // SAFETY: reads positions of the WAL.
    let started_at = unsafe {
        match pg_sys::GetXLogReplayRecPtr(std::ptr::null_mut()) {
            // Nothing was replayed: it had been shut down.
            0 => pg_sys::GetXLogInsertRecPtr(),
            replayed => replayed,
        }
    };
    // SAFETY: reads the counter under its lock, and the clock.
    let (first_xid, now) = unsafe { (pg_sys::ReadNextFullTransactionId().value, pg_sys::GetCurrentTimestamp()) };
    shmem::name_incarnation(uuid::new_v7(now), Began { started_at, first_xid });
}

/// This server as guards name it.
pub struct Identity {
    incarnation: String,
    system: String,
    timeline: u32,
    place: String,
    /// See [`standby::promoted_to`].
    promoted_to: u32,
}

/// A run of this server, or of the one that it is a copy of.
pub struct Run {
    incarnation: String,
    pub system: String,
    pub timeline: i64,
    pub place: String,
}

impl Identity {
    /// Saves the incarnation durably, if it is not yet.
    pub fn establish() -> Result<Option<Self>, Aborted> {
        let Some((name, began)) = shmem::incarnation() else {
            return Ok(None);
        };
        let identity = Self {
            incarnation: String::from_utf8_lossy(&hyphenated(&name)).into_owned(),
            system: system(),
            // SAFETY: reads what the server knows of itself.
            timeline: unsafe { pg_sys::GetWALInsertionTimeLine() },
            place: place(),
            promoted_to: standby::promoted_to(),
        };
        process::transaction(|| identity.save(began))?;
        ticker::flush();
        Ok(Some(identity))
    }

    fn save(&self, Began { started_at, first_xid }: Began) {
        let known = query(
            "select incarnation::text, system, timeline, place from outbox.incarnations order by number desc limit 1",
            &[],
            |row| Run {
                incarnation: value(row, 1).unwrap_or_default(),
                system: value(row, 2).unwrap_or_default(),
                timeline: value(row, 3).unwrap_or_default(),
                place: text(row, 4).unwrap_or_default(),
            },
        );
        let previous = known.first();
        if previous.is_some_and(|run| run.incarnation == self.incarnation) {
            return;
        }
        if let Some(run) = previous {
            copies::note_if_copy_of(run, self);
        }
        let ended = match previous {
            Some(Run { timeline, .. }) if *timeline != i64::from(self.timeline) => {
                switch_point(*timeline as u32, self.timeline).min(started_at)
            }
            _ => started_at,
        };
        run(
            "insert into outbox.incarnations (incarnation, system, timeline, previous_ended_lsn, first_xid, place)
            values ($1::uuid, $2, $3, '0/0'::pg_lsn + $4::text::numeric, $5::xid8, $6)",
            &[
                self.incarnation.clone().into(),
                self.system.clone().into(),
                i64::from(self.timeline).into(),
                ended.to_string().into(),
                first_xid.to_string().into(),
                words(&self.place),
            ],
        );
        run(
            "delete from outbox.incarnations i where i.number <= (select max(number) from outbox.incarnations) - $1",
            &[KEPT_INCARNATIONS.into()],
        );
    }

    /// What we know of an incarnation that a guard names. Within a transaction.
    pub fn know(&self, incarnation: &str) -> Incarnation {
        if incarnation == self.incarnation {
            return Incarnation::Current;
        }
        let parsed = |text: Option<String>| text.and_then(|text| text.parse().ok());
        let next = query(
            "select (n.previous_ended_lsn - '0/0'::pg_lsn)::text, n.first_xid::text
            from outbox.incarnations i join outbox.incarnations n on n.number > i.number
            where i.incarnation::text = $1 order by n.number limit 1",
            &[DatumWithOid::from(incarnation.to_owned())],
            |row| Some((parsed(value(row, 1))?, parsed(value(row, 2))?)),
        );
        match next.first().copied().flatten() {
            Some((ended, next_xid)) => Incarnation::Earlier { ended, next_xid },
            None => Incarnation::Unknown,
        }
    }

    pub fn system(&self) -> &str {
        &self.system
    }

    pub fn place(&self) -> &str {
        &self.place
    }

    pub fn promoted_to(&self) -> u32 {
        self.promoted_to
    }

    pub fn owner(&self) -> Owner {
        Owner {
            incarnation: self.incarnation.clone(),
            system: self.system.clone(),
            timeline: self.timeline,
            place: self.place.clone(),
            interval: guc::millis(&guc::POLL_INTERVAL_MS),
        }
    }
}

/// Where a timeline ended that the present one descends from; 0: it doesn't.
fn switch_point(timeline: u32, present: u32) -> u64 {
    // SAFETY: reads the history file of the present timeline, in a transaction; an ERROR aborts that.
    unsafe {
        pg_sys::ffi::pg_guard_ffi_boundary(|| {
            let history = readTimeLineHistory(present);
            match tliInHistory(timeline, history) {
                true => tliSwitchPoint(timeline, history, std::ptr::null_mut()),
                false => 0,
            }
        })
    }
}

/// `outbox.here()`: the timeline and the directory, which a promoted standby or a copy does not share.
#[pg_extern(sql = false)]
pub fn here() -> String {
    // SAFETY: reads what the server knows of itself; only a primary is asked for. A zero-terminated path.
    let (timeline, directory) = unsafe {
        pg_sys::PreventCommandDuringRecovery(c"outbox.here()".as_ptr());
        (pg_sys::GetWALInsertionTimeLine(), CStr::from_ptr(pg_sys::DataDir))
    };
    format!("{timeline:08X} {}", directory.to_string_lossy())
}

/// The system identifier, which a base backup keeps.
pub fn system() -> String {
    // SAFETY: reads what the server knows of itself.
    unsafe { pg_sys::GetSystemIdentifier() }.to_string()
}

/// Where this server lives, see [`Place`].
pub fn place() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    // SAFETY: a zero-terminated path, set when the server started.
    let directory = unsafe { CStr::from_ptr(pg_sys::DataDir).to_string_lossy().into_owned() };
    let found = fs::metadata(&directory);
    let (device, inode) = found.as_ref().map(|m| (m.dev(), m.ino())).unwrap_or_default();
    let made_at = found.and_then(|m| m.created()).ok();
    let birth_us = made_at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    // Zero: the file system doesn't know.
    let birth_us = birth_us.map(|at| at.as_micros() as u64).filter(|us| *us > 0);
    let boot: String = read("/proc/sys/kernel/random/boot_id").chars().take(18).collect();
    let host = read("/proc/sys/kernel/hostname");
    Place::new(&host, &directory, device, inode, birth_us, &boot).to_string()
}

/// A random name for a claim.
pub fn token() -> String {
    let mut bytes = [0u8; 16];
    // SAFETY: fills the buffer that it is given.
    unsafe { pg_sys::pg_strong_random(bytes.as_mut_ptr().cast(), bytes.len()) };
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
