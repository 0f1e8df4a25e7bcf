//! What guards record about this server: its incarnation, its place, its history.
//!
//! An incarnation is one run of the server, from a start, a promotion or a crash to its end. The launcher sets it in
//! shared memory. It is saved durably in the database before the first guard is claimed in its name. So a server with a
//! later copy of this database recognises it, and a server with an earlier copy does not.

use crate::server::guc::{self, TakeOver};
use crate::server::place::{lineage, place, system};
use crate::server::process::{self, Aborted};
use crate::server::shmem::{self, Began};
use crate::server::standby;
use crate::tables::sql::{query, run, run_named, words};
use crate::tables::ticks;
use pgrx::datum::DatumWithOid;
use pgrx::pg_sys;
use relay::event::text::hyphenated;
use relay::guard::Owner;
use relay::guard::claim::Incarnation;
use relay::guard::place::{Likeness, compare};
use std::ffi::c_void;

/// How many incarnations are kept.
const KEPT_INCARNATIONS: i64 = 1_000;

// SAFETY: the declarations of access/timeline.h; called within a guard, because they may raise an ERROR.
unsafe extern "C-unwind" {
    fn tliInHistory(timeline: pg_sys::TimeLineID, history: *mut c_void) -> bool;
    fn readTimeLineHistory(timeline: pg_sys::TimeLineID) -> *mut c_void;
    fn tliSwitchPoint(
        timeline: pg_sys::TimeLineID,
        history: *mut c_void,
        next: *mut pg_sys::TimeLineID,
    ) -> pg_sys::XLogRecPtr;
}

/// What guards record about this server.
pub(crate) struct Identity {
    incarnation: String,
    system: String,
    lineage: String,
    timeline: u32,
    place: String,
    /// See [`standby::promoted_to`].
    promoted_to: u32,
}

/// A run of this server, or of the server that it was copied from.
pub(crate) struct Run {
    incarnation: String,
    lineage: String,
    pub timeline: i64,
    pub place: String,
}

impl Identity {
    /// Saves the incarnation durably, unless it was saved already.
    pub(crate) fn establish() -> Result<Option<Self>, Aborted> {
        let Some((name, began)) = shmem::incarnation() else {
            return Ok(None);
        };
        let identity = Self {
            incarnation: String::from_utf8_lossy(&hyphenated(&name)).into_owned(),
            system: system(),
            lineage: lineage(),
            // SAFETY: reads what the server knows of itself.
            timeline: unsafe { pg_sys::GetWALInsertionTimeLine() },
            place: place(),
            promoted_to: standby::promoted_to(),
        };
        process::transaction(|| identity.save(began))?;
        ticks::flush();
        Ok(Some(identity))
    }

    fn save(&self, Began { started_at, first_xid }: Began) {
        let known = query(
            "select incarnation::text, lineage, timeline, place from outbox.incarnations order by number desc limit 1",
            &[],
            |row| Run {
                incarnation: row.value("incarnation").unwrap_or_default(),
                lineage: row.value("lineage").unwrap_or_default(),
                timeline: row.value("timeline").unwrap_or_default(),
                place: row.text("place").unwrap_or_default(),
            },
        );
        let previous = known.first();
        if previous.is_some_and(|run| run.incarnation == self.incarnation) {
            return;
        }
        if let Some(run) = previous {
            note_if_copy_of(run, self);
        }
        let ended = match previous {
            Some(Run { timeline, .. }) if *timeline != i64::from(self.timeline) => {
                switch_point(*timeline as u32, self.timeline).min(started_at)
            }
            _ => started_at,
        };
        run_named(
            "insert into outbox.incarnations
                (incarnation, lineage, timeline, previous_ended_lsn, first_xid, place)
            values ($incarnation::uuid, $lineage, $timeline, '0/0'::pg_lsn + $ended::text::numeric,
                $first_xid::xid8, $place)",
            [
                ("incarnation", self.incarnation.clone().into()),
                ("lineage", self.lineage.clone().into()),
                ("timeline", i64::from(self.timeline).into()),
                ("ended", ended.to_string().into()),
                ("first_xid", first_xid.to_string().into()),
                ("place", words(&self.place)),
            ],
        );
        run(
            "delete from outbox.incarnations i where i.number <= (select max(number) from outbox.incarnations) - $1",
            &[KEPT_INCARNATIONS.into()],
        );
    }

    /// What this database knows of an incarnation that a guard names. Within a transaction.
    pub(crate) fn know(&self, incarnation: &str) -> Incarnation {
        if incarnation == self.incarnation {
            return Incarnation::Current;
        }
        let parsed = |text: Option<String>| text.and_then(|text| text.parse().ok());
        let next = query(
            "select (n.previous_ended_lsn - '0/0'::pg_lsn)::text as ended, n.first_xid::text
            from outbox.incarnations i join outbox.incarnations n on n.number > i.number
            where i.incarnation::text = $1 order by n.number limit 1",
            &[DatumWithOid::from(incarnation.to_owned())],
            |row| Some((parsed(row.value("ended"))?, parsed(row.value("first_xid"))?)),
        );
        match next.first().copied().flatten() {
            Some((ended, next_xid)) => Incarnation::Earlier { ended, next_xid },
            None => Incarnation::Unknown,
        }
    }

    pub(crate) fn system(&self) -> &str {
        &self.system
    }

    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    pub(crate) fn promoted_to(&self) -> u32 {
        self.promoted_to
    }

    pub(crate) fn owner(&self) -> Owner {
        Owner {
            incarnation: self.incarnation.clone(),
            system: self.system.clone(),
            timeline: self.timeline,
            place: self.place.clone(),
            interval: guc::millis(&guc::POLL_INTERVAL_MS),
        }
    }
}

/// Where a timeline ended from which the present one descends. 0: the present one does not descend from it.
fn switch_point(timeline: u32, present: u32) -> u64 {
    // SAFETY: reads the history file of the present timeline, in a transaction, which an ERROR aborts.
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

/// Records that this server is a copy, if its previous run was in another place. `before`: that run, as this database
/// records it.
fn note_if_copy_of(before: &Run, us: &Identity) {
    let is_here = compare(&before.place, us.place()) != Likeness::Elsewhere;
    let is_promoted = i64::from(us.promoted_to()) > before.timeline;
    // pg_upgrade moves the data to a directory of another initdb. An upgraded server cannot tell whether it is a copy.
    let is_upgraded = before.lineage != us.lineage;
    if is_here || is_promoted || is_upgraded || guc::TAKE_OVER.get() == TakeOver::Any {
        return;
    }
    run(
        "insert into outbox.copied_backends (backend_number, original, is_database)
        select b.number, $1, false from outbox.backends b on conflict (backend_number) do nothing",
        &[words(&before.place)],
    );
}
