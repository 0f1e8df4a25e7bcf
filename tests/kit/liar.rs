//! A server that speaks Redis's protocol and stores what a guard needs, and lies when it is told to.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::{Postgres, QUICK, Redis, Stack, wait_drained, wait_eq};

/// The lie that replaces the true reply.
#[derive(Clone, Debug)]
pub enum Lie {
    Say(Vec<u8>),
    /// And does not execute the command; its transaction is discarded.
    Deny(Vec<u8>),
    /// `begin`, and then `more` repeatedly for as long as the other side reads.
    Flood {
        begin: Vec<u8>,
        more: Vec<u8>,
    },
    /// A byte at a time.
    Drip {
        bytes: Vec<u8>,
        every: Duration,
    },
    /// After a while.
    Late {
        bytes: Vec<u8>,
        after: Duration,
    },
    /// Never replies.
    Hang,
    /// Executes the command, and closes the connection without a reply,
    Close,
    /// or does not execute it, and closes.
    Refuse,
}

impl Lie {
    pub fn say(bytes: impl AsRef<[u8]>) -> Option<Self> {
        Some(Self::Say(bytes.as_ref().to_vec()))
    }

    pub fn flood(begin: impl AsRef<[u8]>, more: impl AsRef<[u8]>) -> Option<Self> {
        Some(Self::Flood {
            begin: begin.as_ref().to_vec(),
            more: more.as_ref().to_vec(),
        })
    }

    pub fn drip(bytes: impl AsRef<[u8]>, every: Duration) -> Option<Self> {
        let bytes = bytes.as_ref().to_vec();
        Some(Self::Drip { bytes, every })
    }
}

/// Lies at the first such command on a connection, or at a later one where that makes a difference.
pub fn when_asked(command: &'static str, lie: Lie) -> impl FnMut(&[String]) -> Option<Lie> + Send + 'static {
    let (mut is_known, mut has_sent) = (false, false);
    move |words| {
        let asked = words[0].to_ascii_uppercase();
        let looks = matches!(command, "XREVRANGE" | "XINFO");
        match asked.as_str() {
            // A server that has lost its guard is searched for the entries that it may have.
            "EXEC" if looks && has_sent && !is_known => {
                is_known = true;
                return Some(Lie::Close);
            }
            "HGETALL" if command == "XREVRANGE" && is_known => return Lie::say("*0\r\n"),
            // Its guard says that a batch was appended, but the stream has none of it.
            "XREVRANGE" if command == "XINFO" => return Lie::say("*0\r\n"),
            "XADD" => has_sent = true,
            _ => {}
        }
        (asked == command).then(|| lie.clone())
    }
}

/// Its guard and its first event exist, as at an honest server.
#[track_caller]
pub fn trusted() -> (Stack, Liar) {
    let stack = Stack::of(Postgres::with(QUICK), Redis::start());
    let liar = Liar::honest();
    stack.point_at("default", "127.0.0.1", liar.port());
    stack.publish("first");
    wait_eq("the first event", 1, || liar.entries("events"));
    wait_drained(&stack.pg, "default");
    (stack, liar)
}

/// Called with the words of each command; `None`: the true reply is given.
pub type Lies = Box<dyn FnMut(&[String]) -> Option<Lie> + Send>;

/// The stored data.
#[derive(Default)]
struct Kept {
    hashes: HashMap<String, Vec<(String, String)>>,
    /// Entries of streams: fields and values.
    streams: HashMap<String, Vec<Vec<String>>>,
    /// The commands that were received, without arguments.
    asked: Vec<String>,
}

struct Shared {
    kept: Mutex<Kept>,
    lies: Mutex<Lies>,
    stop: AtomicBool,
    accepted: AtomicUsize,
}

/// See the module's documentation. Ends with its owner.
pub struct Liar {
    address: SocketAddr,
    socket: Option<PathBuf>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Liar {
    pub fn start(lies: impl FnMut(&[String]) -> Option<Lie> + Send + 'static) -> Self {
        let shared = Arc::new(Shared {
            kept: Mutex::default(),
            lies: Mutex::new(Box::new(lies)),
            stop: AtomicBool::new(false),
            accepted: AtomicUsize::new(0),
        });
        let listener = TcpListener::bind("127.0.0.1:0").expect("cannot listen");
        let address = listener.local_addr().expect("a bound socket has an address");
        let serving = shared.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if serving.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = serving.clone();
                // As Redis does: many short replies must not wait for each other's acknowledgement.
                let _ = stream.set_nodelay(true);
                std::thread::spawn(move || {
                    let reader = stream.try_clone().expect("a second handle");
                    serve(&shared, reader, stream, address.port());
                });
            }
        });
        Self {
            address,
            socket: None,
            shared,
            thread: Some(thread),
        }
    }

    /// A server that gives the true replies.
    pub fn honest() -> Self {
        Self::start(|_| None)
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Also listens on a Unix socket.
    pub fn listen_at(&mut self, path: PathBuf) {
        let listener = UnixListener::bind(&path).expect("cannot listen");
        let shared = self.shared.clone();
        let port = self.port();
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if shared.stop.load(Ordering::Relaxed) {
                    return;
                }
                let shared = shared.clone();
                std::thread::spawn(move || serve(&shared, stream.try_clone().expect("a second handle"), stream, port));
            }
        });
        self.socket = Some(path);
    }

    /// From now on it lies in this way.
    pub fn lie(&self, lies: impl FnMut(&[String]) -> Option<Lie> + Send + 'static) {
        *lock(&self.shared.lies) = Box::new(lies);
    }

    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// How often this command was received.
    pub fn asked(&self, command: &str) -> usize {
        lock(&self.shared.kept).asked.iter().filter(|c| *c == command).count()
    }

    /// The stored guard (or another hash).
    pub fn hash(&self, key: &str) -> Vec<(String, String)> {
        lock(&self.shared.kept).hashes.get(key).cloned().unwrap_or_default()
    }

    /// Entries of a stream.
    pub fn entries(&self, stream: &str) -> usize {
        lock(&self.shared.kept).streams.get(stream).map_or(0, Vec::len)
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        // Wakes accept().
        let _ = TcpStream::connect(self.address);
        if let Some(path) = &self.socket {
            let _ = std::os::unix::net::UnixStream::connect(path);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared, reader: impl Read, mut writer: impl Write, port: u16) {
    shared.accepted.fetch_add(1, Ordering::Relaxed);
    let mut reader = BufReader::new(reader);
    let mut queue: Option<Vec<Vec<String>>> = None;
    let mut is_dirty = false;
    while let Some(words) = command(&mut reader) {
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        lock(&shared.kept).asked.push(words[0].to_ascii_uppercase());
        let lie = (*lock(&shared.lies))(&words);
        if matches!(lie, Some(Lie::Refuse)) {
            return;
        }
        if let Some(Lie::Deny(bytes)) = &lie {
            is_dirty |= queue.is_some();
            if writer.write_all(bytes).is_err() {
                return;
            }
            continue;
        }
        if is_dirty && words[0].eq_ignore_ascii_case("EXEC") {
            (is_dirty, queue) = (false, None);
            let discarded = b"-EXECABORT Transaction discarded because of previous errors.\r\n";
            if writer.write_all(discarded).is_err() {
                return;
            }
            continue;
        }
        // Executes the command whose reply is replaced.
        let truth = answer(&mut lock(&shared.kept), &mut queue, words, port);
        let sent = match lie {
            None => writer.write_all(&truth),
            Some(Lie::Say(bytes)) => writer.write_all(&bytes),
            Some(Lie::Flood { begin, more }) => {
                let more = more.repeat((64 * 1024 / more.len()).max(1));
                let mut sent = writer.write_all(&begin);
                while sent.is_ok() && !shared.stop.load(Ordering::Relaxed) {
                    sent = writer.write_all(&more);
                }
                sent
            }
            Some(Lie::Drip { bytes, every }) => {
                let mut sent = Ok(());
                for byte in bytes {
                    if sent.is_err() || shared.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    sent = writer.write_all(&[byte]);
                    std::thread::sleep(every);
                }
                sent
            }
            Some(Lie::Late { bytes, after }) => {
                std::thread::sleep(after);
                writer.write_all(&bytes)
            }
            Some(Lie::Hang) => {
                while !shared.stop.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(50));
                }
                return;
            }
            Some(Lie::Close | Lie::Refuse | Lie::Deny(_)) => return,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// The next command; `None`: the client has left.
fn command(reader: &mut impl BufRead) -> Option<Vec<String>> {
    let count = header(reader)?;
    let mut words = Vec::new();
    for _ in 0..count {
        let size = header(reader)?;
        let mut bytes = vec![0; size + 2];
        reader.read_exact(&mut bytes).ok()?;
        words.push(String::from_utf8_lossy(&bytes[..size]).into_owned());
    }
    (!words.is_empty()).then_some(words)
}

fn header(reader: &mut impl BufRead) -> Option<usize> {
    let mut line = String::new();
    reader.read_line(&mut line).ok().filter(|read| *read > 0)?;
    line.get(1..)?.trim().parse().ok()
}

fn bulk(text: &str) -> Vec<u8> {
    format!("${}\r\n{text}\r\n", text.len()).into_bytes()
}

fn array(items: &[Vec<u8>]) -> Vec<u8> {
    [format!("*{}\r\n", items.len()).into_bytes(), items.concat()].concat()
}

fn answer(kept: &mut Kept, queue: &mut Option<Vec<Vec<String>>>, words: Vec<String>, port: u16) -> Vec<u8> {
    match words[0].to_ascii_uppercase().as_str() {
        "MULTI" => *queue = Some(Vec::new()),
        "DISCARD" => *queue = None,
        "EXEC" => {
            let commands = queue.take().unwrap_or_default();
            let done: Vec<Vec<u8>> = commands.into_iter().map(|words| run(kept, &words, port)).collect();
            return array(&done);
        }
        _ => match queue {
            Some(queue) => {
                queue.push(words);
                return b"+QUEUED\r\n".to_vec();
            }
            None => return run(kept, &words, port),
        },
    }
    b"+OK\r\n".to_vec()
}

fn run(kept: &mut Kept, words: &[String], port: u16) -> Vec<u8> {
    let key = words.get(1).cloned().unwrap_or_default();
    match words[0].to_ascii_uppercase().as_str() {
        "PING" => b"+PONG\r\n".to_vec(),
        "WAIT" => b":9\r\n".to_vec(),
        "HELLO" => array(&[bulk("role"), bulk("master")]),
        "SENTINEL" => array(&[bulk("127.0.0.1"), bulk(&port.to_string())]),
        "CLUSTER" => {
            let node = array(&[bulk("127.0.0.1"), format!(":{port}\r\n").into_bytes()]);
            array(&[array(&[b":0\r\n".to_vec(), b":16383\r\n".to_vec(), node])])
        }
        "HSET" => {
            let hash = kept.hashes.entry(key).or_default();
            for pair in words[2..].chunks_exact(2) {
                hash.retain(|(field, _)| *field != pair[0]);
                hash.push((pair[0].clone(), pair[1].clone()));
            }
            b":0\r\n".to_vec()
        }
        "HGETALL" => {
            let fields = kept.hashes.get(&key).into_iter().flatten();
            array(&fields.flat_map(|(f, v)| [bulk(f), bulk(v)]).collect::<Vec<_>>())
        }
        "HMGET" => {
            let hash = kept.hashes.get(&key);
            let value = |name: &String| hash.and_then(|hash| hash.iter().find(|(field, _)| field == name));
            let values = words[2..]
                .iter()
                .map(|name| value(name).map_or(b"$-1\r\n".to_vec(), |(_, v)| bulk(v)));
            array(&values.collect::<Vec<_>>())
        }
        "XADD" => {
            let at = words.iter().position(|word| word == "*").unwrap_or(1) + 1;
            let entries = kept.streams.entry(key).or_default();
            entries.push(words[at..].to_vec());
            bulk(&format!("{}-0", entries.len()))
        }
        "XREVRANGE" => {
            let upto = words[2]
                .trim_start_matches('(')
                .split('-')
                .next()
                .and_then(|n| n.parse::<usize>().ok());
            let count: usize = words.last().and_then(|n| n.parse().ok()).unwrap_or(1);
            let entries = kept.streams.get(&key).map_or(&[][..], Vec::as_slice);
            let end = upto.map_or(entries.len(), |n| n.saturating_sub(1));
            let found = entries[..end].iter().enumerate().rev().take(count);
            let entry = |(at, fields): (usize, &Vec<String>)| {
                let fields: Vec<Vec<u8>> = fields.iter().map(|field| bulk(field)).collect();
                array(&[bulk(&format!("{}-0", at + 1)), array(&fields)])
            };
            array(&found.map(entry).collect::<Vec<_>>())
        }
        "XINFO" => {
            let length = format!(":{}\r\n", kept.streams.get(&words[2]).map_or(0, Vec::len)).into_bytes();
            array(&[bulk("length"), length.clone(), bulk("entries-added"), length])
        }
        _ => b"+OK\r\n".to_vec(),
    }
}
