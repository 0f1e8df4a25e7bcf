//! The thread that moves a proxy's bytes: it polls all sockets, reads what comes, and writes what is due and not held.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{After, Both, Order, Rule, State, Then, Way};

const CHUNK: usize = 64 << 10;
/// Behind a slow receiver the sender must wait, as it would without a proxy.
const QUEUE_LIMIT: usize = 1 << 20;
/// What is held is taken off the sender's hands, within reason.
const HOLD_LIMIT: usize = 256 << 20;
const WAYS: Both<Way> = [Way::ToServer, Way::ToClient];

/// One connection: a client's socket, the server's, and what is between them.
#[derive(Debug)]
pub(super) struct Link {
    /// By the [`Way`] of what is read from it: the client's, the server's.
    sockets: Both<TcpStream>,
    lanes: Both<Lane>,
}

/// What is under way in one direction.
#[derive(Debug, Default)]
struct Lane {
    chunks: VecDeque<Chunk>,
    queued: usize,
    /// The last bytes that were written, in case a mark begins in them.
    recent: Vec<u8>,
    held: bool,
    /// Its sender has closed, or died.
    ended: bool,
    /// Nothing more will be written: its receiver is gone, or all was written and the end passed on.
    done: bool,
}

#[derive(Debug)]
struct Chunk {
    due: Instant,
    bytes: Vec<u8>,
    written: usize,
}

/// Until nobody can give orders any more.
pub(super) fn run(mut state: State, orders: &Receiver<Order>, mut woken: &UnixStream) {
    let mut buffer = vec![0; CHUNK];
    loop {
        // Before the orders: who sends one after this wakes the next wait.
        while woken.read(&mut buffer).is_ok_and(|count| count > 0) {}
        loop {
            match orders.try_recv() {
                Ok(order) => order(&mut state),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        accept(&mut state);
        carry(&mut state, &mut buffer);
        wait(&state, woken);
    }
}

fn accept(state: &mut State) {
    let Some(listener) = &state.listener else { return };
    while let Ok((client, _)) = listener.accept() {
        state.accepted += 1;
        // Where no server is, the client finds its connection closed.
        if let Ok(link) = Link::open(client, state.target, state.hold_new) {
            state.links.push(link);
        }
    }
}

fn carry(state: &mut State, buffer: &mut [u8]) {
    let now = Instant::now();
    let mut cuts = 0;
    state.links.retain_mut(|link| {
        for way in WAYS {
            link.read(way, buffer, now + state.delay);
            let (bytes, fired) = link.write(way, now, &mut state.rules[way as usize]);
            state.passed[way as usize] += bytes;
            match fired {
                Some(Then::Cut) => {
                    cuts += 1;
                    return false;
                }
                Some(Then::Hold) => link.hold(way, true),
                None => {}
            }
        }
        !link.lanes.iter().all(|lane| lane.done)
    });
    state.cuts += cuts;
}

/// Until a socket is ready, a byte falls due, or there is an order.
fn wait(state: &State, woken: &UnixStream) {
    let now = Instant::now();
    let mut sockets = vec![PollFd::new(woken.as_fd(), PollFlags::POLLIN)];
    if let Some(listener) = &state.listener {
        sockets.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
    }
    let mut due: Option<Instant> = None;
    for link in &state.links {
        for (socket, flags) in link.interest(now) {
            sockets.push(PollFd::new(socket.as_fd(), flags));
        }
        due = due.into_iter().chain(link.next_due(now)).min();
    }
    let timeout = match due {
        None => PollTimeout::NONE,
        // Rounded up, or the last millisecond would be spent in turning round and round.
        Some(due) => {
            let left = due.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    };
    match poll(&mut sockets, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => panic!("poll failed: {error}"),
    }
}

impl Link {
    fn open(client: TcpStream, target: u16, held: Both<bool>) -> io::Result<Self> {
        let target = SocketAddr::from((Ipv4Addr::LOCALHOST, target));
        let server = TcpStream::connect_timeout(&target, Duration::from_millis(500))?;
        let sockets = [client, server];
        for socket in &sockets {
            socket.set_nodelay(true)?;
            socket.set_nonblocking(true)?;
        }
        Ok(Link {
            sockets,
            lanes: held.map(|held| Lane {
                held,
                ..Lane::default()
            }),
        })
    }

    pub(super) fn hold(&mut self, way: Way, held: bool) {
        self.lanes[way as usize].held = held;
    }

    /// Whether the client has gone, and something of it is still here.
    pub(super) fn is_abandoned(&self) -> bool {
        let lane = &self.lanes[Way::ToServer as usize];
        lane.ended && !lane.done
    }

    pub(super) fn queued(&self, way: Way) -> usize {
        self.lanes[way as usize].queued
    }

    fn read(&mut self, way: Way, buffer: &mut [u8], due: Instant) {
        let lane = &mut self.lanes[way as usize];
        while lane.wants_more() {
            match self.sockets[way as usize].read(buffer) {
                Ok(0) => lane.ended = true,
                Ok(count) => lane.push(&buffer[..count], due),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Dead is as good as closed: what it sent is on its way.
                Err(_) => lane.ended = true,
            }
        }
    }

    /// Writes what is due, up to where the rule comes into force. Gives how many bytes that were, and what the rule
    /// says then.
    fn write(&mut self, way: Way, now: Instant, rule: &mut Option<Rule>) -> (u64, Option<Then>) {
        let lane = &mut self.lanes[way as usize];
        let receiver = &mut self.sockets[1 - way as usize];
        let mut total = 0;
        while lane.is_ready(now) {
            let bytes = lane.chunks[0].rest();
            let stop = rule.as_ref().and_then(|rule| rule.after.find(&lane.recent, bytes));
            let allowed = stop.unwrap_or(bytes.len());
            let written = match allowed {
                0 => Ok(0),
                _ => receiver.write(&bytes[..allowed]),
            };
            match written {
                Ok(count) => {
                    lane.pop(count);
                    total += count as u64;
                    if let Some(rule) = rule {
                        rule.after.count(count);
                    }
                    if stop == Some(count) {
                        return (total, rule.take().map(|rule| rule.then));
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => lane.abandon(),
            }
        }
        if lane.ended && lane.chunks.is_empty() && !lane.held && !lane.done {
            // Who is gone already needs not be told.
            let _ = receiver.shutdown(Shutdown::Write);
            lane.done = true;
        }
        (total, None)
    }

    /// What to wait for on each socket. A socket with nothing to wait for is left out: one that is dead is always
    /// ready.
    fn interest(&self, now: Instant) -> impl Iterator<Item = (&TcpStream, PollFlags)> {
        WAYS.into_iter().filter_map(move |way| {
            let (from, to) = (&self.lanes[way as usize], &self.lanes[1 - way as usize]);
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, from.wants_more());
            flags.set(PollFlags::POLLOUT, to.is_ready(now));
            (!flags.is_empty()).then_some((&self.sockets[way as usize], flags))
        })
    }

    /// When the next byte falls due that isn't yet.
    fn next_due(&self, now: Instant) -> Option<Instant> {
        let waiting = self.lanes.iter().filter(|lane| !lane.held && !lane.done);
        let due = waiting.filter_map(|lane| Some(lane.chunks.front()?.due));
        due.filter(|due| *due > now).min()
    }
}

impl Lane {
    fn wants_more(&self) -> bool {
        let limit = if self.held { HOLD_LIMIT } else { QUEUE_LIMIT };
        !self.ended && !self.done && self.queued < limit
    }

    fn is_ready(&self, now: Instant) -> bool {
        !self.held && !self.done && self.chunks.front().is_some_and(|chunk| chunk.due <= now)
    }

    fn push(&mut self, bytes: &[u8], due: Instant) {
        self.queued += bytes.len();
        // A delay that was shortened lets no byte overtake another.
        let due = self.chunks.back().map_or(due, |last| last.due.max(due));
        self.chunks.push_back(Chunk {
            due,
            bytes: bytes.to_vec(),
            written: 0,
        });
    }

    fn pop(&mut self, count: usize) {
        self.queued -= count;
        let chunk = &mut self.chunks[0];
        self.recent.extend(&chunk.rest()[..count]);
        let old = self.recent.len().saturating_sub(After::LONGEST_MARK);
        self.recent.drain(..old);
        chunk.written += count;
        if chunk.rest().is_empty() {
            self.chunks.pop_front();
        }
    }

    /// The receiver is gone.
    fn abandon(&mut self) {
        self.done = true;
        self.queued = 0;
        self.chunks.clear();
    }
}

impl Chunk {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.written..]
    }
}

impl After {
    pub(super) const LONGEST_MARK: usize = 64;

    /// Where in these bytes it is reached. `recent`: what was written before them.
    fn find(&self, recent: &[u8], bytes: &[u8]) -> Option<usize> {
        match self {
            After::Bytes(left) => usize::try_from(*left).ok().filter(|left| *left <= bytes.len()),
            After::Mark(mark) => {
                let before = &recent[recent.len().saturating_sub(mark.len() - 1)..];
                let all = [before, bytes].concat();
                let at = all.windows(mark.len()).position(|window| window == mark)?;
                Some(at + mark.len() - before.len())
            }
        }
    }

    fn count(&mut self, written: usize) {
        if let After::Bytes(left) = self {
            *left -= written as u64;
        }
    }
}
