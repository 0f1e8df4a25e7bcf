//! Replicas that must have a batch before it counts as accepted: the command WAIT.

use crate::failure::{self, Failure, Trouble};
use crate::resp::write::append_command;
use redis::Value;
use std::time::Duration;

/// Replicas that must have what was written (WAIT), and for how long the server waits for them at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    pub count: u32,
    pub wait_ms: u64,
}

/// Between two WAITs: a server that does not wait is not asked without a pause.
pub(crate) const WAIT_PAUSE: Duration = Duration::from_millis(20);

impl Replicas {
    /// Appends the WAIT for everything that this connection has written.
    pub(crate) fn append_wait(&self, out: &mut Vec<u8>) {
        let (count, wait_ms) = (self.count.to_string(), self.wait_ms.to_string());
        append_command(out, &[b"WAIT", count.as_bytes(), wait_ms.as_bytes()]);
    }

    /// What the reply to WAIT says: the inner error, that there are too few.
    pub(crate) fn judge(&self, reply: &Value) -> Result<Result<(), Failure>, Failure> {
        let count = match reply {
            Value::Int(count @ 0..) => *count,
            other => return Err(failure::unexpected(other)),
        };
        let few = || {
            let text = format!("NOREPLICAS only {count} of {} replicas have the batch", self.count);
            Failure::of(Trouble::NoReplicas, text)
        };
        Ok((count >= i64::from(self.count)).then_some(()).ok_or_else(few))
    }
}
