//! A backend's connection to its Redis: the destination, and the sender that connects there.

use crate::server::guc;
use crate::server::process::repeat_log_after;
use crate::server::random;
use crate::server::threads::without_signals;
use crate::tables::options::{Known, Unusable};
use crate::worker::permits::{SenderPermit, ThreadSign};
use relay::redis::destination::{Address, Destination, NodeRoute, Protocol};
use relay::sender::Handle;
use relay::sender::orders::{Order, Report};
use relay::time::Now;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

pub(crate) struct Connection {
    /// An error if the backend's row holds an option that cannot be used.
    destination: Known<Destination>,
    sender: Sender,
    /// Whether the thread of the last sender has ended.
    thread: ThreadSign,
    /// The node that was last found.
    address: Option<Address>,
    /// The node that the current failure came from.
    failed_at: Option<Address>,
    /// Incremented with each refresh of the guard.
    beat: u64,
    /// How often the guard is refreshed, as the servers that watch it were told or will be told.
    interval: Duration,
}

/// The thread that talks to Redis, if there is one.
enum Sender {
    Absent,
    /// It is due, but no permit is free.
    WaitsForTurn,
    /// It is connecting; at `slow_at` a line is logged that this takes long.
    Connecting {
        handle: Handle,
        slow_at: Now,
    },
    There(Handle),
    /// It was ordered to mark in the guard that its owner leaves.
    Releasing(Handle),
    /// It has marked that.
    Released(Handle),
}

impl Sender {
    fn handle(&self) -> Option<&Handle> {
        match self {
            Self::Absent | Self::WaitsForTurn => None,
            Self::Connecting { handle, .. } | Self::There(handle) => Some(handle),
            Self::Releasing(handle) | Self::Released(handle) => Some(handle),
        }
    }

    /// Changes the state and keeps the thread, if there is one.
    fn goes_on(&mut self, to: fn(Handle) -> Self) {
        *self = match std::mem::replace(self, Self::Absent) {
            Self::Connecting { handle, .. } | Self::There(handle) => to(handle),
            Self::Releasing(handle) | Self::Released(handle) => to(handle),
            without @ (Self::Absent | Self::WaitsForTurn) => without,
        };
    }
}

impl Connection {
    pub(crate) fn to(destination: Known<Destination>) -> Self {
        Self {
            destination,
            sender: Sender::Absent,
            thread: ThreadSign::default(),
            address: None,
            failed_at: None,
            beat: 0,
            interval: guc::millis(&guc::POLL_INTERVAL_MS),
        }
    }

    pub(crate) fn destination(&self) -> Result<&Destination, &Unusable> {
        self.destination.as_ref()
    }

    /// The destination for the next sender.
    pub(crate) fn set_destination(&mut self, destination: Known<Destination>) {
        self.destination = destination;
        self.interval = guc::millis(&guc::POLL_INTERVAL_MS);
    }

    /// Whether the sender can stay with this destination.
    pub(crate) fn is_to(&self, destination: &Known<Destination>) -> bool {
        self.destination == *destination
    }

    /// Whether servers that watch the guard know how often it is refreshed. A new claim tells them.
    pub(crate) fn has_told_interval(&self) -> bool {
        self.interval == guc::millis(&guc::POLL_INTERVAL_MS)
    }

    /// Whether the node is looked up, so that another one may replace the connected one.
    pub(crate) fn is_looked_up(&self) -> bool {
        self.destination.as_ref().is_ok_and(|d| d.route != NodeRoute::Direct)
    }

    /// The key of the guard (exactly_once).
    pub(crate) fn guard_key(&self) -> Option<&str> {
        match &self.destination.as_ref().ok()?.protocol {
            Protocol::ExactlyOnce { guard, .. } => Some(guard),
            Protocol::AtLeastOnce { .. } => None,
        }
    }

    pub(crate) fn has_sender(&self) -> bool {
        self.sender.handle().is_some()
    }

    pub(crate) fn waits_for_turn(&self) -> bool {
        matches!(self.sender, Sender::WaitsForTurn)
    }

    pub(crate) fn wait_for_turn(&mut self) {
        if !self.has_sender() {
            self.sender = Sender::WaitsForTurn;
        }
    }

    /// Starts a sender. `ousts`: whether to take the guard from another owner. `patience`: how long it waits for
    /// anything at most.
    pub(crate) fn connect(
        &mut self,
        ousts: bool,
        patience: Duration,
        now: Now,
        waker: &Arc<UnixStream>,
        permit: SenderPermit,
    ) -> std::io::Result<()> {
        let Ok(mut destination) = self.destination.clone() else {
            return Ok(());
        };
        if let Protocol::ExactlyOnce { ousting, .. } = &mut destination.protocol {
            *ousting = ousts.then(random::token);
        }
        destination.wait_at_most(patience);
        let slow_at = now + slow_after(&destination);
        self.sender = Sender::Absent;
        self.thread = permit.sign();
        let handle = without_signals(|| Handle::spawn(destination, waker.clone(), permit))?;
        self.sender = Sender::Connecting { handle, slow_at };
        Ok(())
    }

    /// Takes the sign of the last sender's thread.
    pub(crate) fn take_sign(&mut self) -> ThreadSign {
        std::mem::take(&mut self.thread)
    }

    /// Lets the sender end, or notes that it has ended. Returns whether there was one.
    pub(crate) fn drop_sender(&mut self) -> bool {
        let had_one = self.has_sender();
        if had_one {
            self.sender = Sender::Absent;
        }
        had_one
    }

    /// Forgets the node that was last found.
    pub(crate) fn forget_address(&mut self) {
        self.address = None;
    }

    /// Notes the node that is about to be connected to. False: it is the same as before.
    pub(crate) fn found(&mut self, address: Address) -> bool {
        let is_other = self.address.as_ref() != Some(&address);
        self.address = Some(address);
        is_other
    }

    /// Notes that the failure came from the node that was last found.
    pub(crate) fn note_failure(&mut self) {
        self.failed_at.clone_from(&self.address);
    }

    pub(crate) fn report(&self) -> Option<Report> {
        self.sender.handle().and_then(Handle::report)
    }

    /// Gives the sender an order. A sender that has ended has already reported that.
    pub(crate) fn order(&self, order: Order) {
        if let Some(handle) = self.sender.handle() {
            let _ = handle.order(order);
        }
    }

    /// Wakes the sender, because a batch is about to come.
    pub(crate) fn rouse(&self) {
        if let Some(handle) = self.sender.handle() {
            handle.rouse();
        }
    }

    /// After which time an answer that the backend waits for takes long.
    pub(crate) fn slow_after(&self) -> Option<Duration> {
        self.destination.as_ref().ok().map(slow_after)
    }

    /// When to log that connecting takes long.
    pub(crate) fn slow_at(&self) -> Option<Now> {
        match self.sender {
            Sender::Connecting { slow_at, .. } => Some(slow_at),
            _ => None,
        }
    }

    /// Notes that this was logged, so that it is logged again only later.
    pub(crate) fn is_slow(&mut self, now: Now) {
        if let Sender::Connecting { slow_at, .. } = &mut self.sender {
            *slow_at = now + repeat_log_after();
        }
    }

    /// The sender is up or has failed, so it is no longer slow.
    pub(crate) fn has_connected(&mut self) {
        self.sender.goes_on(Sender::There);
    }

    /// Checks the connection, and with exactly_once refreshes the guard.
    pub(crate) fn refresh(&mut self) {
        if let Some(handle) = self.sender.handle() {
            self.beat += 1;
            handle.beat(self.beat);
        }
    }

    /// Marks in the guard that its owner leaves; only once.
    pub(crate) fn release(&mut self) {
        if let Sender::Connecting { handle, .. } | Sender::There(handle) = &self.sender {
            self.beat += 1;
            let _ = handle.order(Order::Beat {
                beat: self.beat,
                released: true,
            });
            self.sender.goes_on(Sender::Releasing);
        }
    }

    pub(crate) fn is_releasing(&self) -> bool {
        matches!(self.sender, Sender::Releasing(_))
    }

    pub(crate) fn released(&mut self) {
        self.sender.goes_on(Sender::Released);
    }

    /// Where the backend is connected, as text.
    pub(crate) fn place(&self) -> String {
        self.shown(self.address.as_ref())
    }

    /// Where its failure came from, as text.
    pub(crate) fn failed_place(&self) -> String {
        self.shown(self.failed_at.as_ref())
    }

    fn shown(&self, address: Option<&Address>) -> String {
        match (address, &self.destination) {
            (Some(address), _) => address.to_string(),
            (None, Ok(destination)) if destination.route == NodeRoute::Direct => destination.address.to_string(),
            (None, Ok(destination)) => destination.route.to_string(),
            (None, Err(_)) => String::new(),
        }
    }

    /// Whether the server's certificate is not verified.
    pub(crate) fn is_insecure(&self) -> bool {
        let tls = self.destination.as_ref().ok().and_then(|d| d.tls.as_ref());
        tls.is_some_and(|tls| tls.insecure)
    }
}

/// Servers that answer should be ready within twice their timeouts.
fn slow_after(destination: &Destination) -> Duration {
    2 * (destination.connect_timeout.saturating_add(destination.socket_timeout))
}
