//! The thread that moves a proxy's bytes: it polls all sockets, reads from them, and writes bytes that are due and not
//! held.

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
/// If the receiver is slow, the sender must wait, as without a proxy.
const QUEUE_LIMIT: usize = 1 << 20;
/// Held bytes are read from the sender, up to a limit.
const HOLD_LIMIT: usize = 256 << 20;
const WAYS: Both<Way> = [Way::ToServer, Way::ToClient];

/// One connection: a client's socket, the server's, and what is between them.
#[derive(Debug)]
pub(super) struct Link {
    /// By the [`Way`] of the bytes that are read from it: the client's, the server's.
    sockets: Both<TcpStream>,
    lanes: Both<Lane>,
}

/// The bytes under way in one direction.
#[derive(Debug, Default)]
struct Lane {
    chunks: VecDeque<Chunk>,
    queued: usize,
    /// The last bytes that were written, because a mark may begin in them.
    recent: Vec<u8>,
    held: bool,
    /// Its sender has closed, or died.
    ended: bool,
    /// No more bytes will be written: the receiver is gone, or everything was written and the end passed on.
    done: bool,
}

#[derive(Debug)]
struct Chunk {
    due: Instant,
    bytes: Vec<u8>,
    written: usize,
}

/// Runs until nobody can give orders any more.
pub(super) fn run(mut state: State, orders: &Receiver<Order>, mut woken: &UnixStream) {
    let mut buffer = vec![0; CHUNK];
    loop {
        // Before the orders: an order that is sent after this wakes the next wait.
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
        // If there is no server, the client finds its connection closed.
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
        // Rounded up, or the thread would spin during the last millisecond.
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
                // A dead client counts like a closed connection: its bytes are on their way.
                Err(_) => lane.ended = true,
            }
        }
    }

    /// Writes the bytes that are due, up to where the rule applies. Returns how many bytes that were, and the result of
    /// the rule.
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
            // A client that is gone need not be told.
            let _ = receiver.shutdown(Shutdown::Write);
            lane.done = true;
        }
        (total, None)
    }

    /// The events to wait for on each socket. A socket without any is left out: a dead socket is always ready.
    fn interest(&self, now: Instant) -> impl Iterator<Item = (&TcpStream, PollFlags)> {
        WAYS.into_iter().filter_map(move |way| {
            let (from, to) = (&self.lanes[way as usize], &self.lanes[1 - way as usize]);
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, from.wants_more());
            flags.set(PollFlags::POLLOUT, to.is_ready(now));
            (!flags.is_empty()).then_some((&self.sockets[way as usize], flags))
        })
    }

    /// When the next delayed byte falls due.
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
        // After a delay was shortened, no byte may overtake another.
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

    /// The position in these bytes where the mark ends. `recent`: the bytes written before them.
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
