//! A TCP proxy in front of a server: the network between a relay and its Redis, and all that a network does.
//!
//! One thread moves the bytes of all connections (`pump.rs`); a test changes the rules meanwhile. What was read from
//! one side and may not be written to the other yet is kept, also when the side that sent it has long closed its
//! connection: so a write of the dead can arrive late.

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

/// In which direction bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToServer,
    ToClient,
}

/// A proxy on 127.0.0.1. It passes everything on at once until it is told otherwise; each rule stands until
/// [`pass`](Self::pass) or its opposite.
#[derive(Debug)]
pub struct Proxy {
    orders: Sender<Order>,
    /// A byte here makes the pump look at its orders.
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
    port: TakenPort,
}

/// Something that befalls the first connection which carries so much, once.
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

/// What is done to the state in the pump's thread, which owns it.
type Order = Box<dyn FnOnce(&mut State) + Send>;

/// Something for each [`Way`].
type Both<T> = [T; 2];

#[derive(Debug)]
struct State {
    /// The server's port on 127.0.0.1, for connections to come.
    target: u16,
    /// `None`: connections are refused.
    listener: Option<TcpListener>,
    links: Vec<Link>,
    delay: Duration,
    /// Whether connections to come are held from the start.
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

    /// Leads connections to come to another server, as a failover does; those that are open stay where they are.
    pub fn point_to(&self, target: u16) {
        self.ask(move |state| state.target = target);
    }

    /// Ends every rule: what is held goes on its way, and connections are accepted.
    #[track_caller]
    pub fn pass(&self) {
        self.accept();
        self.ask(|state| {
            state.delay = Duration::ZERO;
            state.rules = [None, None];
        });
        self.release();
    }

    /// Each byte comes so much later, in either direction.
    pub fn delay(&self, delay: Duration) {
        self.ask(move |state| state.delay = delay);
    }

    /// Cuts all connections; what they had under way is lost.
    pub fn cut(&self) {
        self.ask(|state| {
            state.cuts += state.links.len();
            state.links.clear();
        });
    }

    /// Lets exactly so many bytes more pass in one direction, and cuts the connection that carried the last of them.
    /// Zero cuts before the next byte.
    pub fn cut_after(&self, way: Way, bytes: u64) {
        self.rule(way, After::Bytes(bytes), Then::Cut);
    }

    /// Cuts the next connection that carries these bytes (at most 64), right behind them.
    pub fn cut_behind(&self, way: Way, mark: &[u8]) {
        self.rule(way, After::mark(mark), Then::Cut);
    }

    /// Holds the next connection that carries these bytes (at most 64), right behind them: what it sends after them is
    /// kept until [`release`](Self::release).
    pub fn hold_behind(&self, way: Way, mark: &[u8]) {
        self.rule(way, After::mark(mark), Then::Hold);
    }

    fn rule(&self, way: Way, after: After, then: Then) {
        self.ask(move |state| state.rules[way as usize] = Some(Rule { after, then }));
    }

    /// Keeps what the connections of now send in this direction, until [`release`](Self::release); later connections
    /// pass.
    pub fn hold(&self, way: Way) {
        self.ask(move |state| {
            for link in &mut state.links {
                link.hold(way, true);
            }
        });
    }

    /// The same, for connections to come as well.
    pub fn hold_all(&self, way: Way) {
        // In one order: none may be accepted in between.
        self.ask(move |state| {
            state.hold_new[way as usize] = true;
            for link in &mut state.links {
                link.hold(way, true);
            }
        });
    }

    /// Sends what was held on its way, also from connections whose sender has closed them.
    pub fn release(&self) {
        self.ask(|state| {
            state.hold_new = [false; 2];
            for link in &mut state.links {
                link.hold(Way::ToServer, false);
                link.hold(Way::ToClient, false);
            }
        });
    }

    /// Refuses connections to come; those that are open stay.
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

    // --- looking at it

    /// Connections that are open on either side, those included that only hold what a client has left.
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

    /// Waits until at least so many bytes are kept.
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

    /// Has something done by the pump's thread, between two looks at the sockets, and waits for it.
    fn ask<T: Send + 'static>(&self, order: impl FnOnce(&mut State) -> T + Send + 'static) -> T {
        let (answer, answered) = channel();
        let order: Order = Box::new(move |state| {
            // Whoever asked waits below.
            let _ = answer.send(order(state));
        });
        self.orders.send(order).expect("the proxy's thread has panicked");
        self.nudge();
        answered.recv().expect("the proxy's thread has panicked")
    }

    fn nudge(&self) {
        // When the socket is full, it wakes anyway.
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
        // Somebody else's in the meantime: nobody reserves a port for ever.
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", port.number)) {
            listener.set_nonblocking(true).expect("a nonblocking socket");
            return (port, listener);
        }
    }
}
