//! A model of Redis and of the connection to it.

use super::*;

#[derive(Default)]
pub(crate) struct Redis {
    pub streams: BTreeMap<Rc<str>, Vec<i64>>,
    pub held: HashSet<i64>,
    /// Keys that hold another type for now.
    pub sick: BTreeSet<Rc<str>>,
    /// An error of the whole backend, for now.
    pub trouble: Option<Failure>,
    /// Whether it refuses commands at random.
    pub fickle: f64,
    /// The streams of which it refused an event because of its content.
    pub refused: HashSet<Rc<str>>,
    /// The streams of which it refused anything.
    pub disturbed: HashSet<Rc<str>>,
}

#[derive(Clone)]
pub(crate) struct Command {
    pub seq: i64,
    pub stream: Rc<str>,
}

impl Redis {
    pub(crate) fn execute(&mut self, command: &Command, rng: &mut Rng) -> Option<Failure> {
        let refusal = if let Some(failure) = &self.trouble {
            Some(failure.clone())
        } else if self.sick.contains(&command.stream) {
            Some(wrong_type())
        } else if likely(rng, self.fickle) {
            Some(if rng.bool() { out_of_memory() } else { wrong_type() })
        } else {
            None
        };
        match &refusal {
            Some(failure) => {
                self.disturbed.insert(command.stream.clone());
                if failure.class == Class::Event {
                    self.refused.insert(command.stream.clone());
                }
            }
            None => {
                let stream = self.streams.entry(command.stream.clone()).or_default();
                stream.push(command.seq);
                self.held.insert(command.seq);
            }
        }
        refusal
    }
}

pub(crate) struct Sent {
    pub commands: Vec<Command>,
    pub replies: Vec<Option<Failure>>,
    pub read: usize,
}

impl Sent {
    pub(crate) fn refused(&self) -> Vec<Refusal> {
        let read = self.replies.iter().take(self.read).enumerate();
        read.filter_map(|(index, reply)| Some((index, reply.clone()?)))
            .collect()
    }
}

/// A sender with its connection, as `relay::sender` runs it.
#[derive(Default)]
pub(crate) struct Connection {
    pub up: bool,
    pub batches: VecDeque<Sent>,
    pub reports: VecDeque<Report>,
    pub ended: bool,
}

impl Connection {
    /// Commands that were written and not executed yet.
    pub(crate) fn unexecuted(&self) -> impl Iterator<Item = &Command> {
        let written = self.batches.iter().take(PIPELINED_BATCHES);
        written.flat_map(|sent| &sent.commands[sent.replies.len()..])
    }
}
