//! One connection to Redis: opening it with all its timeouts, logging in, writing batches, reading replies one by one.

use crate::failure::server_text;
use crate::failure::{self, Class, Failure, Trouble};
use crate::redis::deadline::Deadline;
use crate::redis::destination::{Address, Destination, Secret};
use crate::redis::server_file;
use crate::redis::step::{self, Step};
use crate::redis::tls::{self, TlsStream};
use crate::resp::bounds::Bounds;
use crate::resp::read::{Inbox, Reply};
use crate::resp::write::append_command;
use redis::Value;
use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connection that has logged in, chosen its database and answered a PING.
pub struct RedisConnection {
    stream: Stream,
    inbox: Inbox,
    /// For each reply and each write as a whole.
    timeout: Duration,
    /// Of the reply that is being received.
    deadline: Option<Deadline>,
    /// The socket has what is left of it for the rest of a reply.
    is_shortened: bool,
}

enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream>),
    Unix(UnixStream),
}

impl RedisConnection {
    /// Blocks for at most `connect_timeout` for each address that the host's name stands for (and, beyond our reach,
    /// the resolver's own time), for the handshake of TLS, and for each step of logging in.
    pub fn open(destination: &Destination) -> Result<Self, Failure> {
        Self::open_at(destination, &destination.address)
    }

    /// The same at another address, with everything else that the destination says.
    pub fn open_at(destination: &Destination, address: &Address) -> Result<Self, Failure> {
        let mut connection = Self {
            stream: Stream::open(destination, address)?,
            inbox: Inbox::default(),
            timeout: destination.connect_timeout,
            deadline: None,
            is_shortened: false,
        };
        connection.set_timeout(destination.connect_timeout)?;
        connection.log_in(destination)?;
        connection.set_timeout(destination.socket_timeout)?;
        connection.introduce(destination)?;
        Ok(connection)
    }

    fn set_timeout(&mut self, timeout: Duration) -> Result<(), Failure> {
        self.timeout = at_least_some(timeout);
        self.stream.set_timeout(self.timeout).map_err(broken)
    }

    fn log_in(&mut self, destination: &Destination) -> Result<(), Failure> {
        step::at(Step::Auth);
        if let Some(refusal) = destination.password.as_ref().and_then(Secret::refusal) {
            return Err(refusal);
        }
        let password = match &destination.password {
            Some(Secret::Text(password)) => Some(password.clone()),
            Some(Secret::File(path)) => Some(read_password(path)?),
            Some(Secret::Withheld | Secret::Unreadable) | None => None,
        };
        if let Some(password) = &password {
            server_text::hide(password);
        }
        let logged_in = match (&destination.username, password) {
            // Even without a password, a named user is another one than Redis's default user.
            (Some(username), password) => {
                let password = password.unwrap_or_default();
                self.ask("AUTH", &[b"AUTH", username.as_bytes(), password.as_bytes()])?
            }
            (None, Some(password)) => self.ask("AUTH", &[b"AUTH", password.as_bytes()])?,
            (None, None) => Ok(()),
        };
        // A connection whose login was refused must not be used as the default user's.
        logged_in.map_err(Failure::not_of_an_event)?;
        if destination.db != 0 {
            step::at(Step::Select);
            self.ask("SELECT", &[b"SELECT", destination.db.to_string().as_bytes()])?
                .map_err(Failure::not_of_an_event)?;
        }
        Ok(())
    }

    fn introduce(&mut self, destination: &Destination) -> Result<(), Failure> {
        step::at(Step::Ping);
        // A user without the right to set a name is accepted all the same. If a login is missing, PING says so.
        match self.ask(
            "CLIENT SETNAME",
            &[b"CLIENT", b"SETNAME", destination.client_name.as_bytes()],
        )? {
            // Such as "max number of clients reached": the last word before the server closes the connection.
            Err(failure) if failure.class == Class::Backend || failure.trouble == Trouble::Denied => {
                return Err(failure);
            }
            _ => {}
        }
        match self.ask("PING", &[b"PING"])? {
            Ok(()) => Ok(()),
            // Without the right to PING it may still XADD.
            Err(failure) if failure.message.starts_with("NOPERM") => Ok(()),
            Err(failure) if failure.class == Class::Event => Err(Failure::backend(failure.message)),
            Err(failure) => Err(failure),
        }
    }

    /// Sends one command and reads its reply: the inner error is one of the server.
    fn ask(&mut self, name: &'static str, command: &[&[u8]]) -> Result<Result<(), Failure>, Failure> {
        let mut bytes = Vec::new();
        append_command(&mut bytes, command);
        self.send(&bytes)?;
        match self.receive(&Bounds::line(name))?.value()? {
            Value::Okay | Value::SimpleString(_) => Ok(Ok(())),
            Value::ServerError(error) => Ok(Err(failure::reply(&error))),
            _ => Err(failure::not_redis()),
        }
    }

    /// Writes whole commands.
    pub fn send(&mut self, commands: &[u8]) -> Result<(), Failure> {
        self.stream.write_all(commands, self.timeout).map_err(broken)
    }

    /// Reads the next reply (or the next piece of it), whatever it is, within these bounds and one timeout for all of
    /// it.
    pub fn receive(&mut self, bounds: &Bounds) -> Result<Reply<'_>, Failure> {
        loop {
            if let Some(taken) = self.inbox.take(bounds)? {
                if self.inbox.is_between_replies() {
                    self.deadline = None;
                    self.shorten(None)?;
                }
                return Ok(self.inbox.reply(taken));
            }
            let timeout = self.timeout;
            let deadline = self
                .deadline
                .get_or_insert_with(|| Deadline::new(timeout, Instant::now()));
            let bytes = match self.stream.read(self.inbox.room()?) {
                Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(broken(error)),
            };
            self.inbox.received(bytes);
            let Some(left) = deadline.moved(bytes, Instant::now()) else {
                return Err(broken(io::ErrorKind::TimedOut.into()));
            };
            // The usual reply comes in one piece, and soon.
            if left < self.timeout / 2 {
                self.shorten(Some(left))?;
            }
        }
    }

    /// Lets the next read take less than the timeout; `None`: all of it again.
    fn shorten(&mut self, left: Option<Duration>) -> Result<(), Failure> {
        if left.is_none() && !self.is_shortened {
            return Ok(());
        }
        self.is_shortened = left.is_some();
        let timeout = Some(at_least_some(left.unwrap_or(self.timeout)));
        self.stream.socket().set_read_timeout(timeout).map_err(broken)
    }

    /// Whether the other side has closed, or is known to be gone; for when no reply is awaited. Does not wait.
    pub fn look(&mut self) -> Result<(), Failure> {
        self.receive_at_once()?;
        match self.inbox().is_empty() {
            true => Ok(()),
            false => Err(Failure::backend("a reply to no command")),
        }
    }

    /// Receives what is there, without waiting.
    pub(crate) fn receive_at_once(&mut self) -> Result<(), Failure> {
        self.stream.set_nonblocking(true).map_err(broken)?;
        let read = self.stream.read(self.inbox.room()?);
        self.stream.set_nonblocking(false).map_err(broken)?;
        match read {
            Ok(0) => Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => {
                self.inbox.received(bytes);
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(broken(error)),
        }
    }

    /// The next reply, if it was received as a whole.
    pub(crate) fn received(&mut self, bounds: &Bounds) -> Result<Option<Reply<'_>>, Failure> {
        Ok(self.inbox.take(bounds)?.map(|taken| self.inbox.reply(taken)))
    }

    /// What was received, and not taken as a reply.
    pub(crate) fn inbox(&self) -> &[u8] {
        self.inbox.rest()
    }

    /// Writes a few bytes without waiting. False: not all of them could be written.
    pub(crate) fn send_at_once(&mut self, bytes: &[u8]) -> Result<bool, Failure> {
        self.stream.set_nonblocking(true).map_err(broken)?;
        let written = self.stream.write_all(bytes, self.timeout);
        self.stream.set_nonblocking(false).map_err(broken)?;
        match written {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(broken(error)),
        }
    }

    /// Reads the reply of an XADD: an entry's id, and nothing else. The outer error is the connection's end; the inner
    /// one an error reply of the server.
    pub fn receive_entry_id(&mut self) -> Result<Result<(), Failure>, Failure> {
        let reply = self.receive(&Bounds::XADD)?;
        if reply.is_bulk() {
            return Ok(Ok(()));
        }
        match reply.value()? {
            Value::ServerError(error) => Ok(Err(failure::reply(&error))),
            _ => Err(failure::not_redis()),
        }
    }
}

impl Stream {
    fn open(destination: &Destination, address: &Address) -> Result<Self, Failure> {
        let (host, port) = match address {
            Address::Tcp { host, port } => (host, *port),
            Address::Unix(path) if destination.allowed_hosts.allows_path(path) => {
                step::at(Step::Connect);
                return connect_unix(path, destination.connect_timeout)
                    .map(Self::Unix)
                    .map_err(broken);
            }
            Address::Unix(path) => return Err(not_allowed(format!("socket \"{}\"", path.display()))),
        };
        let timeout = at_least_some(destination.connect_timeout);
        step::at(Step::Tls);
        // Before connecting: its files may be unreadable.
        let tls = destination
            .tls
            .as_ref()
            .map(|tls| Ok((tls::config(tls)?, tls.insecure)));
        let tls = tls.transpose()?;
        let stream = connect(destination, host, port)?;
        tune(&stream, destination.socket_timeout).map_err(broken)?;
        step::at(Step::Tls);
        Ok(match tls {
            None => Self::Tcp(stream),
            Some((config, insecure)) => Self::Tls(Box::new(TlsStream::open(config, insecure, host, stream, timeout)?)),
        })
    }

    /// For each call.
    fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(at_least_some(timeout));
        self.socket().set_read_timeout(timeout)?;
        self.socket().set_write_timeout(timeout)
    }

    fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket().set_nonblocking(nonblocking)
    }

    fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream),
            Self::Tls(stream) => SockRef::from(stream.socket()),
            Self::Unix(stream) => SockRef::from(stream),
        }
    }

    /// `timeout`: of the socket, and of all.
    fn write_all(&mut self, bytes: &[u8], timeout: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => write_all(stream, bytes, timeout),
            Self::Tls(stream) => stream.write_all(bytes, timeout),
            Self::Unix(stream) => write_all(stream, bytes, timeout),
        }
    }

    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(room),
            Self::Tls(stream) => stream.read(room),
            Self::Unix(stream) => stream.read(room),
        }
    }
}

/// As the standard library's, within a time for all of it.
fn write_all(stream: &mut impl Write, mut bytes: &[u8], timeout: Duration) -> io::Result<()> {
    let mut deadline = Deadline::new(timeout, Instant::now());
    loop {
        let written = match stream.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        bytes = &bytes[written..];
        if bytes.is_empty() {
            return Ok(());
        }
        if deadline.moved(written, Instant::now()).is_none() {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// A server that does not accept is waited for no longer than one that does not answer: the timeout for writes counts
/// here, too.
fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(at_least_some(timeout)))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

/// Zero would mean "none at all" to the operating system.
fn at_least_some(timeout: Duration) -> Duration {
    timeout.max(Duration::from_millis(1))
}

/// A connection whose other side is gone is noticed: with something under way after `socket_timeout`, without after a
/// third more.
fn tune(stream: &TcpStream, socket_timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(at_least_some(socket_timeout)))?;
    // Whole seconds.
    let idle = socket_timeout.max(Duration::from_secs(1));
    let interval = (idle / 3).max(Duration::from_secs(1));
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(idle)
            .with_interval(interval)
            .with_retries(3),
    )
}

/// Of a name with more addresses, only this many are tried.
const MOST_ADDRESSES: usize = 16;

/// The first allowed address that answers; else the last one's error. The name is looked up anew each time.
fn connect(destination: &Destination, host: &str, port: u16) -> Result<TcpStream, Failure> {
    step::at(Step::Resolve);
    let allowed = &destination.allowed_hosts;
    let is_known = allowed.allows_name(host);
    if !is_known && !allowed.has_addresses() {
        return Err(not_allowed(format!("host \"{host}\"")));
    }
    let (mut refused, mut failed) = (None, None);
    let found = (host, port).to_socket_addrs();
    for address in found.map_err(|e| broken(failure::lookup(e)))?.take(MOST_ADDRESSES) {
        if !is_known && !allowed.allows_address(address.ip()) {
            refused = Some(address.ip());
            continue;
        }
        step::at(Step::Connect);
        match TcpStream::connect_timeout(&address, at_least_some(destination.connect_timeout)) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = Some(broken(error)),
        }
    }
    Err(failed.unwrap_or_else(|| match refused {
        Some(address) => not_allowed(format!("host \"{host}\" ({address})")),
        None => Failure::configuration(format!("host \"{host}\" resolves to no address")),
    }))
}

fn not_allowed(what: String) -> Failure {
    Failure::of(
        Trouble::NotAllowed,
        format!("outbox_relay.allowed_hosts does not allow {what}"),
    )
}

fn broken(error: io::Error) -> Failure {
    tls::failure(&error).unwrap_or_else(|| failure::io(&error))
}

/// Its first line.
fn read_password(path: &Path) -> Result<String, Failure> {
    let bytes = server_file::read_secret("password file", path)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::configuration(format!("password file \"{}\" is not in UTF-8", path.display())))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn the_other_sides_silence_is_noticed_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let stream = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
        let socket = SockRef::from(&stream);
        for (timeout_ms, user_ms, idle_s, interval_s) in
            [(6_000, 6_000, 6, 2), (1, 1, 1, 1), (3_600_000, 3_600_000, 3_600, 1_200)]
        {
            tune(&stream, Duration::from_millis(timeout_ms)).expect("options");
            assert!(socket.keepalive().expect("an option"));
            let seconds = Duration::from_secs;
            assert_eq!(
                socket.tcp_user_timeout().expect("an option"),
                Some(Duration::from_millis(user_ms))
            );
            assert_eq!(socket.tcp_keepalive_time().expect("an option"), seconds(idle_s));
            assert_eq!(socket.tcp_keepalive_interval().expect("an option"), seconds(interval_s));
        }
    }

    fn destination(address: Address) -> Destination {
        Destination {
            address,
            route: crate::redis::destination::Route::Direct,
            allowed_hosts: "*".parse().expect("a list"),
            tls: None,
            db: 0,
            username: None,
            password: None,
            client_name: "test".to_owned(),
            connect_timeout: Duration::from_secs(5),
            socket_timeout: Duration::from_millis(400),
            protocol: crate::redis::destination::Protocol::AtLeastOnce { replicas: None },
        }
    }

    /// Answers CLIENT and PING, and then a byte each 50 ms of a string that is long.
    fn drip(mut stream: impl Read + Write) {
        let mut room = [0; 1024];
        for reply in [b"+OK\r\n".as_slice(), b"+PONG\r\n"] {
            let _ = stream.read(&mut room);
            let _ = stream.write_all(reply);
        }
        let _ = stream.write_all(b"$1000\r\n");
        while stream.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    #[track_caller]
    fn assert_given_up_in_time(address: Address) {
        let mut connection = RedisConnection::open(&destination(address)).expect("a connection");
        let start = Instant::now();
        let failure = connection.receive(&Bounds::guard()).err().expect("no whole reply");
        let took = start.elapsed();
        assert_eq!(failure.trouble, Trouble::TimedOut);
        assert!((400..1_000).contains(&took.as_millis()), "given up after {took:?}");
    }

    #[test]
    fn a_reply_that_drips_has_one_timeout() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let port = listener.local_addr().expect("an address").port();
        let server = std::thread::spawn(move || drip(listener.accept().expect("a connection").0));
        assert_given_up_in_time(Address::Tcp {
            host: "127.0.0.1".to_owned(),
            port,
        });
        server.join().expect("the server ends");
    }

    #[test]
    fn a_unix_socket_has_it_too_and_is_not_waited_for_when_nobody_accepts() {
        let path = std::env::temp_dir().join(format!("outbox_relay_drip_{}.sock", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a listener");
        let server = std::thread::spawn(move || {
            drip(listener.accept().expect("a connection").0);
            listener
        });
        assert_given_up_in_time(Address::Unix(path.clone()));
        let _listener = server.join().expect("the server ends");
        // Its queue is full before long.
        let timeout = Duration::from_millis(200);
        let mut waiting = Vec::new();
        let refused = loop {
            let start = Instant::now();
            match connect_unix(&path, timeout) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break (error, start.elapsed()),
            }
            assert!(waiting.len() < 10_000, "the queue never fills");
        };
        assert_eq!(failure::io(&refused.0).trouble, Trouble::TimedOut);
        assert!(refused.1 < Duration::from_secs(2), "{refused:?}");
        std::fs::remove_file(path).expect("a socket");
    }
}
