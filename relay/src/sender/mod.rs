//! A sender: the thread that owns one connection of one backend, from connecting to the first error.
//!
//! It takes orders from a bounded channel, reads every reply, and reports each batch in order. With at_least_once it
//! writes up to [`PIPELINED_BATCHES`] batches ahead of their replies; with exactly_once it sends the output of
//! [`Conversation`]. It reports the first error of the connection and ends. The worker decides what was delivered and
//! when to try again with a new sender. A sender knows nothing about Postgres.

mod at_least_once;
pub mod conversation;
mod exactly_once;
mod idle;
mod next_order;
pub mod orders;
mod reporter;
pub mod survey;
pub mod tails;

use crate::delivery::flight::WINDOW_BATCHES;
use crate::failure::Failure;
use crate::redis::destination::{Address, Destination, Protocol};
use crate::redis::topology;
use crate::sender::at_least_once::pipeline;
use crate::sender::conversation::Conversation;
use crate::sender::exactly_once::converse;
use crate::sender::idle::{Idle, Line};
use crate::sender::orders::Order;
use crate::sender::orders::Report;
use crate::sender::reporter::Reporter;

use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use std::io::{self};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

/// Room for orders in addition to batches.
const SPARE_ORDERS: usize = 8;

/// The worker's end of a sender. Dropping it makes the thread end when it next checks, without waiting for it.
pub struct Handle {
    orders: Sender<Order>,
    reports: Receiver<Report>,
    idle: Idle,
}

impl Handle {
    /// Starts a thread that connects to `destination`. One byte is written to `waker` (non-blocking) after reports. The
    /// caller must block all signals of its process around this call, because a thread inherits the mask. `permit` is
    /// dropped when the thread ends.
    pub fn spawn(destination: Destination, waker: Arc<UnixStream>, permit: impl Send + 'static) -> io::Result<Self> {
        // After a refusal, a second window may be handed over before the sender has dropped the first. There must be
        // room for both, because a batch that is not taken would leave a gap.
        let (orders, to_obey) = bounded(2 * WINDOW_BATCHES + SPARE_ORDERS);
        // There are at most two reports for each batch, one for each other order, and those at the connection's
        // beginning and end, so a send never blocks. Nodes that could not be reached are reported before any of these.
        // (A worker that did not run while replicas came and went many times finds the channel closed, and starts
        // again.)
        let (to_report, reports) = bounded(2 * WINDOW_BATCHES + SPARE_ORDERS);
        let idle = Idle::default();
        let to_idle = idle.clone();
        thread::Builder::new()
            .name(format!("sender {}", destination.client_name).chars().take(15).collect())
            .stack_size(512 * 1024)
            .spawn(move || {
                let _permit = permit;
                let reporter = Reporter {
                    reports: to_report,
                    waker,
                };
                run(&destination, &to_obey, &reporter, &to_idle);
            })?;
        Ok(Self { orders, reports, idle })
    }

    /// Refreshes the guard over an idle connection, or checks that the connection exists (at_least_once). The sender is
    /// not woken as long as the previous refresh was answered as usual.
    pub fn beat(&self, beat: u64) {
        // While Redis does not answer, orders must not accumulate and take the room of batches.
        if !self.idle.beat(beat) && self.has_begun_all() {
            let _ = self.order(Order::Beat { beat, released: false });
        }
    }

    /// Gives an order. Returns it if the channel is full or the thread has ended (its report has the reason).
    pub fn order(&self, order: Order) -> Result<(), Order> {
        self.orders.try_send(order).map_err(|e| match e {
            TrySendError::Full(order) | TrySendError::Disconnected(order) => order,
        })
    }

    /// Wakes a sender that has no orders, so that it is awake when the batch comes that is about to be read.
    pub fn rouse(&self) {
        if self.has_begun_all() {
            let _ = self.order(Order::Rouse);
        }
    }

    /// Whether it has begun with all of its orders.
    pub fn has_begun_all(&self) -> bool {
        self.orders.is_empty()
    }

    /// The next report, without waiting. A thread that ended without a report (because it panicked) counts as lost.
    pub fn report(&self) -> Option<Report> {
        match self.reports.try_recv() {
            Ok(report) => Some(report),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Report::Lost {
                failure: Failure::backend("the sender thread ended unexpectedly"),
                accepted: 0,
                refused: Vec::new(),
            }),
        }
    }
}

fn run(destination: &Destination, orders: &Receiver<Order>, reporter: &Reporter, idle: &Idle) {
    let mut found = |address: &Address| {
        reporter.report(Report::Found(address.clone()));
    };
    let connection = match topology::open(destination, &mut found) {
        Ok(connection) => connection,
        Err(failure) => return reporter.lost(failure),
    };
    let outcome = match &destination.protocol {
        Protocol::AtLeastOnce { replicas } => pipeline(connection, destination, *replicas, orders, reporter, idle),
        Protocol::ExactlyOnce {
            guard,
            replicas,
            ousting,
        } => {
            let conversation = Conversation::new(guard, *replicas, ousting.as_deref());
            let line = Line::of(connection, Some(conversation));
            converse(line, orders, reporter, idle)
        }
    };
    if let Err(failure) = outcome {
        reporter.lost(topology::heard(destination, failure));
    }
}
