//! A database's slot in shared memory: what its worker is doing, and what it is to be told. It holds only atomics, so
//! that a commit can wake the worker without locks, allocation or failure.

use crate::server::clock;
use crate::server::shared_text::SharedText;
use pgrx::pg_sys;
use relay::consumers::readership::Interest;
use relay::reading::numbers::Highest;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};

/// A worker that has not looked for events for this long is slower than one that just has: its code and data have left
/// the caches.
const COLD_AFTER_MS: u64 = 10;

/// A session that publishes usually commits within this time. The worker does not wait longer for it.
const COMMITS_WITHIN_MS: u64 = 3;

/// After somebody has looked at consumer groups, the worker keeps asking Redis about them for this long.
const CONSUMERS_WANTED_FOR_MS: u64 = 60_000;

/// A sign of life younger than this need not be asked for again.
const FRESH_MS: u64 = 1_000;

/// What a slot's worker is doing. Next states in brackets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum SlotState {
    /// The worker has found no extension. [Starting]
    Absent = 0,
    /// To be started. [Starting, Short, Failing]
    Wanted = 1,
    /// Started, looking for the extension. [Running, Mismatched, Absent, Unserved, Wanted]
    Starting = 2,
    /// At work. [Wanted, Absent, Unserved]
    Running = 3,
    /// Idle: the library and the extension's SQL have different versions. [Running, Wanted, Absent, Unserved]
    Mismatched = 4,
    /// To be started when a background worker process is free. [Starting]
    Short = 5,
    /// It has ended several times before it was at work. [Starting]
    Failing = 6,
    /// The settings do not name the database any more. [Starting]
    Unserved = 7,
}

impl SlotState {
    fn from_u8(value: u8) -> Self {
        match value {
            1 => Self::Wanted,
            2 => Self::Starting,
            3 => Self::Running,
            4 => Self::Mismatched,
            5 => Self::Short,
            6 => Self::Failing,
            7 => Self::Unserved,
            _ => Self::Absent,
        }
    }
}

/// What a worker is told about commits.
#[repr(u8)]
enum Work {
    /// Nothing was committed. A session that commits events wakes the worker.
    None = 0,
    Some = 1,
    /// Nothing was committed, and nobody need wake the worker, because it looks again in a moment.
    Asleep = 2,
}

/// One database.
#[repr(C)]
pub(crate) struct DatabaseSlot {
    /// Its OID; 0: the slot is free.
    database: AtomicU32,
    state: AtomicU8,
    /// Whether events were committed since the worker last looked, see [`Work`].
    work: AtomicU8,
    /// Scheduled events were committed since the worker last looked.
    schedule: AtomicBool,
    /// Events are being published, after a while without any.
    publishing: AtomicBool,
    /// Somebody has changed a backend.
    nudge: AtomicBool,
    /// Somebody has asked for an attempt now.
    asked: AtomicBool,
    /// Somebody has asked a question, see `questions.rs`.
    has_questions: AtomicBool,
    pid: AtomicI32,
    /// The worker's latch, also in shared memory. Null: no worker.
    latch: AtomicPtr<pg_sys::Latch>,
    /// When the worker last looked for events, see [`clock::since_boot_ms`].
    looked_at_ms: AtomicU64,
    /// When a transaction last published its first event. 0: the worker has looked since.
    published_at_ms: AtomicU64,
    /// When the first commit was announced that the worker has not looked for yet, in microseconds since 1970. 0: no
    /// such commit.
    committed_at_us: AtomicI64,
    /// The highest number that an event has got, see `numbers.rs`.
    pub numbers: Highest,
    /// The sequence that the numbers come from.
    sequence: AtomicU32,
    /// When somebody last read outbox.consumers, or called outbox.health(), see [`clock`]; 0: never.
    consumers_viewed_at_ms: AtomicU64,
    consumers_probed_at_ms: AtomicU64,
    /// When the worker was last asked for a sign of life that it has not given yet, see [`clock`]. 0: it owes none.
    called_at_ms: AtomicU64,
    /// When the worker last began a round, see [`clock`].
    round_at_ms: AtomicU64,
    /// Since when the state is what it is, or there is no worker, see [`clock`].
    state_at_ms: AtomicU64,
    /// What keeps the worker from its work, see `worker/troubles.rs`.
    trouble: SharedText,
}

impl DatabaseSlot {
    pub(crate) fn database(&self) -> pg_sys::Oid {
        pg_sys::Oid::from(self.database.load(Ordering::Acquire))
    }

    pub(crate) fn state(&self) -> SlotState {
        SlotState::from_u8(self.state.load(Ordering::Acquire))
    }

    pub(crate) fn set_state(&self, state: SlotState) {
        if self.state.swap(state as u8, Ordering::AcqRel) != state as u8 {
            self.state_at_ms.store(clock::since_boot_ms(), Ordering::Release);
        }
    }

    /// For how long the state has been what it is, or there has been no worker.
    pub(crate) fn in_state_for_ms(&self) -> u64 {
        clock::since_boot_ms().saturating_sub(self.state_at_ms.load(Ordering::Acquire))
    }

    /// The worker says what keeps it from its work; an empty text: nothing does.
    pub(crate) fn tell_trouble(&self, text: &str) {
        self.trouble.write(text);
    }

    /// What keeps the worker from its work, or has kept the last one.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.trouble.read()
    }

    /// Notes the sequence that events are numbered by. Returns whether the slot had another one or none before.
    pub(crate) fn numbered_by(&self, sequence: pg_sys::Oid) -> bool {
        self.sequence.swap(sequence.to_u32(), Ordering::AcqRel) != sequence.to_u32()
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.load(Ordering::Acquire)
    }

    /// Registers the worker. False: another worker is registered.
    pub(crate) fn attach(&self, pid: i32, latch: *mut pg_sys::Latch) -> bool {
        let attached = self.pid.compare_exchange(0, pid, Ordering::AcqRel, Ordering::Acquire);
        if attached.is_ok() {
            self.work.store(Work::Some as u8, Ordering::Release);
            self.schedule.store(true, Ordering::Release);
            self.begins_round();
            self.tell_trouble("");
            self.latch.store(latch, Ordering::Release);
        }
        attached.is_ok()
    }

    /// Unregisters the worker, if it is this one.
    pub(crate) fn detach(&self, pid: i32) {
        if self.pid() == pid {
            self.latch.store(ptr::null_mut(), Ordering::Release);
            self.state_at_ms.store(clock::since_boot_ms(), Ordering::Release);
            self.pid.store(0, Ordering::Release);
        }
    }

    /// Events were committed. A burst causes one wake: only the first commit, which raises the flag, sets the latch.
    pub(crate) fn announce_work(&self) {
        if self.committed_at_us.load(Ordering::Relaxed) == 0 {
            let now_us = clock::wall_us();
            // On failure another session was first.
            let _ = self
                .committed_at_us
                .compare_exchange(0, now_us, Ordering::AcqRel, Ordering::Relaxed);
        }
        if self.work.swap(Work::Some as u8, Ordering::SeqCst) == Work::None as u8 {
            set_latch(&self.latch);
        }
    }

    /// Events are being published. A worker that has not looked for a while is woken, so that it is ready when they are
    /// committed.
    pub(crate) fn announce_publishing(&self) {
        let now_ms = clock::since_boot_ms();
        // At most once a millisecond: many may publish.
        if self.published_at_ms.load(Ordering::Relaxed) != now_ms {
            self.published_at_ms.store(now_ms, Ordering::Relaxed);
        }
        let idle_ms = now_ms.saturating_sub(self.looked_at_ms.load(Ordering::Relaxed));
        if idle_ms >= COLD_AFTER_MS && !self.has_work() && !self.publishing.swap(true, Ordering::SeqCst) {
            set_latch(&self.latch);
        }
    }

    /// Whether a session began to publish a moment ago, and will probably commit soon.
    pub(crate) fn is_publishing(&self) -> bool {
        let published_at_ms = self.published_at_ms.load(Ordering::Relaxed);
        published_at_ms > 0 && clock::since_boot_ms().saturating_sub(published_at_ms) <= COMMITS_WITHIN_MS
    }

    /// Whether publishing was announced since the last look. The call counts as a look.
    pub(crate) fn take_publishing(&self) -> bool {
        let is_publishing = self.publishing.swap(false, Ordering::SeqCst);
        if is_publishing {
            self.looks();
        }
        is_publishing
    }

    /// Notes that the worker looks for events now.
    fn looks(&self) {
        self.looked_at_ms.store(clock::since_boot_ms(), Ordering::Relaxed);
    }

    pub(crate) fn announce_schedule(&self) {
        if !self.schedule.swap(true, Ordering::SeqCst) {
            set_latch(&self.latch);
        }
    }

    pub(crate) fn nudge(&self) {
        self.nudge.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Asks for an attempt now for each backend that waits for one.
    pub(crate) fn ask(&self) {
        if !self.asked.swap(true, Ordering::SeqCst) {
            set_latch(&self.latch);
        }
    }

    pub(crate) fn take_asked(&self) -> bool {
        self.asked.swap(false, Ordering::SeqCst)
    }

    /// A session has asked something.
    pub(crate) fn announce_question(&self) {
        self.has_questions.store(true, Ordering::SeqCst);
        self.wake();
    }

    pub(crate) fn take_questions(&self) -> bool {
        self.has_questions.load(Ordering::Relaxed) && self.has_questions.swap(false, Ordering::SeqCst)
    }

    /// Notes that somebody reads outbox.consumers. Wakes the worker if nobody has done that lately.
    pub(crate) fn view_consumers(&self) {
        let before = self
            .consumers_viewed_at_ms
            .swap(clock::since_boot_ms(), Ordering::AcqRel);
        if !is_lately(before) {
            set_latch(&self.latch);
        }
    }

    /// Notes that somebody calls outbox.health(). Returns whether Redis was being asked before.
    pub(crate) fn probe_consumers(&self) -> bool {
        let is_asked = self.interest() != Interest::Nobody;
        self.consumers_probed_at_ms
            .store(clock::since_boot_ms(), Ordering::Release);
        if !is_asked {
            set_latch(&self.latch);
        }
        is_asked
    }

    /// Who wants to know about consumer groups.
    pub(crate) fn interest(&self) -> Interest {
        let is_lately = |at_ms: &AtomicU64| is_lately(at_ms.load(Ordering::Acquire));
        match () {
            () if is_lately(&self.consumers_viewed_at_ms) => Interest::View,
            () if is_lately(&self.consumers_probed_at_ms) => Interest::Probe,
            () => Interest::Nobody,
        }
    }

    /// Asks the worker for a sign of life, unless it has just given one or was asked already.
    pub(crate) fn call(&self) {
        let now_ms = clock::since_boot_ms();
        if now_ms.saturating_sub(self.round_at_ms.load(Ordering::Acquire)) >= FRESH_MS
            && self
                .called_at_ms
                .compare_exchange(0, now_ms, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        {
            set_latch(&self.latch);
        }
    }

    /// The worker begins a round, which counts as a sign of life.
    pub(crate) fn begins_round(&self) {
        self.round_at_ms.store(clock::since_boot_ms(), Ordering::Release);
        if self.called_at_ms.load(Ordering::Acquire) != 0 {
            self.called_at_ms.store(0, Ordering::Release);
        }
    }

    /// For how long the worker owes a sign of life; 0: it owes none.
    pub(crate) fn unanswered_ms(&self) -> u64 {
        match self.called_at_ms.load(Ordering::Acquire) {
            0 => 0,
            called_at_ms => clock::since_boot_ms().saturating_sub(called_at_ms).max(1),
        }
    }

    pub(crate) fn wake(&self) {
        set_latch(&self.latch);
    }

    pub(crate) fn has_work(&self) -> bool {
        self.work.load(Ordering::Acquire) == Work::Some as u8
    }

    /// The worker is about to sleep for a moment and need not be woken.
    pub(crate) fn mark_asleep(&self) {
        self.change_work(Work::None, Work::Asleep);
    }

    pub(crate) fn mark_awake(&self) {
        self.change_work(Work::Asleep, Work::None);
    }

    fn change_work(&self, from: Work, to: Work) {
        // On failure there is work by now.
        let _ = self
            .work
            .compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst);
    }

    /// Lowers the flag. The snapshot must be taken after this call, so that a later commit raises the flag again.
    /// Returns when the first commit was announced, if there was one.
    pub(crate) fn take_work(&self) -> Option<i64> {
        self.looks();
        let committed_at_us = self.committed_at_us.swap(0, Ordering::AcqRel);
        self.published_at_ms.store(0, Ordering::Relaxed);
        self.work.swap(Work::None as u8, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        (committed_at_us != 0).then_some(committed_at_us)
    }

    pub(crate) fn take_schedule(&self) -> bool {
        self.schedule.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn take_nudge(&self) -> bool {
        self.nudge.swap(false, Ordering::SeqCst)
    }

    /// Gives a free slot to a database. False: it is taken.
    pub(crate) fn take_for(&self, database: pg_sys::Oid) -> bool {
        self.database
            .compare_exchange(0, database.to_u32(), Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Frees the slot.
    pub(crate) fn free(&self) {
        self.database.store(0, Ordering::Release);
    }

    pub(crate) fn is_taken(&self) -> bool {
        self.database.load(Ordering::Acquire) != 0
    }
}

/// Whether somebody who wanted to know about consumer groups then still does.
fn is_lately(at_ms: u64) -> bool {
    at_ms > 0 && clock::since_boot_ms().saturating_sub(at_ms) <= CONSUMERS_WANTED_FOR_MS
}

pub(crate) fn set_latch(latch: &AtomicPtr<pg_sys::Latch>) {
    let latch = latch.load(Ordering::Acquire);
    if !latch.is_null() {
        // SAFETY: a process latch lies in shared memory as long as the server runs. If its owner has ended, another
        // process wakes for nothing. SetLatch neither allocates nor fails.
        unsafe { pg_sys::SetLatch(latch) };
    }
}
