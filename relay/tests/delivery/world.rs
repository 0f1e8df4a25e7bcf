//! The events of a schedule.

use super::*;

/// A fault that is put into the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutant {
    None,
    /// Saves the position that was read as the cursor, not the acknowledged one.
    SavesRead,
    /// Saves the cursor before it has saved the refusals.
    SavesBeforeRecords,
    /// Does not save the refusals.
    ForgetsRefused,
    /// Does not copy the rows that must wait behind others.
    ForgetsParked,
    /// Copies them before it has saved that the first was refused.
    ParksBeforeRecords,
}

/// What happens in a schedule.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Faults {
    pub sick: f64,
    pub trouble: f64,
    pub losses: f64,
    pub crashes: f64,
    pub settings: f64,
    /// The share of reading transactions that abort.
    pub aborts: f64,
    /// Redis does not recover before the events on their way have been refused too: then no order is lost.
    pub tidy: bool,
}

impl Faults {
    pub(crate) const NONE: Self = Self {
        sick: 0.0,
        trouble: 0.0,
        losses: 0.0,
        crashes: 0.0,
        settings: 0.0,
        aborts: 0.0,
        tidy: false,
    };

    pub(crate) fn random(rng: &mut Rng) -> Self {
        let mut some = |often: f64| if rng.bool() { rng.f64() * often } else { 0.0 };
        Self {
            sick: some(0.1),
            trouble: some(0.06),
            losses: some(0.04),
            crashes: some(0.02),
            settings: some(0.02),
            aborts: some(0.2),
            tidy: some(1.0) > 0.0,
        }
    }
}

/// Counts of rare events, so that no test passes because they did not happen.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub parked: u32,
    pub skipped: u32,
    pub failed: u32,
    pub failed_streams: u32,
    pub accepted_after_waiting: u32,
    pub lost_in_mid_batch: u32,
    pub crashes: u32,
    pub full_windows: u32,
    pub late: u32,
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Self) {
        self.parked += other.parked;
        self.skipped += other.skipped;
        self.failed += other.failed;
        self.failed_streams += other.failed_streams;
        self.accepted_after_waiting += other.accepted_after_waiting;
        self.lost_in_mid_batch += other.lost_in_mid_batch;
        self.crashes += other.crashes;
        self.full_windows += other.full_windows;
        self.late += other.late;
    }
}

pub(crate) struct World {
    pub rng: Rng,
    pub mutant: Mutant,
    pub faults: Faults,
    /// The maximum of an event.
    pub max_attempts: u32,
    pub batch_size: usize,
    pub backoff: Backoff,
    pub now: Now,
    pub database: Database,
    pub tables: Tables,
    pub redis: Redis,
    pub connection: Option<Connection>,
    /// Commands of old connections that are still to be executed.
    pub leftovers: Vec<VecDeque<Command>>,
    pub delivery: Delivery,
    /// State of this life of the worker.
    pub ticks: Vec<Arc<Tick>>,
    /// Results that are not saved yet, in order.
    pub pending: Vec<Record>,
    /// The batches that the sender has not reported.
    pub in_flight: VecDeque<(Vec<i64>, usize)>,
    /// How often a row may have been executed without the worker's knowledge.
    pub doubts: HashMap<i64, u32>,
    /// Streams that had events in flight behind a refused one when everything was in doubt: they may have overtaken it.
    pub shaken: HashSet<Rc<str>>,
    pub accepted: u64,
    pub seen: Seen,
    pub tells: bool,
}

impl World {
    pub(crate) fn new(seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng::with_seed(seed);
        let faults = Faults::random(&mut rng);
        let delay = [10, 1_000, 100_000][rng.usize(..3)];
        let backoff = Backoff {
            exponential: rng.bool(),
            delay: Duration::from_millis(delay),
            max_delay: Duration::from_millis(delay * 20),
        };
        let fickle = if faults.tidy {
            0.0
        } else {
            [0.0, 0.05, 0.3][rng.usize(..3)]
        };
        Self {
            mutant,
            faults,
            max_attempts: rng.u32(1..5),
            batch_size: rng.usize(1..12),
            backoff,
            now: Now::ZERO,
            database: Database::new(&mut rng, STREAMS),
            tables: Tables {
                refused: BTreeMap::new(),
                failed: BTreeMap::new(),
                cursor: Position::beginning(),
            },
            redis: Redis {
                fickle,
                ..Redis::default()
            },
            connection: None,
            leftovers: Vec::new(),
            delivery: delivery(Position::beginning(), Streams::default(), backoff),
            ticks: Vec::new(),
            pending: Vec::new(),
            in_flight: VecDeque::new(),
            doubts: HashMap::new(),
            shaken: HashSet::new(),
            accepted: 0,
            seen: Seen::default(),
            tells: std::env::var_os("SEED").is_some(),
            rng,
        }
    }

    pub(crate) fn likely(&mut self, probability: f64) -> bool {
        likely(&mut self.rng, probability)
    }

    pub(crate) fn random_step(&mut self) -> Result<(), String> {
        match self.rng.u8(..100) {
            0..15 => self.database.steps(&mut self.rng, 6),
            15..20 => self.take_tick(),
            20..35 => {
                let limit = self.rng.usize(..40);
                self.read(limit);
            }
            35..40 => drop(self.retry()),
            40..60 => {
                for _ in 0..self.rng.usize(..30) {
                    self.execute();
                }
            }
            60..75 => {
                for _ in 0..self.rng.usize(..30) {
                    self.read_reply();
                }
            }
            75..85 => drop(self.take_report()),
            85..90 => {
                self.tend_connection();
                let succeeds = !self.likely(self.faults.losses * 5.0);
                self.connect(succeeds);
            }
            90..93 => {
                self.save_cursor();
                self.check_cursor()?;
            }
            93..96 => self.write_down(),
            _ => self.now += self.backoff.delay.mul_f64(self.rng.f64() * 2.0),
        }
        self.change_health();
        if self.likely(self.faults.losses) {
            self.lose_connection();
        }
        if self.likely(self.faults.crashes) {
            self.crash();
        }
        if self.likely(self.faults.settings) {
            self.change_settings();
        }
        Ok(())
    }

    /// Continues without faults until nothing is left to do at this time; the caller sets the limit of the clock.
    pub(crate) fn run_dry(&mut self) -> Result<(), String> {
        for _ in 0..100_000 {
            self.tend_connection();
            let did = [
                self.connect(true),
                self.take_report(),
                self.retry(),
                self.read_on(),
                self.execute(),
                self.read_reply(),
            ];
            if !did.contains(&true) {
                return Ok(());
            }
        }
        Err("does not come to an end".to_owned())
    }

    /// Reads a large piece; true: there was something to read.
    pub(crate) fn read_on(&mut self) -> bool {
        self.faults.aborts = 0.0;
        let before = self.delivery.position().clone();
        self.read(1_000) && !self.delivery.position().same_place(&before)
    }

    pub(crate) fn finish(&mut self) -> Result<(), String> {
        self.database.finish(&mut self.rng);
        self.take_tick();
        if self.faults.tidy {
            self.run_dry()?;
        }
        self.redis.trouble = None;
        self.redis.fickle = 0.0;
        // The backend recovers; some streams are still refused, and the time of their retries does not come: the others
        // go on.
        for _ in 0..4 {
            self.delivery.retry_changed(self.now);
            self.now = self.delivery.connects_at().map_or(self.now, |at| at.max(self.now));
            self.run_dry()?;
        }
        let end = self.delivery.position().clone();
        self.write_down();
        for key in self.database.rows().filter(|key| self.database.is_committed(key.seq)) {
            if !end.covers(key) {
                return Err(format!("{} was not read, yet only some streams are refused", key.seq));
            }
            let waits = self.tables.refused.contains_key(&self.key(key.seq));
            if !waits && !self.redis.held.contains(&key.seq) && !self.tables.failed.contains_key(&key.seq) {
                return Err(format!("{} was read and is nowhere", key.seq));
            }
        }
        // Now some streams are corrected, or all; the others use up their attempts.
        let mends_all = self.rng.bool();
        self.redis.sick.retain(|_| !mends_all);
        for _ in 0..10_000 {
            self.run_dry()?;
            if self.tables.refused.is_empty() {
                return Ok(());
            }
            match self.delivery.due_at() {
                Some(due) => self.now = self.now.max(due),
                None => return Err("events wait, and nothing is due".to_owned()),
            }
        }
        Err("events wait for ever".to_owned())
    }
}

/// A delivery in a new life, from a saved cursor.
pub(crate) fn delivery(position: Position, streams: Streams, backoff: Backoff) -> Delivery {
    let cursor = Cursor { position, number: 0 };
    let mut delivery = Delivery::new(Guarantee::AtLeastOnce, cursor, streams, backoff);
    delivery.set_window_bytes(WINDOW_BYTES);
    delivery
}
