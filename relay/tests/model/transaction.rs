//! A transaction of the model of Postgres.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Running,
    Prepared,
    Committed,
    Aborted,
}

#[derive(Clone, Debug)]
pub(crate) struct Transaction {
    /// Drawn at the first write.
    pub(super) xid: Option<u64>,
    /// The rows and the ids of each open savepoint; of the transaction itself at the bottom.
    pub(super) levels: Vec<Level>,
    pub(super) status: Status,
    /// Its id is drawn, its event's number not yet.
    pub(super) publishing: bool,
    /// The highest number at that time, and when that was.
    pub(super) before: i64,
    pub(super) looked: u64,
    /// What it still means to do before it ends.
    pub(super) plans: u32,
    /// It publishes at the planned times; otherwise it writes elsewhere.
    pub(super) publishes: bool,
    pub(super) streams: Vec<u8>,
    /// The moment it ended.
    pub(super) ended: u64,
}

impl Transaction {
    pub(super) fn new() -> Self {
        Self {
            xid: None,
            levels: vec![Level::default()],
            status: Status::Running,
            publishing: false,
            before: 0,
            looked: 0,
            plans: 0,
            publishes: true,
            streams: Vec::new(),
            ended: u64::MAX,
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Level {
    pub(super) own: Option<u64>,
    pub(super) xids: Vec<u64>,
    pub(super) rows: Vec<i64>,
}
