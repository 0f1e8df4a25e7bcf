//! Replicas that must have a batch before it counts as accepted: the command WAIT.

use crate::failure::{self, Failure, Trouble};
use crate::resp::write::append_command;
use redis::Value;
use std::time::Duration;

/// How many replicas must have what was written (WAIT), and how long one WAIT may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    pub count: u32,
    pub wait_ms: u64,
}

/// The pause between two WAITs, in case a server answers without waiting.
pub(crate) const WAIT_PAUSE: Duration = Duration::from_millis(20);

impl Replicas {
    /// Appends a WAIT for everything that this connection has written.
    pub(crate) fn append_wait(&self, out: &mut Vec<u8>) {
        let (count, wait_ms) = (self.count.to_string(), self.wait_ms.to_string());
        append_command(out, &[b"WAIT", count.as_bytes(), wait_ms.as_bytes()]);
    }

    /// Evaluates the reply to WAIT. The inner error means that there are too few replicas.
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
