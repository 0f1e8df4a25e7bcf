//! TCP servers that misbehave in place of a Redis.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::libc::linger;
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt::Linger};

/// Accepts connections, or does not even accept them, and never answers.
#[derive(Debug)]
pub struct BlackHole {
    server: Server,
    /// Fill the queue of a server that never accepts.
    _queued: Vec<TcpStream>,
}

impl BlackHole {
    /// Accepts every connection, reads nothing and writes nothing.
    pub fn start() -> Self {
        let server = Server::start(|stream, held| held.lock().expect("no holder panics").push(stream));
        BlackHole {
            server,
            _queued: Vec::new(),
        }
    }

    /// Sends the same bytes on every connection, and keeps it open as if more were to come.
    pub fn saying(bytes: &[u8]) -> Self {
        let bytes = bytes.to_vec();
        let server = Server::start(move |mut stream, held| {
            // A client that has left does not matter.
            let _ = stream.write_all(&bytes);
            held.lock().expect("no holder panics").push(stream);
        });
        BlackHole {
            server,
            _queued: Vec::new(),
        }
    }

    /// Sends `begin`, and then `more` repeatedly for as long as the other side reads.
    pub fn endless(begin: &[u8], more: &[u8]) -> Self {
        let (begin, more) = (begin.to_vec(), more.repeat(64 * 1024 / more.len()));
        let server = Server::start(move |mut stream, _| {
            let mut sent = stream.write_all(&begin);
            while sent.is_ok() {
                sent = stream.write_all(&more);
            }
        });
        BlackHole {
            server,
            _queued: Vec::new(),
        }
    }

    /// Never accepts, and its queue is full: a connection attempt gets no answer at all, as from a host that does not
    /// exist.
    pub fn unreachable() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("cannot listen");
        // A second listen() on a socket changes the length of its queue.
        listen(&listener.as_fd(), Backlog::new(0).expect("a valid backlog")).expect("cannot shorten the queue");
        let address = listener.local_addr().expect("a bound socket has an address");
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(200)) {
            queued.push(stream);
            assert!(queued.len() < 100, "the queue of the unreachable server never fills");
        }
        BlackHole {
            server: Server::idle(listener),
            _queued: queued,
        }
    }

    pub fn port(&self) -> u16 {
        self.server.address.port()
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> usize {
        self.server.accepted.load(Ordering::Relaxed)
    }
}

/// Sends the same bytes on every connection, whatever was asked, and closes it.
#[derive(Debug)]
pub struct Garbage {
    server: Server,
}

impl Garbage {
    /// Random bytes, which are not valid RESP.
    pub fn start() -> Self {
        let noise: Vec<u8> = (0..64).flat_map(|_| uuid::Uuid::new_v4().into_bytes()).collect();
        Self::saying(&noise)
    }

    pub fn saying(bytes: &[u8]) -> Self {
        Self::saying_in_turn(&[bytes])
    }

    /// Resets every connection (RST), as a firewall or a host that has been restarted does.
    pub fn resetting() -> Self {
        let server = Server::start(|stream, _| {
            let at_once = linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&stream, Linger, &at_once).expect("SO_LINGER");
        });
        Garbage { server }
    }

    /// Answers with each of these in turn, one for each connection.
    pub fn saying_in_turn(texts: &[&[u8]]) -> Self {
        let texts: Vec<Vec<u8>> = texts.iter().map(|text| text.to_vec()).collect();
        let turn = AtomicUsize::new(0);
        let server = Server::start(move |mut stream, _| {
            let text = &texts[turn.fetch_add(1, Ordering::Relaxed) % texts.len()];
            // A client that has left does not matter.
            let _ = stream.write_all(text);
        });
        Garbage { server }
    }

    pub fn port(&self) -> u16 {
        self.server.address.port()
    }

    pub fn accepted(&self) -> usize {
        self.server.accepted.load(Ordering::Relaxed)
    }
}

/// Answers OK to every command, and remembers the commands.
#[derive(Debug)]
pub struct Eavesdropper {
    server: Server,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Eavesdropper {
    pub fn start() -> Self {
        Self::at("127.0.0.1")
    }

    /// At another address of this machine, such as 127.0.0.2.
    pub fn at(host: &str) -> Self {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let hears = Arc::clone(&heard);
        let server = Server::start_at(host, move |mut stream, _| {
            let mut bytes = [0; 4096];
            // A client that has left does not matter.
            while let Ok(length @ 1..) = stream.read(&mut bytes) {
                hears.lock().expect("no holder panics").extend(&bytes[..length]);
                let _ = stream.write_all(b"+OK\r\n");
            }
        });
        Eavesdropper { server, heard }
    }

    pub fn port(&self) -> u16 {
        self.server.address.port()
    }

    pub fn accepted(&self) -> usize {
        self.server.accepted.load(Ordering::Relaxed)
    }

    /// All commands of all clients.
    pub fn heard(&self) -> String {
        String::from_utf8_lossy(&self.heard.lock().expect("no holder panics")).into_owned()
    }
}

type Held = Mutex<Vec<TcpStream>>;

/// A listener, usually on 127.0.0.1, and the thread that handles its connections.
#[derive(Debug)]
struct Server {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// Kept open if no thread owns it.
    _idle: Option<TcpListener>,
}

impl Server {
    fn start(treat: impl Fn(TcpStream, &Held) + Send + 'static) -> Self {
        Self::start_at("127.0.0.1", treat)
    }

    fn start_at(host: &str, treat: impl Fn(TcpStream, &Held) + Send + 'static) -> Self {
        let listener = TcpListener::bind((host, 0)).expect("cannot listen");
        let address = listener.local_addr().expect("a bound socket has an address");
        let accepted = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (count, stopping) = (Arc::clone(&accepted), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let held = Held::default();
            for stream in listener.incoming().map_while(Result::ok) {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                count.fetch_add(1, Ordering::Relaxed);
                treat(stream, &held);
            }
        });
        Server {
            address,
            accepted,
            stop,
            thread: Some(thread),
            _idle: None,
        }
    }

    fn idle(listener: TcpListener) -> Self {
        let address = listener.local_addr().expect("a bound socket has an address");
        Server {
            address,
            accepted: Arc::default(),
            stop: Arc::default(),
            thread: None,
            _idle: Some(listener),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else { return };
        // Wakes accept().
        let _ = TcpStream::connect(self.address);
        let _ = thread.join();
    }
}
