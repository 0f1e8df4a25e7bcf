//! The socket of a connection: permission to connect, checked for the address that is then used; the operating system's
//! timeouts; TLS.

use crate::failure::{self, Failure, Trouble};
use crate::redis::deadline::Deadline;
use crate::redis::destination::{Address, Destination};
use crate::redis::step::{self, Step};
use crate::redis::tls::{self, TlsStream};
use socket2::{Domain, SockAddr, SockRef, Socket, TcpKeepalive, Type};
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

pub(super) enum Stream {
    Tcp(TcpStream),
    Tls(Box<TlsStream>),
    Unix(UnixStream),
}

impl Stream {
    pub(super) fn open(destination: &Destination, address: &Address) -> Result<Self, Failure> {
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
        // Before connecting, because the files may be unreadable.
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

    /// The timeout of each call.
    pub(super) fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        let timeout = Some(at_least_some(timeout));
        self.socket().set_read_timeout(timeout)?;
        self.socket().set_write_timeout(timeout)
    }

    pub(super) fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.socket().set_nonblocking(nonblocking)
    }

    pub(super) fn socket(&self) -> SockRef<'_> {
        match self {
            Self::Tcp(stream) => SockRef::from(stream),
            Self::Tls(stream) => SockRef::from(stream.socket()),
            Self::Unix(stream) => SockRef::from(stream),
        }
    }

    /// `timeout`: for the socket, and for the whole write.
    pub(super) fn write_all(&mut self, bytes: &[u8], timeout: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => write_all(stream, bytes, timeout),
            Self::Tls(stream) => stream.write_all(bytes, timeout),
            Self::Unix(stream) => write_all(stream, bytes, timeout),
        }
    }

    pub(super) fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(room),
            Self::Tls(stream) => stream.read(room),
            Self::Unix(stream) => stream.read(room),
        }
    }
}

/// As the standard library's function, with a time limit for the whole write.
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

/// The timeout for writes also applies here, so a server that does not accept is not waited for longer than one that
/// does not answer.
pub(super) fn connect_unix(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_write_timeout(Some(at_least_some(timeout)))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

/// The operating system takes zero as "no timeout".
pub(super) fn at_least_some(timeout: Duration) -> Duration {
    timeout.max(Duration::from_millis(1))
}

/// Makes sure that a lost peer is noticed: with unacknowledged data after `socket_timeout`, without data after a third
/// more.
fn tune(stream: &TcpStream, socket_timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(at_least_some(socket_timeout)))?;
    // The option takes whole seconds.
    let idle = socket_timeout.max(Duration::from_secs(1));
    let interval = (idle / 3).max(Duration::from_secs(1));
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(idle)
            .with_interval(interval)
            .with_retries(3),
    )
}

/// If a name has more addresses, only this many are tried.
const MOST_ADDRESSES: usize = 16;

/// Connects to the first allowed address that answers; otherwise returns the last one's error. The name is resolved
/// each time.
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

pub(super) fn broken(error: io::Error) -> Failure {
    tls::failure(&error).unwrap_or_else(|| failure::io(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_silent_peer_is_noticed_in_time() {
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
}
