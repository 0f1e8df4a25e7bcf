//! A client that sends a COMMIT and closes the connection without waiting for the answer. No driver does that, so this
//! implements as much of the protocol as needed
//! (<https://www.postgresql.org/docs/current/protocol-message-formats.html>).

use std::io::{Error, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub(crate) struct Hasty(UnixStream);

impl Hasty {
    /// Connects by the Unix socket in this directory, where no password is asked for.
    pub(crate) fn connect(dir: &Path, user: &str, database: &str) -> Result<Self, Error> {
        let socket = UnixStream::connect(dir.join(".s.PGSQL.5432"))?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut client = Hasty(socket);
        // Version 3.0.
        let mut body = 196_608_u32.to_be_bytes().to_vec();
        for word in ["user", user, "database", database, "application_name", "hasty", ""] {
            body.extend(word.as_bytes());
            body.push(0);
        }
        let length = u32::try_from(body.len() + 4).expect("a short message");
        client.0.write_all(&length.to_be_bytes())?;
        client.0.write_all(&body)?;
        client.until_ready()?;
        Ok(client)
    }

    /// Runs statements and waits for their end.
    pub(crate) fn run(&mut self, sql: &str) -> Result<(), Error> {
        self.send(sql)?;
        self.until_ready()
    }

    /// Sends statements, and does not wait for an answer.
    pub(crate) fn send(&mut self, sql: &str) -> Result<(), Error> {
        let length = u32::try_from(sql.len() + 5).expect("a short message");
        let message = [&b"Q"[..], &length.to_be_bytes(), sql.as_bytes(), b"\0"].concat();
        self.0.write_all(&message)
    }

    /// Reads messages up to ReadyForQuery. An ErrorResponse is an error.
    fn until_ready(&mut self) -> Result<(), Error> {
        let mut refused = None;
        loop {
            let mut head = [0; 5];
            self.0.read_exact(&mut head)?;
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let mut body = vec![0; length.saturating_sub(4)];
            self.0.read_exact(&mut body)?;
            match head[0] {
                b'Z' => return refused.map_or(Ok(()), |text| Err(Error::other::<String>(text))),
                b'E' => refused = Some(String::from_utf8_lossy(&body).replace('\0', " ")),
                _ => {}
            }
        }
    }
}
