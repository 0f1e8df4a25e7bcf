//! A backend's way to its Redis: where that is, and the sender that goes there.

use crate::server::guc;
use crate::server::process::repeat_log_after;
use crate::server::random;
use crate::tables::options::{Known, Unusable};
use crate::worker::permits::SenderPermit;
use relay::redis::destination::{Address, Destination, Protocol, Route};
use relay::sender::Handle;
use relay::sender::orders::{Order, Report};
use relay::time::Now;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

pub(crate) struct Connection {
    /// Unless the backend's row holds something that cannot be used.
    destination: Known<Destination>,
    sender: Sender,
    /// The node that was found last.
    address: Option<Address>,
    /// The node that the current failure came from.
    failed_at: Option<Address>,
    /// Goes up with each refresh of the guard.
    beat: u64,
    /// How often the guard is refreshed, as those who watch it were told or will be.
    interval: Duration,
}

/// The thread that talks to Redis, if there is one.
enum Sender {
    Absent,
    /// It is due, and there is no permit for one.
    WaitsForTurn,
    /// On its way up, which takes long from `slow_at` on.
    Connecting {
        handle: Handle,
        slow_at: Now,
    },
    There(Handle),
    /// Was told to tell those who watch the guard that its owner leaves.
    Releasing(Handle),
    /// Has told them.
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

    /// Goes on to another state with the same thread, if there is one.
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
            address: None,
            failed_at: None,
            beat: 0,
            interval: guc::millis(&guc::POLL_INTERVAL_MS),
        }
    }

    pub(crate) fn destination(&self) -> Result<&Destination, &Unusable> {
        self.destination.as_ref()
    }

    /// For the next sender.
    pub(crate) fn set_destination(&mut self, destination: Known<Destination>) {
        self.destination = destination;
        self.interval = guc::millis(&guc::POLL_INTERVAL_MS);
    }

    /// Whether a sender need not be replaced because of a destination.
    pub(crate) fn is_to(&self, destination: &Known<Destination>) -> bool {
        self.destination == *destination
    }

    /// Whether those who watch the guard know how often it is refreshed. A new claim tells them.
    pub(crate) fn has_told_interval(&self) -> bool {
        self.interval == guc::millis(&guc::POLL_INTERVAL_MS)
    }

    /// Whether another node may take the place of the one that is connected to.
    pub(crate) fn is_looked_up(&self) -> bool {
        self.destination.as_ref().is_ok_and(|d| d.route != Route::Direct)
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

    /// Starts a sender. `ousts`: it is to take the guard from whoever has it.
    pub(crate) fn connect(
        &mut self,
        ousts: bool,
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
        let slow_at = now + 2 * (destination.connect_timeout + destination.socket_timeout);
        self.sender = Sender::Absent;
        let handle = without_signals(|| Handle::spawn(destination, waker.clone(), permit))?;
        self.sender = Sender::Connecting { handle, slow_at };
        Ok(())
    }

    /// Lets the sender go, or notes that it has gone. True: there was one.
    pub(crate) fn drop_sender(&mut self) -> bool {
        let had_one = self.has_sender();
        if had_one {
            self.sender = Sender::Absent;
        }
        had_one
    }

    /// The node that was found last counts no longer.
    pub(crate) fn forget_address(&mut self) {
        self.address = None;
    }

    /// A node is about to be connected to. False: it is the same as before.
    pub(crate) fn found(&mut self, address: Address) -> bool {
        let is_other = self.address.as_ref() != Some(&address);
        self.address = Some(address);
        is_other
    }

    /// What fails is the node that was found last.
    pub(crate) fn note_failure(&mut self) {
        self.failed_at.clone_from(&self.address);
    }

    pub(crate) fn report(&self) -> Option<Report> {
        self.sender.handle().and_then(Handle::report)
    }

    /// Gives the sender an order; one that has ended has said so already.
    pub(crate) fn order(&self, order: Order) {
        if let Some(handle) = self.sender.handle() {
            let _ = handle.order(order);
        }
    }

    /// A batch is about to come.
    pub(crate) fn rouse(&self) {
        if let Some(handle) = self.sender.handle() {
            handle.rouse();
        }
    }

    /// When it is looked whether the sender takes long to come up.
    pub(crate) fn slow_at(&self) -> Option<Now> {
        match self.sender {
            Sender::Connecting { slow_at, .. } => Some(slow_at),
            _ => None,
        }
    }

    /// That was logged, and is logged again later.
    pub(crate) fn is_slow(&mut self, now: Now) {
        if let Sender::Connecting { slow_at, .. } = &mut self.sender {
            *slow_at = now + repeat_log_after();
        }
    }

    /// It is up, or has failed: it is not slow any more.
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

    /// Tells those who watch the guard that its owner leaves; once.
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

    /// Where the backend is, or with `fails` where its failure came from, in words.
    pub(crate) fn place(&self, fails: bool) -> String {
        let address = if fails { &self.failed_at } else { &self.address };
        match (address, &self.destination) {
            (Some(address), _) => address.to_string(),
            (None, Ok(destination)) if destination.route == Route::Direct => destination.address.to_string(),
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

/// Starts a thread with all signals blocked in it: they are the main thread's.
pub(crate) fn without_signals<R>(spawn: impl FnOnce() -> std::io::Result<R>) -> std::io::Result<R> {
    // SAFETY: the mask is saved, and put back on all ways out: spawn returns its errors.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let spawned = spawn();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        spawned
    }
}
