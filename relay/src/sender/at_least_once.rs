//! A connection with at_least_once: batches are plain commands, several in flight at once.

use crate::delivery::flight::{PIPELINED_BATCHES, Refusal};
use crate::failure::{Failure, Trouble};
use crate::redis::connection::RedisConnection;
use crate::redis::destination::Destination;
use crate::redis::replicas::{Replicas, WAIT_PAUSE};
use crate::redis::topology;
use crate::resp::bounds::Bounds;
use crate::sender::idle::{Idle, Line};
use crate::sender::next_order::next_order;
use crate::sender::orders::{Batch, Order, Report};
use crate::sender::reporter::Reporter;
use crate::sender::survey::Survey;
use crossbeam_channel::Receiver;
use std::collections::VecDeque;
use std::thread;

/// Sends batches as they come, some of them before the replies to earlier ones, until the connection ends or the worker
/// has dropped this sender.
pub(super) fn pipeline(
    connection: RedisConnection,
    destination: &Destination,
    replicas: Option<Replicas>,
    orders: &Receiver<Order>,
    reporter: &Reporter,
    idle: &Idle,
) -> Result<(), Failure> {
    if !reporter.report(Report::Connected) {
        return Ok(());
    }
    let mut pipeline = Pipeline {
        destination,
        replicas,
        orders,
        reporter,
        idle,
        unanswered: VecDeque::new(),
        closed: None,
        survey: None,
    };
    let mut line = Line::of(connection, None);
    while let Some(back) = pipeline.send(line)? {
        line = back;
        let Some(batch) = pipeline.unanswered.pop_front() else {
            return pipeline.closed.map_or(Ok(()), Err);
        };
        if !pipeline.hear(line.connection(), batch)? {
            break;
        }
    }
    Ok(())
}

struct Pipeline<'a> {
    destination: &'a Destination,
    replicas: Option<Replicas>,
    orders: &'a Receiver<Order>,
    reporter: &'a Reporter,
    idle: &'a Idle,
    /// Batches that were sent and not answered yet, oldest first.
    unanswered: VecDeque<Batch>,
    /// The server has closed the connection. What it sent before is still to be read.
    closed: Option<Failure>,
    /// It begins when all batches are answered.
    survey: Option<Box<Survey>>,
}

impl Pipeline<'_> {
    /// Takes orders, and waits for one if no reply is expected. `None`: the worker has dropped the handle.
    fn send(&mut self, mut line: Box<Line>) -> Result<Option<Box<Line>>, Failure> {
        // A WAIT that has to be repeated would also wait for later batches.
        let ahead = if self.replicas.is_some() { 1 } else { PIPELINED_BATCHES };
        while self.closed.is_none() && self.unanswered.len() < ahead {
            if self.survey.is_some() && !self.unanswered.is_empty() {
                break;
            }
            if let Some(survey) = self.survey.take()
                && !self.survey(line.connection(), survey)?
            {
                return Ok(None);
            }
            let next = match self.unanswered.is_empty() {
                true => {
                    let (back, order) = self.idle.keep(line, || next_order(self.orders))?;
                    line = back;
                    order.ok()
                }
                false => self.orders.try_recv().ok(),
            };
            match next {
                Some(Order::Batch(batch)) => self.write(line.connection(), batch)?,
                Some(Order::Survey(survey)) => self.survey = Some(survey),
                // Redis is asked nothing. This only checks whether the connection still exists.
                Some(Order::Beat { .. }) if self.unanswered.is_empty() => line.connection().look()?,
                Some(_) => {}
                None if self.unanswered.is_empty() => return Ok(None),
                None => break,
            }
        }
        Ok(Some(line))
    }

    fn write(&mut self, connection: &mut RedisConnection, batch: Batch) -> Result<(), Failure> {
        match connection.send(&batch.bytes) {
            Err(failure) if failure.trouble != Trouble::Closed => return Err(failure),
            sent => self.closed = sent.err(),
        }
        self.unanswered.push_back(batch);
        Ok(())
    }

    /// Asks about consumer groups. False: the worker has dropped this sender.
    fn survey(&self, connection: &mut RedisConnection, mut survey: Box<Survey>) -> Result<bool, Failure> {
        let mut out = Vec::new();
        loop {
            let commands = survey.ask(&mut out);
            if commands == 0 {
                let report = Report::Surveyed(survey.number, survey.into_found());
                return Ok(self.reporter.report(report));
            }
            connection.send(&out)?;
            out.clear();
            for _ in 0..commands {
                while !survey.reply(connection.receive(&survey.bounds())?)? {}
            }
        }
    }

    /// Reads the replies of a batch and reports them. False: the connection has ended, or the worker has dropped this
    /// sender.
    fn hear(&self, connection: &mut RedisConnection, batch: Batch) -> Result<bool, Failure> {
        let refused = match answers(connection, batch.commands) {
            Ok(refused) => refused.into_iter(),
            Err((failure, accepted, refused)) => {
                self.reporter.report(Report::Lost {
                    failure,
                    accepted,
                    refused,
                });
                return Ok(false);
            }
        };
        if let Some(replicas) = self.replicas
            && !self.replicate(connection, replicas)?
        {
            return Ok(false);
        }
        let heard = |(index, failure)| (index, topology::heard(self.destination, failure));
        let report = Report::Done {
            refused: refused.map(heard).collect(),
            buffer: batch.bytes,
        };
        let waiting = self.orders.len() + self.unanswered.len();
        Ok(self.reporter.report_before(report, waiting))
    }

    /// Waits until enough replicas have everything that was written. False: the worker has dropped this sender.
    fn replicate(&self, connection: &mut RedisConnection, replicas: Replicas) -> Result<bool, Failure> {
        let mut reported = None;
        loop {
            let mut wait = Vec::new();
            replicas.append_wait(&mut wait);
            connection.send(&wait)?;
            let Err(failure) = replicas.judge(&connection.receive(&Bounds::line("WAIT"))?.value()?)? else {
                return Ok(true);
            };
            if self.idle.is_let_go() {
                return Ok(false);
            }
            if reported.as_ref() != Some(&failure.message) {
                reported = Some(failure.message.clone());
                self.reporter.report(Report::Behind(failure));
            }
            thread::sleep(WAIT_PAUSE);
        }
    }
}

/// Reads the replies of one batch.
fn answers(connection: &mut RedisConnection, commands: usize) -> Result<Vec<Refusal>, (Failure, usize, Vec<Refusal>)> {
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
