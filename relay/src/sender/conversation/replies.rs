//! What replies mean in any state.

use crate::delivery::flight::Refusal;
use crate::failure::{self, Class, Failure, Trouble};
use crate::fault::{self, Mutation};
use crate::guard::Guard;
use crate::resp::read::{Reply, ReplyItems};
use redis::Value;

/// Parses the reply to HGETALL.
pub(super) fn guard_of(reply: Reply<'_>) -> Result<Option<Guard>, Failure> {
    let Some(mut items) = reply.items() else {
        return Err(failure::unexpected(&reply.value()?));
    };
    let mut fields = Vec::new();
    while let (Some(field), Some(value)) = (items.next(), items.next()) {
        match (field.string(), value.string()) {
            (Some(field), Some(value)) => fields.push((field, value)),
            _ => return Err(failure::not_redis()),
        }
    }
    Guard::parse(&fields).map_err(|e| Failure::of(Trouble::NoGuard, e.to_string()))
}

/// Another server has claimed the guard, or it is missing. The next connection finds out which.
pub(super) fn touched() -> Failure {
    Failure::backend("its guard was changed by another connection")
}

/// Processes the reply to a command that only matters if it fails.
pub(super) fn well(value: &Value) -> Result<(), Failure> {
    match value {
        Value::Okay | Value::SimpleString(_) | Value::Int(_) => Ok(()),
        other => Err(failure::unexpected(other)),
    }
}

/// The refused events, from the replies to a batch's entries and to the guard's HSET after them.
pub(super) fn refusals(replies: ReplyItems<'_>) -> Result<Vec<Refusal>, Failure> {
    let commands = replies.len() - 1;
    let mut refused = Vec::new();
    for (index, reply) in replies.enumerate() {
        if index < commands && reply.is_bulk() {
            continue;
        }
        match reply.value()? {
            Value::ServerError(_) if fault::is_mutated(Mutation::IgnoreErrorReply) => {}
            Value::ServerError(error) if index < commands => {
                // The transaction was executed, so the same entry would be refused again: the failure concerns this
                // event.
                let mut failure = failure::reply(&error);
                failure.class = Class::Event;
                refused.push((index, failure));
            }
            Value::Int(_) if index == commands => {}
            other => return Err(failure::unexpected(&other)),
        }
    }
    Ok(refused)
}
