//! A sender: the thread that owns one connection of one backend, from connecting to the first error.
//!
//! It takes batches from a bounded channel, writes up to [`PIPELINED_BATCHES`] of them ahead of their replies, reads every reply,
//! and reports each batch in order. At the first error of the connection it says so and ends; the worker decides
//! what was delivered and when to try again, with a new sender. It knows nothing of Postgres.

use crate::classify::{Class, Failure};
use crate::connection::Link;
use crate::destination::Destination;
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::thread;

/// How many batches are in Redis's hands at once: enough that it finds the next when it has done one.
pub const PIPELINED_BATCHES: usize = 4;

/// How many batches may wait for or be with a sender; the channel's bound.
pub const WINDOW_BATCHES: usize = 32;

/// Commands for one write, ready as bytes.
pub struct Batch {
    pub bytes: Vec<u8>,
    /// How many commands, so how many replies.
    pub commands: usize,
}

/// What became of one command of a batch.
pub type Refusal = (usize, Failure);

/// What a sender reports, in order.
pub enum Report {
    /// Logged in; batches are welcome.
    Connected,
    /// All replies of the oldest batch are there; the commands that were refused, by index. The buffer comes back.
    Done { refused: Vec<Refusal>, buffer: Vec<u8> },
    /// The connection is no more. `accepted`: replies of the oldest batch that were read before it ended, and `refused`
    /// those of them which were errors. All else that was sent is in doubt.
    Lost {
        failure: Failure,
        accepted: usize,
        refused: Vec<Refusal>,
    },
}

/// The worker's end of a sender. Dropping it ends the thread as soon as it looks, without waiting for it.
pub struct Handle {
    batches: Sender<Batch>,
    reports: Receiver<Report>,
}

impl Handle {
    /// Starts a thread that connects to `destination`. One byte is written to `waker` (non-blocking) after each report.
    /// The caller blocks all signals of its process around this call: a thread inherits the mask.
    pub fn spawn(destination: Destination, waker: UnixStream) -> io::Result<Self> {
        let (batches, to_send) = bounded(WINDOW_BATCHES);
        // A report for each batch, the connection's beginning and its end: a send never blocks.
        let (to_report, reports) = bounded(WINDOW_BATCHES + 2);
        thread::Builder::new()
            .name(format!("sender {}", destination.client_name).chars().take(15).collect())
            .stack_size(512 * 1024)
            .spawn(move || {
                let reporter = Reporter {
                    reports: to_report,
                    waker,
                };
                run(&destination, &to_send, &reporter);
            })?;
        Ok(Self { batches, reports })
    }

    /// Hands over a batch; gives it back when the channel is full or the thread has ended (its report says why).
    pub fn send(&self, batch: Batch) -> Result<(), Batch> {
        self.batches.try_send(batch).map_err(|e| match e {
            TrySendError::Full(batch) | TrySendError::Disconnected(batch) => batch,
        })
    }

    /// The next report, without waiting. A thread that ended without a word (it panicked) counts as lost.
    pub fn report(&self) -> Option<Report> {
        match self.reports.try_recv() {
            Ok(report) => Some(report),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Report::Lost {
                failure: Failure::backend("the sender thread ended unexpectedly"),
                accepted: 0,
                refused: Vec::new(),
            }),
        }
    }
}

struct Reporter {
    reports: Sender<Report>,
    waker: UnixStream,
}

impl Reporter {
    fn report(&self, report: Report) {
        if self.reports.try_send(report).is_ok() {
            // A full socket wakes the worker just as well.
            let _ = (&self.waker).write(&[0]);
        }
    }
}

impl Drop for Reporter {
    /// Also when the thread panics: the worker sees the closed channel.
    fn drop(&mut self) {
        let _ = (&self.waker).write(&[0]);
    }
}

fn run(destination: &Destination, batches: &Receiver<Batch>, reporter: &Reporter) {
    let mut link = match Link::open(destination) {
        Ok(link) => link,
        Err(failure) => {
            return reporter.report(Report::Lost {
                failure,
                accepted: 0,
                refused: Vec::new(),
            });
        }
    };
    reporter.report(Report::Connected);
    let mut unanswered: VecDeque<Batch> = VecDeque::new();
    loop {
        while unanswered.len() < PIPELINED_BATCHES {
            let next = if unanswered.is_empty() {
                batches.recv().ok()
            } else {
                batches.try_recv().ok()
            };
            match next {
                Some(batch) => {
                    if let Err(failure) = link.send(&batch.bytes) {
                        return reporter.report(Report::Lost {
                            failure,
                            accepted: 0,
                            refused: Vec::new(),
                        });
                    }
                    unanswered.push_back(batch);
                }
                // The worker let go of the handle.
                None if unanswered.is_empty() => return,
                None => break,
            }
        }
        let batch = unanswered.pop_front().expect("at least one batch was written");
        match answers(&mut link, batch.commands) {
            Ok(refused) => reporter.report(Report::Done {
                refused,
                buffer: batch.bytes,
            }),
            Err((failure, accepted, refused)) => {
                return reporter.report(Report::Lost {
                    failure,
                    accepted,
                    refused,
                });
            }
        }
    }
}

/// Reads the replies of one batch.
fn answers(link: &mut Link, commands: usize) -> Result<Vec<Refusal>, (Failure, usize, Vec<Refusal>)> {
    let mut refused = Vec::new();
    for index in 0..commands {
        match link.receive_entry_id() {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => refused.push((index, failure)),
            Err(failure) => return Err((failure, index, refused)),
        }
    }
    Ok(refused)
}

/// Whether a refusal blames the backend rather than the event.
pub fn is_backends(refusal: &Refusal) -> bool {
    refusal.1.class != Class::Event
}
