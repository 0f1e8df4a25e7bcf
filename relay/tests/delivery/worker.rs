//! The worker, with its tables.

use super::*;

/// The rows that a pass reads.
struct ScannedRows<'a> {
    database: &'a Database,
    delivery: &'a Delivery,
    max_attempts: u32,
    /// Rows up to this number are late,
    late_to: i64,
    /// and this many were read.
    late: u32,
}

/// The event of a row.
struct RowOffer<'a> {
    delivery: &'a Delivery,
    entry: BatchedEvent,
}

impl Source for ScannedRows<'_> {
    type Scan = Rows;
    type Offer<'a>
        = RowOffer<'a>
    where
        Self: 'a;

    fn number(&self, _scan: &Rows) -> i32 {
        NUMBER
    }

    fn is_deleted(&mut self, _scan: &Rows) -> bool {
        unreachable!("there are no strays")
    }

    fn hash_slot(&mut self, _scan: &Rows, _reader: usize) -> u16 {
        unreachable!("there are no lanes")
    }

    fn unreadable(&mut self, _scan: &Rows) -> Option<String> {
        None
    }

    fn with_event<R>(&mut self, scan: &Rows, _reader: usize, f: impl FnOnce(RowOffer<'_>) -> R) -> R {
        self.late += u32::from(scan.seq() <= self.late_to);
        f(RowOffer {
            delivery: self.delivery,
            entry: entry(self.database, self.max_attempts, scan.seq()),
        })
    }
}

impl Offer for RowOffer<'_> {
    fn delivery(&self) -> &Delivery {
        self.delivery
    }

    fn stream(&self) -> &Rc<str> {
        &self.entry.stream
    }

    fn hash_slot(&self) -> u16 {
        unreachable!("there are no lanes")
    }

    fn is_written_down(&self) -> bool {
        unreachable!("nothing was written down in an earlier life")
    }

    fn buffer(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn encode(self, batch: &mut OpenBatch) -> Result<BatchedEvent, NotEncoded> {
        batch.bytes.resize(batch.bytes.len() + bytes(self.entry.seq), 0);
        Ok(self.entry)
    }
}

/// What is known of an event on its way.
fn entry(database: &Database, max_attempts: u32, seq: i64) -> BatchedEvent {
    BatchedEvent {
        seq,
        stream: name(database.row(seq).stream),
        max_attempts: 1 + seq as u32 % max_attempts,
        committed_after_us: 0,
    }
}

impl World {
    pub(crate) fn tend_connection(&mut self) {
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

    pub(crate) fn take_report(&mut self) -> bool {
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

    pub(crate) fn note(&mut self, records: Vec<Record>) {
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

    /// Everything in flight except the first `known` of the oldest batch is in doubt.
    pub(crate) fn doubt(&mut self, known: usize) {
        self.shake();
        let in_flight = self.in_flight.drain(..).flat_map(|(seqs, _)| seqs);
        for seq in in_flight.skip(known) {
            *self.doubts.entry(seq).or_default() += 1;
        }
    }

    pub(crate) fn shake(&mut self) {
        let in_flight = self.in_flight.iter().flat_map(|(seqs, _)| seqs);
        let streams = in_flight.map(|seq| name(self.database.row(*seq).stream));
        let blocked = streams.filter(|stream| self.delivery.streams().is_blocked(stream));
        self.shaken.extend(blocked);
    }

    pub(crate) fn write_down(&mut self) {
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

    pub(crate) fn key(&self, seq: i64) -> (Rc<str>, i64) {
        (name(self.database.row(seq).stream), seq)
    }

    pub(crate) fn park(&mut self, seq: i64, attempts: u32) {
        let key = self.key(seq);
        let known = self.tables.refused.entry(key).or_default();
        *known = attempts.max(*known);
    }

    pub(crate) fn fail(&mut self, seq: i64, attempts: u32) {
        self.tables.refused.remove(&self.key(seq));
        self.tables.failed.entry(seq).or_insert(attempts);
    }

    pub(crate) fn save_cursor(&mut self) {
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

    /// Fails some of the waiting events in streams whose head has failed.
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

    /// Retries the streams that are due.
    pub(crate) fn retry(&mut self) -> bool {
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
        // A worker that waits until then must find something to do.
        let due = self.delivery.due_at();
        let wakes_for_nothing = due.is_some_and(|at| at <= self.now) && !self.delivery.wants_connection(self.now);
        assert!(!wakes_for_nothing, "due at {due:?}, yet there is nothing to do");
        did
    }

    pub(crate) fn entries(&self, seqs: &[i64]) -> Vec<BatchedEvent> {
        let entry = |seq: &i64| entry(&self.database, self.max_attempts, *seq);
        seqs.iter().map(entry).collect()
    }

    pub(crate) fn send(&mut self, seqs: &[i64], bytes: usize) {
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
        // A sender that has ended accepts nothing more; its last report is on the way.
        if let Some(connection) = self.connection.as_mut().filter(|c| !c.ended) {
            connection.batches.push_back(sent);
        }
    }

    pub(crate) fn take_tick(&mut self) {
        let tick = self.database.tick(&mut self.rng);
        self.ticks.push(Arc::new(tick));
    }

    /// Reads up to `limit` further rows, as far as there is room; false: there is nothing to read.
    pub(crate) fn read(&mut self, limit: usize) -> bool {
        if !self.delivery.has_room() {
            self.seen.full_windows += u32::from(!self.in_flight.is_empty());
            return false;
        }
        if self.mutant != Mutant::ParksBeforeRecords {
            self.write_down();
        }
        let Some(goal) = self.goal() else {
            return false;
        };
        let position = self.delivery.position().clone();
        let way = Way {
            position: &position,
            goal: &goal,
            role: Role::Redis,
        };
        let group = Group::take(&mut vec![0], |_| way).expect("one waits");
        let reader = Collector::new(0, NUMBER, None, Role::Redis, &self.delivery);
        let backends = Backends::of([(NUMBER, None, Role::Redis)].into_iter());
        let limits = Limits {
            batch_events: self.batch_size,
            batch_bytes: BATCH_BYTES,
            steps: limit.max(1),
            least_steps: usize::MAX,
            records: self.rng.usize(1..20),
        };
        let pass = Pass::new(&group, vec![reader], backends, limits);
        let mut view = self.database.view();
        let mut rows = ScannedRows {
            database: &self.database,
            delivery: &self.delivery,
            max_attempts: self.max_attempts,
            late_to: position.from.low_seq,
            late: 0,
        };
        let readers = pass.run(&mut view, &mut rows, &|| false);
        self.seen.late += rows.late;
        if self.likely(self.faults.aborts) {
            tell!(self, "abort");
            return false;
        }
        readers.into_iter().for_each(|reader| self.hand_over(reader));
        true
    }

    /// Where it goes on to; `None`: nowhere.
    fn goal(&self) -> Option<Arc<Tick>> {
        let position = self.delivery.position();
        if let Some(under_way) = &position.under_way {
            return Some(under_way.to.clone());
        }
        let reached = self.ticks.iter().position(|tick| Arc::ptr_eq(tick, &position.from));
        self.ticks.get(reached.map_or(0, |index| index + 1)).cloned()
    }

    /// Adopts the result of a pass, in a transaction that has committed.
    fn hand_over(&mut self, reader: Collector) {
        let parked: Vec<i64> = reader.records.iter().map(parked).collect();
        tell!(self, "park {parked:?}, of {:?} that are not sent", reader.skipped);
        self.seen.parked += parked.len() as u32;
        self.seen.skipped += (reader.skipped.len() - parked.len()) as u32;
        if self.mutant != Mutant::ForgetsParked {
            parked.iter().for_each(|seq| self.park(*seq, 0));
        }
        reader.skipped.iter().for_each(|seq| self.delivery.skipped(*seq));
        for BuiltBatch { batch, contents } in reader.built {
            let seqs: Vec<i64> = batch.entries.iter().map(|entry| entry.seq).collect();
            self.send(&seqs, batch.bytes.len());
            self.delivery.sent(batch.entries, contents, batch.bytes.len());
        }
        self.delivery.advanced(reader.end);
    }

    /// A restart, from the saved state.
    pub(crate) fn crash(&mut self) {
        tell!(self, "crash");
        self.seen.crashes += 1;
        self.shake();
        self.pending.clear();
        self.in_flight.clear();
        for key in self.database.rows() {
            // An event that waits in the table and is read once more is sent in both ways.
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
        self.delivery = delivery(self.tables.cursor.clone(), streams, self.backoff);
        self.accepted = 0;
    }

    /// The settings changed.
    pub(crate) fn change_settings(&mut self) {
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
        self.delivery.retry_changed(self.now);
    }
}

fn parked(record: &Record) -> i64 {
    match record {
        Record::Park { seq, .. } => *seq,
        other => unreachable!("a row that can be read and sent is at most parked, not {other:?}"),
    }
}
