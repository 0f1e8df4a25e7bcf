//! The sender and Redis, and their faults.

use super::*;

impl World {
    pub(crate) fn execute(&mut self) -> bool {
        let old_first = self.rng.bool();
        (old_first && self.execute_old()) || self.execute_new() || self.execute_old()
    }

    pub(crate) fn execute_old(&mut self) -> bool {
        self.leftovers.retain(|written| !written.is_empty());
        if self.leftovers.is_empty() {
            return false;
        }
        let index = self.rng.usize(..self.leftovers.len());
        if let Some(command) = self.leftovers[index].pop_front() {
            self.redis.execute(&command, &mut self.rng);
        }
        true
    }

    pub(crate) fn execute_new(&mut self) -> bool {
        let Some(connection) = self.connection.as_mut().filter(|c| c.up && !c.ended) else {
            return false;
        };
        let mut written = connection.batches.iter_mut().take(PIPELINED_BATCHES);
        let Some(sent) = written.find(|sent| sent.replies.len() < sent.commands.len()) else {
            return false;
        };
        let reply = self.redis.execute(&sent.commands[sent.replies.len()], &mut self.rng);
        sent.replies.push(reply);
        true
    }

    pub(crate) fn read_reply(&mut self) -> bool {
        let Some(connection) = self.connection.as_mut().filter(|c| !c.ended) else {
            return false;
        };
        let Some(sent) = connection.batches.front_mut().filter(|s| s.read < s.replies.len()) else {
            return false;
        };
        sent.read += 1;
        if sent.read == sent.commands.len() {
            let refused = sent.refused();
            connection.batches.pop_front();
            connection.reports.push_back(Report::Done {
                refused,
                buffer: Vec::new(),
            });
        }
        true
    }

    pub(crate) fn connect(&mut self, succeeds: bool) -> bool {
        let Some(connection) = self.connection.as_mut().filter(|c| !c.up && !c.ended) else {
            return false;
        };
        if succeeds {
            connection.up = true;
            connection.reports.push_back(Report::Connected);
        } else {
            connection.ended = true;
            connection.reports.push_back(Report::Lost {
                failure: match self.rng.bool() {
                    true => Failure::backend("connection refused"),
                    false => Failure::configuration("NOAUTH Authentication required."),
                },
                accepted: 0,
                refused: Vec::new(),
            });
        }
        true
    }

    pub(crate) fn lose_connection(&mut self) {
        let Some(connection) = self.connection.as_mut().filter(|c| c.up && !c.ended) else {
            return;
        };
        let (accepted, refused) = connection
            .batches
            .front()
            .map_or((0, Vec::new()), |s| (s.read, s.refused()));
        connection.reports.push_back(Report::Lost {
            failure: Failure::backend("connection reset by peer"),
            accepted,
            refused,
        });
        self.leave_over();
        if let Some(connection) = &mut self.connection {
            connection.ended = true;
            connection.batches.clear();
        }
    }

    /// All or some of the written commands may be executed later.
    pub(crate) fn leave_over(&mut self) {
        if let Some(connection) = &self.connection {
            let mut written: VecDeque<Command> = connection.unexecuted().cloned().collect();
            written.truncate(self.rng.usize(..=written.len()));
            self.leftovers.push(written);
        }
    }

    pub(crate) fn drop_connection(&mut self) {
        self.leave_over();
        self.connection = None;
    }

    pub(crate) fn change_health(&mut self) {
        if self.likely(self.faults.trouble) {
            self.redis.trouble = match self.redis.trouble {
                Some(_) if self.faults.tidy && self.on_their_way().next().is_some() => return,
                Some(_) => None,
                None => Some(out_of_memory()),
            };
        }
        if self.likely(self.faults.sick) {
            let stream = name(self.rng.u8(..STREAMS));
            if self.redis.sick.contains(&stream) {
                let disturbs = self.on_their_way().any(|other| other == stream);
                if !(self.faults.tidy && disturbs) {
                    self.redis.sick.remove(&stream);
                }
            } else {
                self.redis.sick.insert(stream);
            }
        }
    }

    /// The streams of all events whose result the worker does not know, or that are still to be executed.
    pub(crate) fn on_their_way(&self) -> impl Iterator<Item = Rc<str>> {
        let in_flight = self.in_flight.iter().flat_map(|(seqs, _)| seqs);
        let in_flight = in_flight.map(|seq| name(self.database.row(*seq).stream));
        let leftovers = self.leftovers.iter().flatten().map(|command| command.stream.clone());
        in_flight.chain(leftovers)
    }
}
