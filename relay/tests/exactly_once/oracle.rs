//! The properties that must hold.

use crate::site::Site;
use crate::world::World;
use relay::reading::range::Key;
use std::collections::BTreeMap;

impl World {
    /// Whether the worker must know that this event was appended, whatever crashes.
    pub(crate) fn is_known(&self, uid: u64) -> bool {
        let Site {
            database,
            tables,
            image,
            ..
        } = &self.site;
        let is_it = |key: &Key| database.row(key.seq).uid == uid && !database.is_purged(key.seq);
        let Some(key) = database.rows().find(is_it) else {
            return true;
        };
        let stream = database.row(key.seq).stream;
        let oldest = image.as_ref().map(|image| &image.tables);
        let saved = [Some(tables), oldest].into_iter().flatten().all(|tables| {
            let refused = tables.refused.get(&(stream, key.seq));
            tables.has_passed(&self.env, stream, key) && refused.is_none_or(|refused| refused.accepted_in.is_some())
        });
        let lane = self.site.lane_of(stream);
        saved && lane.is_some_and(|lane| lane.delivery.acked().covers(key))
    }

    /// Every event that the saved cursor has passed is in its stream or saved as refused.
    pub(crate) fn check_cursor(&self) -> Result<(), String> {
        self.check_finder()?;
        if self.env.hurt {
            return Ok(());
        }
        let site = &self.site;
        let counts = self.counts();
        let stays = |key: &Key| site.database.is_committed(key.seq) && !site.database.is_purged(key.seq);
        for key in site.database.rows().filter(stays) {
            let row = site.database.row(key.seq);
            let settled = site.tables.is_written_down(row.stream, key.seq)
                || self.env.gone.contains(&row.uid)
                || counts.contains_key(&row.uid);
            if site.tables.has_passed(&self.env, row.stream, key) && !settled {
                return Err(format!("the saved cursor passed {}, which is nowhere", key.seq));
            }
        }
        Ok(())
    }

    /// No row of a hash slot without a lane is after the finder's saved position.
    fn check_finder(&self) -> Result<(), String> {
        let site = &self.site;
        let finder = site.tables.saved.get(&None).expect("it is saved from the beginning");
        let is_missing = |stream: u8| self.env.is_cluster && !site.tables.has_lane(stream);
        let is_passed = |key: &Key| {
            let row = site.database.row(key.seq);
            let is_there = site.database.is_committed(key.seq) && !site.database.is_purged(key.seq);
            is_there && is_missing(row.stream) && finder.cursor.position.covers(*key)
        };
        match site.database.rows().find(is_passed) {
            Some(key) => Err(format!("the finder has come past {}, which has no lane", key.seq)),
            None => Ok(()),
        }
    }

    fn counts(&self) -> BTreeMap<u64, usize> {
        let mut counts = BTreeMap::new();
        for uid in self
            .env
            .redis
            .iter()
            .flat_map(|redis| redis.data.streams.values().flatten())
        {
            *counts.entry(*uid).or_default() += 1;
        }
        counts
    }

    pub(crate) fn check_end(&mut self) -> Result<(), String> {
        self.site.save_all(&mut self.env);
        self.check_finder()?;
        let mut counts = self.counts();
        let site = &self.site;
        let retired = |key: &Key| self.env.retired.contains(&key.seq) && site.database.is_purged(key.seq);
        for key in site.database.rows().filter(retired) {
            let count = counts.remove(&site.database.row(key.seq).uid).unwrap_or(0);
            if count == 0 && !site.tables.failed.contains_key(&key.seq) {
                return Err(format!("{} was purged, and is lost", key.seq));
            }
        }
        for key in site.database.rows().filter(|key| !site.database.is_purged(key.seq)) {
            let count = counts.remove(&site.database.row(key.seq).uid).unwrap_or(0);
            self.check_row(key, count)?;
        }
        if let Some(uid) = counts.keys().find(|uid| !self.is_of_the_former(**uid)) {
            return Err(format!("event {uid} is in no history"));
        }
        let seqs: BTreeMap<u64, i64> = site
            .database
            .rows()
            .map(|k| (site.database.row(k.seq).uid, k.seq))
            .collect();
        // Nobody here knows what was refused there.
        let was_refused = self.env.redis.iter().any(|redis| !redis.refused.is_empty());
        let orders = self.former.is_none() || !was_refused;
        let streams = self.env.redis.iter().flat_map(|redis| &redis.data.streams);
        for (stream, entries) in streams.filter(|_| orders) {
            // Events that were repeated after two losses at once may come late.
            let repeated =
                |uid: &&u64| self.former.is_some() && (self.env.gone.contains(uid) || self.open.contains(uid));
            // Events of a dump are where they were sent first.
            let entries = entries
                .iter()
                .filter(|uid| !repeated(uid) && !self.env.restored.contains(uid))
                .filter(|uid| !self.env.not_compared.contains(uid));
            let entries = entries.filter_map(|uid| seqs.get(uid).copied());
            if let Some((before, after)) = site.database.out_of_order(entries) {
                return Err(format!("{after} comes after {before} in stream {stream}"));
            }
        }
        Ok(())
    }

    /// Committed by the former server, after the promotion.
    fn is_of_the_former(&self, uid: u64) -> bool {
        let Some(former) = &self.former else {
            return false;
        };
        let database = &former.database;
        let mut of_uid = database.rows().filter(|key| database.row(key.seq).uid == uid);
        of_uid.any(|key| database.is_committed(key.seq))
    }

    fn check_row(&self, key: Key, count: usize) -> Result<(), String> {
        let site = &self.site;
        let seq = key.seq;
        let row = site.database.row(seq);
        let failed = site.tables.failed.contains_key(&seq);
        if !site.database.is_committed(seq) {
            let is_known = count == 0 || self.is_of_the_former(row.uid);
            return match !is_known || failed {
                true => Err(format!("{seq} never committed")),
                false => Ok(()),
            };
        }
        if !site.tables.has_passed(&self.env, row.stream, key) {
            return Err(format!("the cursor does not cover {seq}"));
        }
        if failed
            && !self.env.redis[self.env.master_of(row.stream)]
                .refused
                .contains(&row.stream)
        {
            return Err(format!("{seq} has failed, yet nothing of its stream was refused"));
        }
        let gone = self.env.gone.contains(&row.uid);
        let again = self.env.in_doubt.contains(&row.uid);
        match (count, failed, gone) {
            (1, false, false) | (0, true, _) | (0, _, true) => Ok(()),
            (1, false, true) if again => Ok(()),
            (1.., false, _) if self.env.not_compared.contains(&row.uid) => Ok(()),
            // It failed while Redis did not have it.
            (1, true, _) if self.env.comes_back => Ok(()),
            (2, false, false) if self.open.contains(&row.uid) && self.is_of_the_former(row.uid) => Ok(()),
            (0, ..) => Err(format!("{seq} is lost")),
            (1, true, _) => Err(format!("{seq} has failed and is in its stream")),
            (1, false, true) => Err(format!("{seq} is appended again")),
            _ => Err(format!("{seq} is {count} times in its stream")),
        }
    }
}
