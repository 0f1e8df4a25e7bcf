//! The duty of a backend in the worker. Each duty holds only what it needs.

use crate::tables::backends::BackendRow;
use crate::tables::options::{Known, Options, Topology, Unusable};
use crate::tables::ticks;
use crate::worker::backend::connection::Connection;
use crate::worker::backend::settings::{self, Home};
use relay::reading::role::Role;
use relay::redis::destination::Destination;
use relay::time::Now;

pub(crate) enum Duty {
    /// Send a backend's events; in a cluster, those of one lane.
    Send(Box<Service>),
    /// Find hash slots of a cluster that have no lane yet (see `lanes.rs`). It sends nothing.
    Find(Box<Finder>),
    /// Fail the events of a deleted backend or of one of its lanes. `next_xid`: no transaction with this id or a higher
    /// one had begun when the worker learned of the deletion. `None`: it stays as long as the worker runs.
    Fail { lane: Option<u16>, next_xid: Option<u64> },
    /// Look after events whose backend does not exist.
    Strays,
}

/// Sends one backend's events, or those of a lane.
pub(crate) struct Service {
    pub row: BackendRow,
    /// The hash slot of a lane, in a cluster.
    pub lane: Option<u16>,
    pub connection: Connection,
}

pub(crate) struct Finder {
    pub row: BackendRow,
    /// Where its lanes connect, except for their hash slots.
    pub destination: Known<Destination>,
    /// Since when an event waits for a lane that cannot be made.
    pub lacks_lane_since: Option<Now>,
}

impl Duty {
    /// The duty of a backend that is not deleted; in a cluster, of its finder. `has_lanes`: lanes of it are saved.
    pub(crate) fn of(row: BackendRow, has_lanes: bool, home: &Home) -> Self {
        let finds = match &row.options.mode {
            Ok(mode) => *mode == Topology::Cluster,
            // It sends nothing now. But retention must not rely on one cursor if there are several.
            Err(_) => has_lanes,
        };
        match finds {
            true => Self::Find(Box::new(Finder::new(row, home))),
            false => Self::Send(Box::new(Service::new(row, None, home))),
        }
    }

    /// The duty of one of its lanes.
    pub(crate) fn of_lane(&self, hash_slot: u16, home: &Home) -> Self {
        let lane = Some(hash_slot);
        match self.row() {
            Some(row) => Self::Send(Box::new(Service::new(row.clone(), lane, home))),
            None => Self::of_deleted(lane),
        }
    }

    /// The duty of a deleted backend, or of one of its lanes.
    pub(crate) fn of_deleted(lane: Option<u16>) -> Self {
        let next_xid = Some(ticks::next_xid());
        Self::Fail { lane, next_xid }
    }

    /// The role that the schedule of reading uses.
    pub(crate) fn role(&self) -> Role {
        match self {
            Self::Send(_) => Role::Redis,
            Self::Find(_) => Role::Finder,
            Self::Fail { .. } => Role::Deleted,
            Self::Strays => Role::Strays,
        }
    }

    pub(crate) fn lane(&self) -> Option<u16> {
        match self {
            Self::Send(service) => service.lane,
            Self::Fail { lane, .. } => *lane,
            Self::Find(_) | Self::Strays => None,
        }
    }

    /// The row of `outbox.backends`, if there is one.
    pub(crate) fn row(&self) -> Option<&BackendRow> {
        match self {
            Self::Send(service) => Some(&service.row),
            Self::Find(finder) => Some(&finder.row),
            Self::Fail { .. } | Self::Strays => None,
        }
    }

    pub(crate) fn row_mut(&mut self) -> Option<&mut BackendRow> {
        match self {
            Self::Send(service) => Some(&mut service.row),
            Self::Find(finder) => Some(&mut finder.row),
            Self::Fail { .. } | Self::Strays => None,
        }
    }

    pub(crate) fn options(&self) -> Option<&Options> {
        self.row().map(|row| &row.options)
    }

    pub(crate) fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Send(service) => Some(&service.connection),
            Self::Find(_) | Self::Fail { .. } | Self::Strays => None,
        }
    }

    pub(crate) fn connection_mut(&mut self) -> Option<&mut Connection> {
        match self {
            Self::Send(service) => Some(&mut service.connection),
            Self::Find(_) | Self::Fail { .. } | Self::Strays => None,
        }
    }

    /// The option of its row that cannot be used, if there is one.
    pub(crate) fn unusable(&self) -> Option<&Unusable> {
        match self {
            Self::Send(service) => service.connection.destination().err(),
            Self::Find(finder) => finder.destination.as_ref().err(),
            Self::Fail { .. } | Self::Strays => None,
        }
    }
}

impl Service {
    fn new(row: BackendRow, lane: Option<u16>, home: &Home) -> Self {
        let connection = Connection::to(settings::destination(&row, home, lane));
        Self { row, lane, connection }
    }
}

impl Finder {
    pub(crate) fn new(row: BackendRow, home: &Home) -> Self {
        let destination = settings::destination(&row, home, None);
        Self {
            row,
            destination,
            lacks_lane_since: None,
        }
    }
}
