//! The step of opening a connection that this thread has reached, so that [`probe`](crate::redis::probe) can report at
//! which step it failed.

use std::cell::Cell;
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Finds the node: asks sentinels, or nodes of a cluster.
    FindNode,
    Resolve,
    Connect,
    Tls,
    /// Reads the password, and sends AUTH.
    Auth,
    Select,
    Ping,
    Role,
    Rights,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FindNode => "finding the node",
            Self::Resolve => "resolve",
            Self::Connect => "connect",
            Self::Tls => "TLS",
            Self::Auth => "AUTH",
            Self::Select => "SELECT",
            Self::Ping => "PING",
            Self::Role => "ROLE",
            Self::Rights => "rights",
        })
    }
}

thread_local! {
    static STEP: Cell<Step> = const { Cell::new(Step::FindNode) };
}

pub fn at(step: Step) {
    STEP.set(step);
}

pub fn current() -> Step {
    STEP.get()
}
