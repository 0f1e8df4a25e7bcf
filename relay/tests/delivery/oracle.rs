//! The properties that must hold.

use super::*;

impl World {
    /// Every event that the saved cursor has passed is in its stream or saved as refused.
    pub(crate) fn check_cursor(&self) -> Result<(), String> {
        for key in self.database.rows() {
            if !self.tables.cursor.covers(key) || !self.database.is_committed(key.seq) {
                continue;
            }
            let written = self.tables.failed.contains_key(&key.seq)
                || self.tables.refused.contains_key(&self.key(key.seq))
                || self.redis.held.contains(&key.seq);
            if !written {
                return Err(format!("the saved cursor passed {}, which is nowhere", key.seq));
            }
        }
        Ok(())
    }

    pub(crate) fn check_end(&mut self) -> Result<(), String> {
        self.save_cursor();
        self.check_cursor()?;
        if !self.delivery.is_idle() || !self.pending.is_empty() {
            return Err("not idle".to_owned());
        }
        if self.delivery.accepted() != self.accepted {
            return Err(format!(
                "counted {} of {} accepted",
                self.delivery.accepted(),
                self.accepted
            ));
        }
        for key in self.database.rows() {
            let seq = key.seq;
            let stream = name(self.database.row(seq).stream);
            let entries = self.redis.streams.get(&stream).map_or(&[][..], Vec::as_slice);
            let count = entries.iter().filter(|entry| **entry == seq).count();
            let failed = self.tables.failed.contains_key(&seq);
            let doubts = self.doubts.get(&seq).copied().unwrap_or(0);
            if !self.database.is_committed(seq) {
                if count > 0 || failed {
                    return Err(format!("{seq} never committed"));
                }
                continue;
            }
            if !self.tables.cursor.covers(key) {
                return Err(format!("the cursor does not cover {seq}"));
            }
            if count == 0 && !failed {
                return Err(format!("{seq} is lost"));
            }
            if count > 1 + doubts as usize {
                return Err(format!("{seq} is {count} times in its stream, in doubt {doubts} times"));
            }
            if failed && !self.redis.refused.contains(&stream) {
                return Err(format!("{seq} has failed, yet none of {stream} was refused"));
            }
            if failed && count > 0 && doubts == 0 {
                return Err(format!("{seq} has failed and is in its stream"));
            }
        }
        for (stream, entries) in &self.redis.streams {
            if self.shaken.contains(stream) || (!self.faults.tidy && self.redis.disturbed.contains(stream)) {
                continue;
            }
            let mut met = HashSet::new();
            let first = entries.iter().copied().filter(|seq| met.insert(*seq));
            // A crash may lose the failure of an event.
            let first = first.filter(|seq| !self.tables.failed.contains_key(seq));
            if let Some((before, after)) = self.database.out_of_order(first) {
                return Err(format!("{after} comes after {before} in {stream}"));
            }
        }
        Ok(())
    }
}
