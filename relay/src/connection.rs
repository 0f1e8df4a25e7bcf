//! One connection to Redis: opening it with all its timeouts, writing batches, reading replies one by one.

use crate::classify::{self, Class, Failure};
use crate::destination::{Address, Destination, Secret};
use redis::io::tcp::TcpSettings;
use redis::{Client, Connection, ConnectionAddr, IntoConnectionInfo, RedisConnectionInfo, Value};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// A connection that has logged in, chosen its database and answered a PING.
pub struct Link {
    connection: Connection,
}

impl Link {
    /// Blocks for at most `connect_timeout` for each address that the host's name stands for (and, beyond our reach, the
    /// resolver's own time).
    pub fn open(destination: &Destination) -> Result<Self, Failure> {
        let mut redis = RedisConnectionInfo::default()
            .set_db(destination.db)
            .set_skip_set_lib_name();
        if let Some(username) = &destination.username {
            redis = redis.set_username(username);
        }
        match &destination.password {
            Some(Secret::Text(password)) => redis = redis.set_password(password),
            Some(Secret::File(path)) => redis = redis.set_password(read_password(path)?),
            None => {}
        }
        let address = match &destination.address {
            Address::Tcp { host, port } => ConnectionAddr::Tcp(host.clone(), *port),
            Address::Unix(path) => ConnectionAddr::Unix(path.clone()),
        };
        let tcp = TcpSettings::default()
            .set_nodelay(true)
            .set_user_timeout(destination.socket_timeout);
        let info = address
            .into_connection_info()
            .map_err(|e| classify::connection(&e))?
            .set_tcp_settings(tcp)
            .set_redis_settings(redis);
        let client = Client::open(info).map_err(|e| classify::connection(&e))?;
        let connection = client
            .get_connection_with_timeout(destination.connect_timeout)
            .map_err(|e| classify::connection(&e))?;
        let mut link = Self { connection };
        link.set_timeouts(destination.socket_timeout)?;
        // A user without the right to name itself is welcome all the same; one who must log in first is told by PING.
        let name = redis::cmd("CLIENT")
            .arg("SETNAME")
            .arg(&destination.client_name)
            .get_packed_command();
        link.send(&name)?;
        match link.receive()? {
            // Such as "max number of clients reached": the last word before the server closes the connection.
            Err(failure) if failure.class == Class::Backend => return Err(failure),
            _ => {}
        }
        link.send(&redis::cmd("PING").get_packed_command())?;
        match link.receive()? {
            Ok(()) => Ok(link),
            // Without the right to PING it may still XADD.
            Err(failure) if failure.message.starts_with("NOPERM") => Ok(link),
            Err(failure) if failure.class == Class::Event => Err(Failure::backend(failure.message)),
            Err(failure) => Err(failure),
        }
    }

    fn set_timeouts(&self, timeout: Duration) -> Result<(), Failure> {
        // Zero would mean "none at all" to the operating system.
        let timeout = Some(timeout.max(Duration::from_millis(1)));
        self.connection
            .set_read_timeout(timeout)
            .and_then(|()| self.connection.set_write_timeout(timeout))
            .map_err(|e| classify::connection(&e))
    }

    /// Writes whole commands.
    pub fn send(&mut self, commands: &[u8]) -> Result<(), Failure> {
        self.connection
            .send_packed_command(commands)
            .map_err(|e| classify::connection(&e))
    }

    /// Reads the next reply, whatever it is.
    pub fn receive_value(&mut self) -> Result<Value, Failure> {
        self.connection.recv_response().map_err(|e| classify::connection(&e))
    }

    /// Reads the next reply. The outer error is the connection's end; the inner one an error reply of the server. Whatever is
    /// not the reply of a command that succeeded is an error.
    pub fn receive(&mut self) -> Result<Result<(), Failure>, Failure> {
        self.receive_if(|value| matches!(value, Value::BulkString(_) | Value::SimpleString(_) | Value::Okay))
    }

    /// The same for the reply of an XADD: an entry's id, and nothing else.
    pub fn receive_entry_id(&mut self) -> Result<Result<(), Failure>, Failure> {
        self.receive_if(|value| matches!(value, Value::BulkString(_)))
    }

    fn receive_if(&mut self, succeeded: impl FnOnce(&Value) -> bool) -> Result<Result<(), Failure>, Failure> {
        match self.connection.recv_response() {
            Ok(Value::ServerError(error)) => Ok(Err(classify::reply(&error))),
            Ok(value) if succeeded(&value) => Ok(Ok(())),
            Ok(_) => Err(Failure::backend("unexpected reply, as from no Redis server")),
            Err(error) => Err(classify::connection(&error)),
        }
    }
}

fn read_password(path: &Path) -> Result<String, Failure> {
    let text = fs::read_to_string(path)
        .map_err(|e| Failure::configuration(format!("could not read password file \"{}\": {e}", path.display())))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}
