//! A TCP proxy in front of a server: the network between a relay and its Redis, with its faults.
//!
//! One thread moves the bytes of all connections (`pump.rs`); meanwhile a test changes the rules. Bytes that were read
//! from one side and may not be written to the other yet are kept, even after their sender has closed its connection:
//! so a write of a dead process can arrive late.

mod pump;

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::port::TakenPort;
use crate::wait::{LIMIT, eventually};
use pump::Link;

/// The direction of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// A proxy on 127.0.0.1. It passes everything on at once until it is told otherwise; each rule lasts until
/// [`pass`](Self::pass) or its opposite.
#[derive(Debug)]
pub struct Proxy {
    orders: Sender<Order>,
    /// A byte here makes the pump look at its orders.
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
    port: TakenPort,
}

/// A fault of the first connection that carries this much, once.
#[derive(Debug)]
struct Rule {
    after: After,
    then: Then,
}

#[derive(Debug)]
enum After {
    Bytes(u64),
    /// These bytes.
    Mark(Vec<u8>),
}

#[derive(Debug)]
enum Then {
    Cut,
    Hold,
}

/// A change of the state in the pump's thread, which owns it.
type Order = Box<dyn FnOnce(&mut State) + Send>;

/// A value for each [`Way`].
type Both<T> = [T; 2];

#[derive(Debug)]
struct State {
    /// The server's port on 127.0.0.1, for later connections.
    target: u16,
    /// `None`: connections are refused.
    listener: Option<TcpListener>,
    links: Vec<Link>,
    delay: Duration,
    /// Whether later connections are held from the start.
    hold_new: Both<bool>,
    rules: Both<Option<Rule>>,
    passed: Both<u64>,
    accepted: usize,
    cuts: usize,
}

impl Proxy {
    /// In front of a port of 127.0.0.1.
    #[track_caller]
    pub fn to(target: u16) -> Self {
        let (wake, woken) = UnixStream::pair().expect("a socket pair");
        for end in [&wake, &woken] {
            end.set_nonblocking(true).expect("a nonblocking socket");
        }
        let (port, listener) = listen();
        let (orders, received) = channel();
        let state = State {
            target,
            listener: Some(listener),
            links: Vec::new(),
            delay: Duration::ZERO,
            hold_new: [false; 2],
            rules: [None, None],
            passed: [0; 2],
            accepted: 0,
            cuts: 0,
        };
        let thread = std::thread::spawn(move || pump::run(state, &received, &woken));
        Proxy {
            orders,
            wake,
            thread: Some(thread),
            port,
        }
    }

    /// The port that clients connect to; it stays the same.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// Leads later connections to another server, as a failover does; open connections stay where they are.
    pub fn point_to(&self, target: u16) {
        self.ask(move |state| state.target = target);
    }

    /// Ends every rule: held bytes are sent, and connections are accepted.
    #[track_caller]
    pub fn pass(&self) {
        self.accept();
        self.ask(|state| {
            state.delay = Duration::ZERO;
            state.rules = [None, None];
        });
        self.release();
    }

    /// Delays each byte by this time, in both directions.
    pub fn delay(&self, delay: Duration) {
        self.ask(move |state| state.delay = delay);
    }

    /// Cuts all connections; their bytes on the way are lost.
    pub fn cut(&self) {
        self.ask(|state| {
            state.cuts += state.links.len();
            state.links.clear();
        });
    }

    /// Lets exactly this many more bytes pass in one direction, and cuts the connection that carried the last of them.
    /// Zero cuts before the next byte.
    pub fn cut_after(&self, way: Way, bytes: u64) {
        self.rule(way, After::Bytes(bytes), Then::Cut);
    }

    /// Cuts the next connection that carries these bytes (at most 64), right after them.
    pub fn cut_behind(&self, way: Way, mark: &[u8]) {
        self.rule(way, After::mark(mark), Then::Cut);
    }

    /// Holds the next connection that carries these bytes (at most 64), right after them: later bytes are kept until
    /// [`release`](Self::release).
    pub fn hold_behind(&self, way: Way, mark: &[u8]) {
        self.rule(way, After::mark(mark), Then::Hold);
    }

    fn rule(&self, way: Way, after: After, then: Then) {
        self.ask(move |state| state.rules[way as usize] = Some(Rule { after, then }));
    }

    /// Keeps the bytes of the present connections in this direction, until [`release`](Self::release); later
    /// connections pass.
    pub fn hold(&self, way: Way) {
        self.ask(move |state| {
            for link in &mut state.links {
                link.hold(way, true);
            }
        });
    }

    /// The same, also for later connections.
    pub fn hold_all(&self, way: Way) {
        // In one order: no connection may be accepted in between.
        self.ask(move |state| {
            state.hold_new[way as usize] = true;
            for link in &mut state.links {
                link.hold(way, true);
            }
        });
    }

    /// Sends the held bytes, also those from connections whose sender has closed them.
    pub fn release(&self) {
        self.ask(|state| {
            state.hold_new = [false; 2];
            for link in &mut state.links {
                link.hold(Way::ToServer, false);
                link.hold(Way::ToClient, false);
            }
        });
    }

    /// Refuses later connections; open ones stay.
    pub fn refuse(&self) {
        self.ask(|state| state.listener = None);
    }

    /// Accepts connections again.
    #[track_caller]
    pub fn accept(&self) {
        if self.ask(|state| state.listener.is_some()) {
            return;
        }
        let listener = TcpListener::bind(("127.0.0.1", self.port()))
            .unwrap_or_else(|error| panic!("cannot listen on {} again: {error}", self.port()));
        listener.set_nonblocking(true).expect("a nonblocking socket");
        self.ask(|state| state.listener = Some(listener));
    }

    // --- examining it

    /// Connections that are open on either side, including those that only hold bytes of a client that has left.
    pub fn connections(&self) -> usize {
        self.ask(|state| state.links.len())
    }

    /// Of those, the ones whose client has gone.
    pub fn abandoned(&self) -> usize {
        self.ask(|state| state.links.iter().filter(|link| link.is_abandoned()).count())
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> usize {
        self.ask(|state| state.accepted)
    }

    /// Connections cut so far, by any rule.
    pub fn cuts(&self) -> usize {
        self.ask(|state| state.cuts)
    }

    /// Bytes that have passed in this direction so far.
    pub fn passed(&self, way: Way) -> u64 {
        self.ask(move |state| state.passed[way as usize])
    }

    /// Bytes that are kept for now.
    pub fn held(&self, way: Way) -> usize {
        self.ask(move |state| state.links.iter().map(|link| link.queued(way)).sum())
    }

    /// Waits until at least this many bytes are kept.
    #[track_caller]
    pub fn wait_held(&self, way: Way, bytes: usize) {
        eventually(&format!("{bytes} bytes held {way:?}"), LIMIT, || {
            (self.held(way) >= bytes).then_some(())
        });
    }

    /// Waits until a rule has cut a connection, after `cuts` of them.
    #[track_caller]
    pub fn wait_cut(&self, cuts: usize) {
        eventually("a connection to be cut", LIMIT, || (self.cuts() > cuts).then_some(()));
    }

    /// Lets the pump's thread do something, between two looks at the sockets, and waits for it.
    fn ask<T: Send + 'static>(&self, order: impl FnOnce(&mut State) -> T + Send + 'static) -> T {
        let (answer, answered) = channel();
        let order: Order = Box::new(move |state| {
            // The caller waits below.
            let _ = answer.send(order(state));
        });
        self.orders.send(order).expect("the proxy's thread has panicked");
        self.nudge();
        answered.recv().expect("the proxy's thread has panicked")
    }

    fn nudge(&self) {
        // If the socket is full, the thread wakes anyway.
        let _ = (&self.wake).write(&[1]);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Nobody can send orders any more: that ends the thread.
        self.orders = channel().0;
        self.nudge();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl After {
    fn mark(mark: &[u8]) -> Self {
        assert!(
            (1..=Self::LONGEST_MARK).contains(&mark.len()),
            "a mark of {} bytes",
            mark.len()
        );
        After::Mark(mark.to_vec())
    }
}

fn listen() -> (TakenPort, TcpListener) {
    loop {
        let port = TakenPort::any();
        // Used by another process meanwhile: nothing reserves a port permanently.
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port.number)) {
            listener.set_nonblocking(true).expect("a nonblocking socket");
            return (port, listener);
        }
    }
}
