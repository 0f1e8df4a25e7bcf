//! A sender: the thread that owns one connection of one backend, from connecting to the first error.
//!
//! It takes orders from a bounded channel, reads every reply, and reports each batch in order. With at_least_once it writes up to
//! [`PIPELINED_BATCHES`] batches ahead of their replies; with exactly_once it says what [`Conversation`] has to say. At the first error of
//! the connection it reports that and ends; the worker decides what was delivered and when to try again, with a new sender. It
//! knows nothing of Postgres.

use crate::bounds::Bounds;
use crate::classify::{Class, Failure, Trouble};
use crate::connection::Link;
use crate::conversation::{Claim, Conversation, Replicas, WAIT_PAUSE};
use crate::destination::{Address, Delivery, Destination};
use crate::fault::{self, Point};
use crate::guard::Guard;
use crate::idle::{Idle, Line};
use crate::route;
use crate::tails::Wanted;
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How many batches are in Redis's hands at once: enough that it finds the next when it has done one.
pub const PIPELINED_BATCHES: usize = 4;

/// How many batches may wait for or be with a sender.
pub const WINDOW_BATCHES: usize = 32;

/// So many reports of batches that went well are heard together,
const HEARD_TOGETHER: usize = WINDOW_BATCHES / 4;

/// as long as more batches than this wait for the sender: meanwhile the worker has no need to hurry.
const ENOUGH_ORDERS: usize = WINDOW_BATCHES / 4;

/// How long a sender that was roused stays awake: so long may the worker need until the batch is there. It gives way to whoever else
/// wants the processor.
const ROUSED_FOR: Duration = Duration::from_micros(200);

/// Room for orders beside batches.
const SPARE_ORDERS: usize = 8;

/// Commands for one write, ready as bytes.
pub struct Batch {
    pub bytes: Vec<u8>,
    /// How many commands, so how many replies.
    pub commands: usize,
}

/// What the worker tells a sender. Only batches, that one is about to come, and beats are told with at_least_once.
pub enum Order {
    /// For exactly_once it begins with MULTI and ends with the guard's HSET; `commands` are the entries alone.
    Batch(Batch),
    /// Claims the guard that was reported.
    Claim(Box<Claim>),
    /// Looks for events in their streams' tails; at least one.
    Look(Vec<Wanted>),
    /// A batch is about to come.
    Rouse,
    /// What was refused is written down: goes on.
    Resume,
    /// Refreshes the guard, and so looks whether the connection is there; `released`: for the last time.
    Beat { beat: u64, released: bool },
}

/// What became of one command of a batch.
pub type Refusal = (usize, Failure);

/// What a sender reports, in order.
pub enum Report {
    /// This is the node that it is about to connect to.
    Found(Address),
    /// Logged in; batches are welcome (at_least_once).
    Connected,
    /// Logged in; this is the guard, and a claim is waited for.
    Guard(Box<Option<Guard>>),
    /// The guard is ours.
    Claimed,
    /// Whether each event was found that was to be looked for.
    Seen(Vec<bool>),
    /// All replies of the oldest batch are there; the commands that were refused, by index. The buffer comes back. With exactly_once
    /// it waits for [`Order::Resume`] if any was refused, and drops the batches that come before that.
    Done { refused: Vec<Refusal>, buffer: Vec<u8> },
    /// Nothing of the oldest batch was appended, because these commands of it were refused. Waits for [`Order::Resume`].
    Aborted { refused: Vec<Refusal>, buffer: Vec<u8> },
    /// The oldest batch is appended, but not replicated yet; it goes on waiting.
    Behind(Failure),
    /// The guard says that its owner has left.
    Released,
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
    orders: Sender<Order>,
    reports: Receiver<Report>,
    idle: Idle,
}

impl Handle {
    /// Starts a thread that connects to `destination`. One byte is written to `waker` (non-blocking) after reports.
    /// The caller blocks all signals of its process around this call: a thread inherits the mask.
    /// `place` is dropped when the thread ends.
    pub fn spawn(destination: Destination, waker: Arc<UnixStream>, place: impl Send + 'static) -> io::Result<Self> {
        // After a refusal a second window may be handed over before the sender has dropped the first. There is always room: a batch
        // that is not taken in would be a gap.
        let (orders, to_obey) = bounded(2 * WINDOW_BATCHES + SPARE_ORDERS);
        // Two for each batch at most, one for each other order, the connection's beginning and end: a send never blocks. Nodes that
        // were found in vain come before any of these. (A worker that stood still while replicas came and went many times finds the
        // channel closed, and begins anew.)
        let (to_report, reports) = bounded(2 * WINDOW_BATCHES + SPARE_ORDERS);
        let idle = Idle::default();
        let to_idle = idle.clone();
        thread::Builder::new()
            .name(format!("sender {}", destination.client_name).chars().take(15).collect())
            .stack_size(512 * 1024)
            .spawn(move || {
                let _place = place;
                let reporter = Reporter {
                    reports: to_report,
                    waker,
                };
                run(&destination, &to_obey, &reporter, &to_idle);
            })?;
        Ok(Self { orders, reports, idle })
    }

    /// Refreshes the guard over a connection that is idle, or looks whether the connection is there (at_least_once). Without waking the
    /// sender, as long as the one before was answered as usual.
    pub fn beat(&self, beat: u64) {
        // While Redis doesn't answer, orders must not pile up and take the room of batches.
        if !self.idle.beat(beat) && self.has_begun_all() {
            let _ = self.order(Order::Beat { beat, released: false });
        }
    }

    /// Gives an order; gives it back when the channel is full or the thread has ended (its report says why).
    pub fn order(&self, order: Order) -> Result<(), Order> {
        self.orders.try_send(order).map_err(|e| match e {
            TrySendError::Full(order) | TrySendError::Disconnected(order) => order,
        })
    }

    /// Lets a sender without orders be awake when the batch comes that is about to be read.
    pub fn rouse(&self) {
        if self.has_begun_all() {
            let _ = self.order(Order::Rouse);
        }
    }

    /// Whether it has begun with every order that it was given.
    pub fn has_begun_all(&self) -> bool {
        self.orders.is_empty()
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
    waker: Arc<UnixStream>,
}

impl Reporter {
    /// False: nobody listens any more.
    fn report(&self, report: Report) -> bool {
        self.report_before(report, 0)
    }

    /// The same, while so many orders are `waiting` to be obeyed: a batch that went well need not wake the worker then.
    fn report_before(&self, report: Report, waiting: usize) -> bool {
        let is_news = !matches!(&report, Report::Done { refused, .. } if refused.is_empty());
        let heard = self.reports.try_send(report).is_ok();
        if heard && (is_news || waiting <= ENOUGH_ORDERS || self.reports.len() >= HEARD_TOGETHER) {
            // A full socket wakes the worker just as well.
            let _ = (&*self.waker).write(&[0]);
        }
        heard
    }

    fn lost(&self, failure: Failure) {
        self.report(Report::Lost {
            failure,
            accepted: 0,
            refused: Vec::new(),
        });
    }
}

impl Drop for Reporter {
    /// Also when the thread panics: the worker sees the closed channel.
    fn drop(&mut self) {
        let _ = (&*self.waker).write(&[0]);
    }
}

fn run(destination: &Destination, orders: &Receiver<Order>, reporter: &Reporter, idle: &Idle) {
    let mut found = |address: &Address| {
        reporter.report(Report::Found(address.clone()));
    };
    let link = match route::open(destination, &mut found) {
        Ok(link) => link,
        Err(failure) => return reporter.lost(failure),
    };
    match &destination.delivery {
        Delivery::AtLeastOnce { replicas } => pipeline(link, destination, *replicas, orders, reporter, idle),
        Delivery::ExactlyOnce {
            guard,
            replicas,
            ousting,
        } => {
            let conversation = Conversation::new(guard, *replicas, ousting.as_deref());
            let line = Line::of(link, Some(conversation));
            if let Err(failure) = converse(line, orders, reporter, idle) {
                reporter.lost(route::heard(destination, failure));
            }
        }
    }
}

/// Waits for an order: asleep or, once roused, awake, since to be woken takes as long as to read and append an event.
fn next_order(orders: &Receiver<Order>) -> Result<Order, TryRecvError> {
    loop {
        let order = orders.recv().map_err(|_| TryRecvError::Disconnected)?;
        if !matches!(order, Order::Rouse) {
            return Ok(order);
        }
        let roused_at = Instant::now();
        while roused_at.elapsed() < ROUSED_FOR {
            match orders.try_recv() {
                Err(TryRecvError::Empty) => thread::yield_now(),
                Ok(Order::Rouse) => {}
                order => return order,
            }
        }
    }
}

/// Speaks for a conversation until the connection ends, or nobody listens any more.
fn converse(mut line: Box<Line>, orders: &Receiver<Order>, reporter: &Reporter, idle: &Idle) -> Result<(), Failure> {
    let mut reports = Vec::new();
    loop {
        let mut next = None;
        if line.is_idle() {
            let (back, order) = idle.keep(line, || next_order(orders))?;
            (line, next) = (back, Some(order));
            line.take_in_answers()?;
        }
        let Some((link, conversation)) = line.conversation() else {
            return Ok(());
        };
        while next.is_some() || conversation.wants_order() {
            match next.take().unwrap_or_else(|| orders.try_recv()) {
                Ok(order) => conversation.order(order),
                Err(TryRecvError::Empty) => break,
                // It was let go, but is to say so to those who watch the guard.
                Err(TryRecvError::Disconnected) if conversation.is_releasing() => break,
                // What is on its way will be found out by whoever claims next.
                Err(TryRecvError::Disconnected) => return Ok(()),
            }
        }
        if conversation.waits_again() {
            thread::sleep(WAIT_PAUSE);
        }
        if !conversation.output().is_empty() {
            if let Err(failure) = link.send(conversation.output()) {
                return Err(last_words(link, conversation, reporter, failure));
            }
            conversation.output().clear();
            if conversation.is_busy() {
                fault::reach(Point::AfterWrite);
            }
        }
        if conversation.awaits_reply() {
            let bounds = conversation.bounds();
            let outcome = match link.receive(&bounds) {
                Ok(reply) => conversation.reply(reply, &mut reports),
                Err(failure) => Err(conversation.unreadable(failure)),
            };
            for report in reports.drain(..) {
                if !reporter.report_before(report, orders.len()) {
                    return Ok(());
                }
            }
            outcome?;
        }
    }
}

/// Takes in what the server had said before it closed the connection in the middle of a write, such as that an entry is too large for it.
fn last_words(link: &mut Link, conversation: &mut Conversation, reporter: &Reporter, failure: Failure) -> Failure {
    let mut reports = Vec::new();
    while failure.trouble == Trouble::Closed && conversation.awaits_reply() {
        let Ok(reply) = link.receive(&conversation.bounds()) else {
            break;
        };
        let outcome = conversation.reply(reply, &mut reports);
        reports.drain(..).all(|report| reporter.report(report));
        if let Err(said) = outcome {
            return said;
        }
    }
    failure
}

/// Sends batches as they come, some ahead of their replies (at_least_once).
fn pipeline(
    link: Link,
    destination: &Destination,
    replicas: Option<Replicas>,
    orders: &Receiver<Order>,
    reporter: &Reporter,
    idle: &Idle,
) {
    if !reporter.report(Report::Connected) {
        return;
    }
    let mut line = Line::of(link, None);
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
                    match line.link().send(&batch.bytes) {
                        Err(failure) if failure.trouble != Trouble::Closed => return reporter.lost(failure),
                        sent => closed = sent.err(),
                    }
                    unanswered.push_back(batch);
                }
                // Nothing is asked of Redis: only whether the connection is still there.
                Some(Order::Beat { .. }) if unanswered.is_empty() => {
                    if let Err(failure) = line.link().look() {
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
        let report = match answers(line.link(), batch.commands) {
            Ok(refused) => Report::Done {
                refused: refused
                    .into_iter()
                    .map(|(index, failure)| (index, route::heard(destination, failure)))
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
            && let Err(failure) = replicate(line.link(), replicas, reporter)
        {
            return reporter.lost(failure);
        }
        if !reporter.report_before(report, orders.len() + unanswered.len()) {
            return;
        }
    }
}

/// Waits until enough replicas have all that was written.
fn replicate(link: &mut Link, replicas: Replicas, reporter: &Reporter) -> Result<(), Failure> {
    let mut told = None;
    loop {
        let mut wait = Vec::new();
        replicas.append_wait(&mut wait);
        link.send(&wait)?;
        let Err(failure) = replicas.judge(&link.receive(&Bounds::line("WAIT"))?.value()?)? else {
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
