//! Makes the lanes of clusters' backends, and gives them up (see `backend/lanes.rs`).

use crate::server::clock;
use crate::server::process::{self, Aborted};
use crate::tables::{catalog, former_lanes};
use crate::worker::backend::lanes::LANE_PAUSE;
use crate::worker::backend::{Backend, MOST_LANES};
use crate::worker::found::Found;
use crate::worker::state::Worker;
use crate::worker::task::Task;
use relay::delivery::former::GivesUp;
use relay::time::Now;
use std::time::Duration;

/// While all lanes have something to send, an event waits this long for one before that is a failure.
const BUSY_FOR: Duration = Duration::from_secs(5);

/// As long as so many threads of a backend's former lanes have not ended, because their server does not answer, none of
/// its lanes is given up. Each thread holds a permit that others need.
const MOST_LEAVING: usize = 16;

/// How soon to look again whether they have. Usually that takes as long as a reply of their server.
const LEAVE_PAUSE: Duration = Duration::from_millis(5);

impl Worker {
    /// Makes lanes for what finders have found. All groups were read, because a new lane may have the index of one that
    /// is given up.
    pub(super) fn add_lanes(&mut self, now: Now) {
        for found in std::mem::take(&mut self.found) {
            let task = Task::AddLane(self.backends[found.finder].whose());
            if self.attempt(task, now, |w| w.add_lane(&found, now)).is_none() {
                self.backends[found.finder].rests_until = now + LANE_PAUSE;
            }
        }
    }

    /// Saves the new lane before its finder goes on.
    fn add_lane(&mut self, found: &Found, now: Now) -> Result<(), Aborted> {
        let number = self.backends[found.finder].number;
        let is_its = |b: &Backend| b.number == number && b.lane().is_some();
        let mut lanes: Vec<usize> = (0..self.backends.len())
            .filter(|i| is_its(&self.backends[*i]))
            .collect();
        let has_lane = |index: &usize| self.backends[*index].lane() == Some(found.hash_slot);
        if lanes.iter().any(has_lane) {
            return Ok(());
        }
        let mut former = None;
        if lanes.len() >= MOST_LANES {
            lanes.sort_unstable_by_key(|index| self.backends[*index].moved_at());
            self.leaving.retain(|(_, thread)| !thread.has_ended());
            let leaving = self.leaving.iter().filter(|(whose, _)| *whose == number).count();
            if leaving < MOST_LEAVING {
                former = self.least_needed(found.finder, &lanes, now);
            }
            if former.is_none() {
                let finder = &mut self.backends[found.finder];
                finder.no_lane_left(found.hash_slot, BUSY_FOR, now);
                if leaving >= MOST_LEAVING {
                    finder.rests_until = now + LEAVE_PAUSE;
                }
                return Ok(());
            }
        }
        let (backends, home, wall_us) = (&mut self.backends, &self.home, clock::wall_us());
        let lane = process::transaction(|| {
            if let Some(former) = former {
                // The views take what the finder has passed for sent.
                backends[found.finder].save(now, wall_us);
                backends[former].save(now, wall_us);
                backends[former]
                    .lane()
                    .into_iter()
                    .for_each(|slot| former_lanes::give_up(number, slot));
            }
            let mut lane = backends[found.finder].new_lane(found.hash_slot, found.at.clone(), home);
            lane.save_new();
            catalog::expect_served();
            lane
        })?;
        match former {
            None => self.backends.push(lane),
            Some(index) => {
                self.backends[found.finder].saved(now);
                let mut former = std::mem::replace(&mut self.backends[index], lane);
                former.release_guard();
                let connection = former.duty.connection_mut();
                self.leaving.extend(connection.map(|c| (number, c.take_sign())));
                self.patience.retain(|task| task.whose() != Some(former.whose()));
            }
        }
        Ok(())
    }

    /// Of these lanes, the first that can be given up. If none can be now, one is kept from reading, so that it soon
    /// can be.
    fn least_needed(&mut self, finder: usize, lanes: &[usize], now: Now) -> Option<usize> {
        let gives_up = |index: usize| self.backends[index].gives_up(&self.backends[finder]);
        let first = |when| lanes.iter().copied().find(|index| gives_up(*index) == when);
        let now_or_soon = (first(GivesUp::Now), first(GivesUp::Soon));
        if let (None, Some(soon)) = now_or_soon {
            self.backends[soon].rests_until = now + 2 * LANE_PAUSE;
        }
        now_or_soon.0
    }
}
