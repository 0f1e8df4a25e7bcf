//! When the commits in a range began. The time of a commit is not recorded, but a session that commits announces it,
//! before the first tick that sees the commit. So rows that an earlier tick does not see were committed after the first
//! commit that was announced since that tick.

use crate::reading::snapshot::Tick;
use std::sync::Arc;

/// How many ticks are remembered. Readers in step stand at the same few ticks.
const MOST_TICKS: usize = 64;

/// Times are in microseconds since 1970.
#[derive(Default)]
pub struct Commits {
    /// Ticks, with the time after which everything that they do not see was committed.
    followed: Vec<(Arc<Tick>, i64)>,
    /// The latest tick sees everything that had been committed by then.
    quiet_until: i64,
    /// Everything that the latest tick does not see was committed after this time.
    since: Option<i64>,
}

impl Commits {
    /// Nothing has happened since the latest tick.
    pub fn is_quiet(&mut self, now_us: i64) {
        self.quiet_until = now_us;
        self.since = None;
    }

    /// Another tick is about to be taken. `heard`: the first commit that was announced since the last tick, if any.
    pub fn looks(&mut self, heard: Option<i64>, now_us: i64) {
        // A tick that failed or is not the latest yet counts with the next one.
        let since = heard.unwrap_or(self.quiet_until);
        self.since = Some(self.since.map_or(since, |known| known.min(since)));
        self.quiet_until = now_us;
    }

    /// The tick that was taken is now the latest, after `before`; or both are the same.
    pub fn follow(&mut self, before: &Arc<Tick>, is_same: bool) {
        let Some(since) = self.since.take().filter(|_| !is_same) else {
            return;
        };
        self.followed.retain(|(tick, _)| Arc::strong_count(tick) > 1);
        if self.followed.len() >= MOST_TICKS {
            self.followed.remove(0);
        }
        self.followed.push((before.clone(), since));
    }

    /// What this tick does not see was committed after this time. 0: not known.
    pub fn after(&self, tick: &Arc<Tick>) -> i64 {
        let known = self.followed.iter().rev().find(|(known, _)| Arc::ptr_eq(known, tick));
        known.map_or(0, |(_, since)| *since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tick() -> Arc<Tick> {
        Arc::new(Tick::beginning())
    }

    #[test]
    fn rows_after_a_tick_were_committed_after_the_first_announced_commit() {
        let (first, second, third) = (tick(), tick(), tick());
        let mut commits = Commits::default();
        commits.looks(Some(100), 110);
        commits.follow(&first, false);
        commits.looks(Some(200), 210);
        commits.follow(&second, false);
        assert_eq!((commits.after(&first), commits.after(&second)), (100, 200));
        assert_eq!(commits.after(&third), 0);
    }

    #[test]
    fn an_unannounced_commit_came_after_the_last_quiet_look() {
        let (first, second) = (tick(), tick());
        let mut commits = Commits::default();
        commits.looks(Some(100), 110);
        commits.follow(&first, false);
        commits.is_quiet(500);
        commits.looks(None, 600);
        commits.follow(&second, false);
        assert_eq!(commits.after(&second), 500);
    }

    #[test]
    fn a_failed_look_counts_with_the_next() {
        let first = tick();
        let mut commits = Commits::default();
        commits.looks(Some(100), 110);
        commits.looks(Some(200), 210);
        commits.follow(&first, false);
        assert_eq!(commits.after(&first), 100);
        // A tick that turned out to be the same has no range.
        commits.looks(Some(300), 310);
        commits.follow(&first, true);
        commits.looks(Some(400), 410);
        let second = tick();
        commits.follow(&second, false);
        assert_eq!(commits.after(&second), 400);
    }

    #[test]
    fn ticks_without_readers_are_forgotten() {
        let mut commits = Commits::default();
        let held = tick();
        commits.looks(Some(1), 1);
        commits.follow(&held, false);
        for time in 2..1_000 {
            commits.looks(Some(time), time);
            commits.follow(&tick(), false);
        }
        assert!(commits.followed.len() <= 2);
        assert_eq!(commits.after(&held), 1);
        let all: Vec<_> = (0..1_000).map(|_| tick()).collect();
        for held in &all {
            commits.looks(Some(5), 5);
            commits.follow(held, false);
        }
        assert!(commits.followed.len() <= MOST_TICKS);
    }
}
