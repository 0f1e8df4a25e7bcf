//! The worker, with its tables.

use super::*;

/// A batch that waits for the end of the transaction it was read in.
#[derive(Default)]
struct Built {
    seqs: Vec<i64>,
    bytes: usize,
    end: Option<Position>,
}

impl Built {
    fn last(&self) -> i64 {
        self.seqs.last().copied().unwrap_or(0)
    }

    fn close(&mut self, end: Position, room: &mut Window) -> Option<Self> {
        if self.seqs.is_empty() {
            return None;
        }
        room.batches -= 1;
        room.bytes = room.bytes.saturating_sub(self.bytes);
        self.end = Some(end);
        Some(std::mem::take(self))
    }
}

impl World {
    pub fn tend_connection(&mut self) {
        if self.delivery.is_drained() {
            self.delivery.drained();
            self.connection = None;
        }
        if self.delivery.wants_connection(self.now) {
            assert!(self.connection.is_none() && self.in_flight.is_empty());
            self.delivery.connecting();
            self.connection = Some(Connection::default());
        }
    }

    pub fn take_report(&mut self) -> bool {
        let Some(report) = self.connection.as_mut().and_then(|c| c.reports.pop_front()) else {
            return false;
        };
        let random = self.rng.f64();
        tell!(
            self,
            "report {}",
            match &report {
                Report::Connected => "connected".to_owned(),
                Report::Done { refused, .. } => format!("done {:?}, refused {refused:?}", self.in_flight[0].0),
                Report::Lost { accepted, refused, .. } => format!("lost after {accepted}, refused {refused:?}"),
                _ => "of exactly_once".to_owned(),
            }
        );
        let records = match report {
            Report::Connected => {
                self.delivery.connected();
                Vec::new()
            }
            Report::Done { refused, .. } => {
                if refused.iter().any(is_backends) {
                    self.shake();
                }
                let (seqs, _) = self.in_flight.pop_front().expect("a batch that was sent");
                self.accepted += (seqs.len() - refused.len()) as u64;
                self.delivery.replied(refused, self.now, random)
            }
            Report::Lost {
                failure,
                accepted,
                refused,
            } => {
                self.seen.lost_in_mid_batch += u32::from(accepted > 0);
                self.accepted += (accepted - refused.len()) as u64;
                self.doubt(accepted);
                self.connection = None;
                self.delivery.lost(failure, accepted, refused, self.now, random)
            }
            _ => unreachable!("no sender of at_least_once says that"),
        };
        self.note(records);
        true
    }

    pub fn note(&mut self, records: Vec<Record>) {
        for record in records {
            tell!(self, "  {record:?}");
            match &record {
                Record::Park { .. } => self.seen.parked += 1,
                Record::Fail { .. } => self.seen.failed += 1,
                Record::Accepted { .. } => self.seen.accepted_after_waiting += 1,
                Record::RefusedAgain { .. } => {}
            }
            let forgotten = self.mutant == Mutant::ForgetsRefused && matches!(record, Record::Park { .. });
            if !forgotten {
                self.pending.push(record);
            }
        }
    }

    /// All in flight but the first `known` of the oldest batch is in doubt.
    pub fn doubt(&mut self, known: usize) {
        self.shake();
        let in_flight = self.in_flight.drain(..).flat_map(|(seqs, _)| seqs);
        for seq in in_flight.skip(known) {
            *self.doubts.entry(seq).or_default() += 1;
        }
    }

    pub fn shake(&mut self) {
        let in_flight = self.in_flight.iter().flat_map(|(seqs, _)| seqs);
        let streams = in_flight.map(|seq| name(self.database.row(*seq).stream));
        let blocked = streams.filter(|stream| self.delivery.streams().is_blocked(stream));
        self.shaken.extend(blocked);
    }

    pub fn write_down(&mut self) {
        for record in std::mem::take(&mut self.pending) {
            match record {
                Record::Park { seq, attempts, .. } => self.park(seq, attempts),
                Record::Fail { seq, attempts, .. } => self.fail(seq, attempts),
                Record::Accepted { seq } => drop(self.tables.refused.remove(&self.key(seq))),
                Record::RefusedAgain { seq, attempts, .. } => {
                    let key = self.key(seq);
                    if let Some(now) = self.tables.refused.get_mut(&key) {
                        *now = attempts;
                    }
                }
            }
        }
        for (stream, seq) in self.tables.refused.keys() {
            let on_its_way = self.in_flight.iter().any(|(seqs, _)| seqs.contains(seq));
            assert!(
                on_its_way || self.delivery.streams().is_blocked(stream),
                "{seq} waits for ever"
            );
        }
    }

    pub fn key(&self, seq: i64) -> (Rc<str>, i64) {
        (name(self.database.row(seq).stream), seq)
    }

    pub fn park(&mut self, seq: i64, attempts: u32) {
        let key = self.key(seq);
        let known = self.tables.refused.entry(key).or_default();
        *known = attempts.max(*known);
    }

    pub fn fail(&mut self, seq: i64, attempts: u32) {
        self.tables.refused.remove(&self.key(seq));
        self.tables.failed.entry(seq).or_insert(attempts);
    }

    pub fn save_cursor(&mut self) {
        let cursor = match self.mutant {
            Mutant::SavesRead => self.delivery.position().clone(),
            _ => self.delivery.acked().clone(),
        };
        if self.mutant != Mutant::SavesBeforeRecords {
            self.write_down();
        }
        tell!(self, "save {:?}", cursor.under_way.as_ref().map(|u| u.last_seq));
        self.tables.cursor = cursor;
    }

    /// Fails some of what waits in streams whose head has failed.
    fn fail_waiting(&mut self) -> bool {
        let failing = self.delivery.streams_to_fail(2);
        for (stream, _) in &failing {
            let limit = self.rng.usize(1..5);
            let seqs = self.tables.waiting(stream, limit);
            seqs.iter().for_each(|seq| self.fail(*seq, 1));
            if seqs.len() < limit {
                self.seen.failed_streams += 1;
                self.delivery.stream_failed(stream);
            }
        }
        !failing.is_empty()
    }

    /// Tries the streams again that are due.
    pub fn retry(&mut self) -> bool {
        self.write_down();
        let mut did = self.fail_waiting();
        loop {
            let (heads, followers) = (self.rng.usize(1..4), self.batch_size);
            let due = self.delivery.streams_to_retry(self.now, heads, followers);
            if due.is_empty() {
                break;
            }
            did = true;
            let (mut batch, mut all) = (Vec::new(), Vec::new());
            for Retry { stream, count } in due {
                if !batch.is_empty() && self.likely(0.1) {
                    self.delivery.stream_put_back(&stream);
                    continue;
                }
                let mut seqs = self.tables.waiting(&stream, count + 1);
                match seqs.len() {
                    0 => self.delivery.stream_cleared(&stream),
                    found if found <= count => all.push(stream),
                    _ => seqs.truncate(count),
                }
                batch.append(&mut seqs);
            }
            if batch.is_empty() {
                continue;
            }
            let bytes = batch.iter().map(|seq| bytes(*seq)).sum();
            let entries = self.entries(&batch);
            self.send(&batch, bytes);
            self.delivery.sent(entries, Contents::Waiting { all }, bytes);
        }
        // Whoever waits until then must not find that nothing is to be done.
        let due = self.delivery.due_at();
        let wakes_for_nothing = due.is_some_and(|at| at <= self.now) && !self.delivery.wants_connection(self.now);
        assert!(!wakes_for_nothing, "due at {due:?}, yet there is nothing to do");
        did
    }

    pub fn entries(&self, seqs: &[i64]) -> Vec<BatchedEvent> {
        let entry = |seq: &i64| BatchedEvent {
            seq: *seq,
            stream: name(self.database.row(*seq).stream),
            max_attempts: 1 + *seq as u32 % self.max_attempts,
        };
        seqs.iter().map(entry).collect()
    }

    pub fn send(&mut self, seqs: &[i64], bytes: usize) {
        assert!(self.delivery.has_room());
        let in_flight: usize = self.in_flight.iter().map(|(_, bytes)| bytes).sum();
        assert!(self.in_flight.len() < WINDOW_BATCHES, "too many batches in flight");
        assert!(
            in_flight < WINDOW_BYTES || self.in_flight.is_empty(),
            "too many bytes in flight"
        );
        tell!(self, "send {seqs:?}");
        self.in_flight.push_back((seqs.to_vec(), bytes));
        let commands = seqs.iter().map(|seq| Command {
            seq: *seq,
            stream: name(self.database.row(*seq).stream),
        });
        let sent = Sent {
            commands: commands.collect(),
            replies: Vec::new(),
            read: 0,
        };
        // A sender that has ended takes nothing more; its last report is on the way.
        if let Some(connection) = self.connection.as_mut().filter(|c| !c.ended) {
            connection.batches.push_back(sent);
        }
    }

    pub fn take_tick(&mut self) {
        let tick = self.database.tick(&mut self.rng);
        self.ticks.push(Arc::new(tick));
    }

    /// Reads up to `limit` rows on, as far as there is room; false: there is nothing to read.
    pub fn read(&mut self, limit: usize) -> bool {
        if !self.delivery.has_room() {
            self.seen.full_windows += u32::from(!self.in_flight.is_empty());
            return false;
        }
        if self.mutant != Mutant::ParksBeforeRecords {
            self.write_down();
        }
        let start = self.delivery.position().clone();
        let from = start.from.clone();
        let (to, last_seq) = match &start.under_way {
            Some(under_way) => (under_way.to.clone(), under_way.last_seq),
            None => {
                let reached = self.ticks.iter().position(|tick| Arc::ptr_eq(tick, &from));
                match self.ticks.get(reached.map_or(0, |index| index + 1)) {
                    Some(tick) => (tick.clone(), 0),
                    None => return false,
                }
            }
        };
        let towards = |seq| Position::towards(from.clone(), to.clone(), seq);
        let mut scan = RangeScan::open(&mut self.database.view(), &from, &to, last_seq);
        // What the transaction comes to; nothing of it happens if it aborts.
        let (mut built, mut parked, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        let mut batch = Built::default();
        let mut room = self.delivery.room().expect("checked above");
        let mut reached = start.clone();
        for _ in 0..limit {
            let key = match scan.step() {
                None => {
                    reached = Position::at(to.clone());
                    break;
                }
                Some(Step::Passed(key)) => key,
                Some(Step::Row(key)) => {
                    let stream = name(self.database.row(key.seq).stream);
                    self.seen.late += u32::from(key.seq <= from.low_seq);
                    match self.delivery.on_row(key.seq, &stream) {
                        RowFate::Skip => {
                            self.seen.skipped += 1;
                            skipped.push(key.seq);
                        }
                        RowFate::Park => {
                            self.seen.parked += 1;
                            parked.push(key.seq);
                        }
                        RowFate::Send => {
                            let size = bytes(key.seq);
                            if batch.seqs.len() >= self.batch_size || batch.bytes + size > BATCH_BYTES {
                                let full = batch.close(towards(batch.last()), &mut room);
                                built.extend(full);
                            }
                            if batch.seqs.is_empty() && (room.batches == 0 || room.bytes == 0) {
                                break;
                            }
                            batch.seqs.push(key.seq);
                            batch.bytes += size;
                        }
                    }
                    key
                }
            };
            reached = towards(key.seq);
        }
        built.extend(batch.close(reached.clone(), &mut room));
        if self.likely(self.faults.aborts) {
            tell!(self, "abort");
            return false;
        }
        if self.mutant != Mutant::ForgetsParked {
            parked.iter().for_each(|seq| self.park(*seq, 0));
        }
        tell!(self, "park {parked:?}, skip {skipped:?}");
        skipped
            .iter()
            .chain(&parked)
            .for_each(|seq| self.delivery.skipped(*seq));
        for Built { seqs, bytes, end } in built {
            let end = end.expect("closed");
            self.send(&seqs, bytes);
            let entries = self.entries(&seqs);
            self.delivery.sent(entries, Contents::Rows { end }, bytes);
        }
        self.delivery.advanced(reached);
        true
    }

    /// A new life, from what was saved.
    pub fn crash(&mut self) {
        tell!(self, "crash");
        self.seen.crashes += 1;
        self.shake();
        self.pending.clear();
        self.in_flight.clear();
        for key in self.database.rows() {
            // One that waits in the table, and is read once more, is sent by both ways.
            let (is_read, waits) = (
                !self.tables.cursor.covers(key),
                self.tables.refused.contains_key(&self.key(key.seq)),
            );
            if is_read || waits {
                *self.doubts.entry(key.seq).or_default() += u32::from(is_read) + u32::from(waits);
            }
        }
        self.drop_connection();
        self.ticks.clear();
        let streams = self.tables.streams();
        self.delivery = Delivery::new(
            Guarantee::AtLeastOnce,
            Cursor {
                position: self.tables.cursor.clone(),
                number: 0,
            },
            streams,
            self.backoff,
        );
        self.accepted = 0;
    }

    /// The settings changed.
    pub fn change_settings(&mut self) {
        if self.rng.bool() {
            tell!(self, "abandon");
            self.doubt(0);
            self.delivery.abandon();
            self.drop_connection();
        }
        if self.rng.bool() {
            self.write_down();
            self.delivery.set_streams(self.tables.streams());
        }
        self.delivery.retry_now();
    }
}
