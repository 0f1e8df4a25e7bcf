//! One connection to Redis: opens it with all its timeouts, logs in, writes batches, reads replies one by one.

use crate::failure::server_text;
use crate::failure::{self, Class, Failure, Trouble};
use crate::redis::deadline::Deadline;
use crate::redis::destination::{Address, Destination, Secret};
use crate::redis::server_file;
use crate::redis::socket::{Stream, at_least_some, broken};
use crate::redis::step::{self, Step};
use crate::resp::bounds::Bounds;
use crate::resp::read::{Inbox, Reply};
use crate::resp::write::append_command;
use redis::Value;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// A connection that has logged in, selected its database and answered a PING.
pub struct RedisConnection {
    stream: Stream,
    inbox: Inbox,
    /// The timeout for each reply and each write as a whole.
    timeout: Duration,
    /// The deadline of the reply that is being received.
    deadline: Option<Deadline>,
    /// Whether the socket's timeout is reduced to the rest of the reply's time.
    is_shortened: bool,
}

impl RedisConnection {
    /// Blocks for at most `connect_timeout` for each address of the host's name (plus the resolver's own time, which
    /// cannot be limited), for the TLS handshake, and for each step of logging in.
    pub fn open(destination: &Destination) -> Result<Self, Failure> {
        Self::open_at(destination, &destination.address)
    }

    /// As [`Self::open`], at another address, with all other properties of the destination.
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
            // Even without a password, a named user differs from Redis's default user.
            (Some(username), password) => {
                let password = password.unwrap_or_default();
                self.ask("AUTH", &[b"AUTH", username.as_bytes(), password.as_bytes()])?
            }
            (None, Some(password)) => self.ask("AUTH", &[b"AUTH", password.as_bytes()])?,
            (None, None) => Ok(()),
        };
        // If the login was refused, the connection must not be used as the default user.
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
        // A user without the right to set a name is accepted. If a login is missing, PING reports that.
        match self.ask(
            "CLIENT SETNAME",
            &[b"CLIENT", b"SETNAME", destination.client_name.as_bytes()],
        )? {
            // For example "max number of clients reached", after which the server closes the connection.
            Err(failure) if failure.class == Class::Backend || failure.trouble == Trouble::Denied => {
                return Err(failure);
            }
            _ => {}
        }
        match self.ask("PING", &[b"PING"])? {
            Ok(()) => Ok(()),
            // A user without the right to PING may still XADD.
            Err(failure) if failure.message.starts_with("NOPERM") => Ok(()),
            Err(failure) if failure.class == Class::Event => Err(Failure::backend(failure.message)),
            Err(failure) => Err(failure),
        }
    }

    /// Sends one command and reads its reply. The inner error is one of the server.
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

    /// Reads the next reply (or the next piece of it), whatever it is, within these bounds and with one timeout for the
    /// whole reply.
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

    /// Reduces the timeout of the next read; `None`: restores it.
    fn shorten(&mut self, left: Option<Duration>) -> Result<(), Failure> {
        if left.is_none() && !self.is_shortened {
            return Ok(());
        }
        self.is_shortened = left.is_some();
        let timeout = Some(at_least_some(left.unwrap_or(self.timeout)));
        self.stream.socket().set_read_timeout(timeout).map_err(broken)
    }

    /// Whether the other side has closed the connection or is known to be gone. Called while no reply is expected. Does
    /// not wait.
    pub fn look(&mut self) -> Result<(), Failure> {
        self.receive_at_once()?;
        match self.inbox().is_empty() {
            true => Ok(()),
            false => Err(Failure::backend("a reply to no command")),
        }
    }

    /// Receives what has arrived, without waiting.
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

    /// The next reply, if it was received completely.
    pub(crate) fn received(&mut self, bounds: &Bounds) -> Result<Option<Reply<'_>>, Failure> {
        Ok(self.inbox.take(bounds)?.map(|taken| self.inbox.reply(taken)))
    }

    /// What was received and not yet taken as a reply.
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

    /// Reads the reply to an XADD, which must be an entry id. The outer error is the connection's end; the inner one is
    /// an error reply of the server.
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

/// Reads the first line of the file.
fn read_password(path: &Path) -> Result<String, Failure> {
    let bytes = server_file::read_secret("password file", path)?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Failure::configuration(format!("password file \"{}\" is not in UTF-8", path.display())))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis::socket::connect_unix;
    use socket2::{Domain, SockAddr, Socket, Type};
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn destination(address: Address) -> Destination {
        Destination {
            address,
            route: crate::redis::destination::NodeRoute::Direct,
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

    /// Answers CLIENT and PING, and then sends one byte of a long string every 50 ms.
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
    fn a_unix_socket_has_the_timeout_too_even_if_nobody_accepts() {
        let path = std::env::temp_dir().join(format!("outbox_relay_drip_{}.sock", std::process::id()));
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a listener");
        let server = std::thread::spawn(move || {
            drip(listener.accept().expect("a connection").0);
            listener
        });
        assert_given_up_in_time(Address::Unix(path.clone()));
        drop(server.join().expect("the server ends"));
        std::fs::remove_file(&path).expect("a socket");
        // With a queue of connections that is soon full: a process has a thousand descriptors as a rule.
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
        listener
            .bind(&SockAddr::unix(&path).expect("an address"))
            .expect("bound");
        listener.listen(1).expect("a listener");
        let timeout = Duration::from_millis(200);
        let mut waiting = Vec::new();
        let refused = loop {
            let start = Instant::now();
            match connect_unix(&path, timeout) {
                Ok(stream) => waiting.push(stream),
                Err(error) => break (error, start.elapsed()),
            }
            assert!(waiting.len() < 100, "the queue never fills");
        };
        assert_eq!(failure::io(&refused.0).trouble, Trouble::TimedOut);
        assert!(refused.1 < Duration::from_secs(2), "{refused:?}");
        std::fs::remove_file(path).expect("a socket");
    }
}
