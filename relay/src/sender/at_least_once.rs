//! A connection with at_least_once: batches are plain commands, several on their way at once.

use crate::delivery::flight::{PIPELINED_BATCHES, Refusal};
use crate::failure::{Failure, Trouble};
use crate::redis::connection::Connection;
use crate::redis::destination::Destination;
use crate::redis::replicas::{Replicas, WAIT_PAUSE};
use crate::redis::topology;
use crate::resp::bounds::Bounds;
use crate::sender::idle::{Idle, Line};
use crate::sender::next_order::next_order;
use crate::sender::orders::{Batch, Order, Report};
use crate::sender::reporter::Reporter;
use crossbeam_channel::Receiver;
use std::collections::VecDeque;
use std::thread;

/// Sends batches as they come, some ahead of their replies (at_least_once).
pub(super) fn pipeline(
    connection: Connection,
    destination: &Destination,
    replicas: Option<Replicas>,
    orders: &Receiver<Order>,
    reporter: &Reporter,
    idle: &Idle,
) {
    if !reporter.report(Report::Connected) {
        return;
    }
    let mut line = Line::of(connection, None);
    // A WAIT that has to be repeated would come behind later batches.
    let ahead = if replicas.is_some() { 1 } else { PIPELINED_BATCHES };
    let mut unanswered: VecDeque<Batch> = VecDeque::new();
    // The server has closed the connection: what it had said before is still to be read.
    let mut closed: Option<Failure> = None;
    loop {
        while closed.is_none() && unanswered.len() < ahead {
            let next = match unanswered.is_empty() {
                true => match idle.keep(line, || next_order(orders)) {
                    Ok((back, order)) => {
                        line = back;
                        order.ok()
                    }
                    Err(failure) => return reporter.lost(failure),
                },
                false => orders.try_recv().ok(),
            };
            match next {
                Some(Order::Batch(batch)) => {
                    match line.connection().send(&batch.bytes) {
                        Err(failure) if failure.trouble != Trouble::Closed => return reporter.lost(failure),
                        sent => closed = sent.err(),
                    }
                    unanswered.push_back(batch);
                }
                // Nothing is asked of Redis: only whether the connection is still there.
                Some(Order::Beat { .. }) if unanswered.is_empty() => {
                    if let Err(failure) = line.connection().look() {
                        return reporter.lost(failure);
                    }
                }
                Some(_) => {}
                // The worker let go of the handle.
                None if unanswered.is_empty() => return,
                None => break,
            }
        }
        let Some(batch) = unanswered.pop_front() else {
            return closed.into_iter().for_each(|failure| reporter.lost(failure));
        };
        let report = match answers(line.connection(), batch.commands) {
            Ok(refused) => Report::Done {
                refused: refused
                    .into_iter()
                    .map(|(index, failure)| (index, topology::heard(destination, failure)))
                    .collect(),
                buffer: batch.bytes,
            },
            Err((failure, accepted, refused)) => {
                reporter.report(Report::Lost {
                    failure,
                    accepted,
                    refused,
                });
                return;
            }
        };
        if let Some(replicas) = replicas
            && let Err(failure) = replicate(line.connection(), replicas, reporter)
        {
            return reporter.lost(failure);
        }
        if !reporter.report_before(report, orders.len() + unanswered.len()) {
            return;
        }
    }
}

/// Waits until enough replicas have all that was written.
fn replicate(connection: &mut Connection, replicas: Replicas, reporter: &Reporter) -> Result<(), Failure> {
    let mut told = None;
    loop {
        let mut wait = Vec::new();
        replicas.append_wait(&mut wait);
        connection.send(&wait)?;
        let Err(failure) = replicas.judge(&connection.receive(&Bounds::line("WAIT"))?.value()?)? else {
            return Ok(());
        };
        if told.as_ref() != Some(&failure.message) {
            told = Some(failure.message.clone());
            if !reporter.report(Report::Behind(failure)) {
                return Err(Failure::backend("let go"));
            }
        }
        thread::sleep(WAIT_PAUSE);
    }
}

/// Reads the replies of one batch.
fn answers(connection: &mut Connection, commands: usize) -> Result<Vec<Refusal>, (Failure, usize, Vec<Refusal>)> {
    let mut refused = Vec::new();
    for index in 0..commands {
        match connection.receive_entry_id() {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => refused.push((index, failure)),
            Err(failure) => return Err((failure, index, refused)),
        }
    }
    Ok(refused)
}
