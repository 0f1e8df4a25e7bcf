//! Decides which backends have a sender. The number of permits is limited (`permits.rs`). With more backends than
//! permits, the first backends keep their connections, and the others take turns with the remaining permits.

use crate::server::guc::LogLevel;
use crate::server::process::log;
use crate::server::process::repeat_log_after;
use crate::worker::backend::longest_turn;
use crate::worker::state::Worker;
use relay::time::Now;
use std::time::Duration;

/// How long a turn lasts at least while others wait.
const TURN: Duration = Duration::from_secs(3);
/// How soon to look again for free permits.
const LOOK_AFTER: Duration = Duration::from_millis(250);

impl Worker {
    /// Starts the senders that are due, as far as permits are free.
    pub(super) fn connect(&mut self, now: Now) {
        self.permits.tell();
        let most = self.permits.most();
        let count = self.backends.iter().filter(|b| b.connects()).count();
        let kept = if count <= most { count } else { most - most.div_ceil(4) };
        let (mut rank, mut waiting, mut in_turn, mut queue) = (0, 0, 0, Vec::new());
        for (index, backend) in self.backends.iter_mut().enumerate() {
            backend.withhold(now);
            if !backend.connects() {
                continue;
            }
            rank += 1;
            backend.turn.is_taken = rank > kept;
            match (backend.wants_sender(now), backend.turn.is_taken) {
                (true, false) if self.permits.free() > 0 => backend.connect(now, &self.waker, &mut self.permits),
                // A thread that was told to end and has not ended yet still holds the permit.
                (true, false) => {
                    backend.wait_for_turn(now);
                    waiting += 1;
                }
                (true, true) => queue.push((backend.turn.began_at, index)),
                (false, takes_turns) => in_turn += usize::from(takes_turns && backend.has_sender()),
            }
        }
        queue.sort_unstable();
        let free = (most - kept).saturating_sub(in_turn).min(self.permits.free());
        for (nth, (_, index)) in queue.iter().enumerate() {
            let backend = &mut self.backends[*index];
            match nth < free {
                true => backend.connect(now, &self.waker, &mut self.permits),
                false => backend.wait_for_turn(now),
            }
        }
        let queued = queue.len().saturating_sub(free);
        waiting += queued;
        if queued > 0 {
            self.end_turns(queued, now);
        }
        self.turns.look_at = (waiting > 0).then_some(now + LOOK_AFTER);
        if waiting > 0 && self.turns.said_at.is_none_or(|at| now >= at + repeat_log_after()) {
            self.turns.said_at = Some(now);
            log(
                LogLevel::Warning,
                &format!("{waiting} backends are waiting for their turn to connect"),
                Some(&format!(
                    "The worker has file descriptors for {most} connections: the first {kept} backends keep theirs, the others take turns."
                )),
                Some(
                    "Raise max_files_per_process and the server's limit of open files (ulimit -n), then restart the server.",
                ),
            );
        }
    }

    /// Ends as many turns as there are backends waiting.
    fn end_turns(&mut self, count: usize, now: Now) {
        let has_had = |b: &&mut crate::worker::backend::Backend| {
            let had = now.saturating_sub(b.turn.began_at);
            let is_idle = b.delivery.is_up() && !b.is_sending();
            b.turn.is_taken && b.has_sender() && had >= if is_idle { TURN } else { longest_turn() }
        };
        for backend in self.backends.iter_mut().filter(has_had).take(count) {
            backend.let_go();
        }
    }
}
