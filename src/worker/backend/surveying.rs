//! The consumer groups of a backend: when Redis is asked about them, and how the answers are used. See
//! [`relay::consumers`].

use crate::server::guc::LogLevel;
use crate::server::process::log;
use crate::tables::options::Trimming;
use crate::worker::backend::Backend;
use crate::worker::backend::settings;
use crate::worker::backend::surveyed::LastSurvey;
use relay::consumers::group::Surveyed;
use relay::consumers::readership::{Interest, LeftOut, Policy, Readership};
use relay::delivery::batch::{BuiltBatch, OpenBatch};
use relay::delivery::flight::Contents;
use relay::failure::{Failure, Trouble};
use relay::sender::orders::Order;
use relay::sender::survey::{Besides, Survey};
use relay::time::Now;
use std::rc::Rc;

impl Backend {
    /// The policy of trimming by what was read; `None`: streams are trimmed by length.
    fn trim_policy(&self) -> Option<Policy> {
        let row = self.row().filter(|_| self.reads_for_redis())?;
        match row.options.trim {
            Ok(Trimming::Read) => Some(Policy {
                max_len: settings::max_len(Some(&row.options)),
                silence: row.options.trim_ignore_idle.clone().ok()?.map(|silence| silence.0),
            }),
            _ => None,
        }
    }

    /// Starts or stops watching the streams, depending on the settings and on who wants to know. True:
    /// [`Self::watch_streams`] must be called with the streams known before.
    pub(crate) fn watch(&mut self, interest: Interest) -> bool {
        let policy = self.trim_policy();
        if policy.is_none() && (interest == Interest::Nobody || !self.reads_for_redis()) {
            if self.delivery.readership().is_some() {
                self.delivery.set_readership(None);
                self.last_survey = LastSurvey::default();
            }
            return false;
        }
        let has_own = !self.has_template();
        let own_stream = Some(self.stream().clone()).filter(|stream| has_own && self.serves(stream));
        match self.delivery.readership_mut() {
            Some(readership) => {
                readership.follow(policy, own_stream.as_ref());
            }
            None => self.delivery.set_readership(Some(Readership::new(policy, own_stream))),
        }
        !self.last_survey.knows_streams
    }

    /// Adds streams that were known before.
    pub(crate) fn watch_streams(&mut self, streams: Vec<String>) {
        let mut all: Vec<Rc<str>> = streams.into_iter().map(Rc::from).collect();
        all.extend(self.entries.named_streams());
        self.last_survey.knows_streams = true;
        all.retain(|stream| self.serves(stream));
        if let Some(readership) = self.delivery.readership_mut() {
            all.iter().for_each(|stream| readership.knows(stream));
        }
    }

    /// When to ask Redis; `None`: not now.
    pub(crate) fn survey_at(&self, interest: Interest) -> Option<Now> {
        let readership = self.delivery.readership()?;
        let may_ask = self.has_sender() && self.delivery.is_up() && !self.delivery.is_stopped();
        let is_of_use = self.is_enabled() || interest != Interest::Nobody;
        readership.due_at(interest).filter(|_| may_ask && is_of_use)
    }

    /// Asks Redis. If no batch is in flight, an empty batch first moves the guard on, so that the entries of the last
    /// batch can be trimmed. `wal`: how far the WAL is flushed.
    pub(crate) fn ask_consumers(&mut self, interest: Interest, wal: u64, now: Now) {
        let mut last = self.delivery.number();
        let trims = self.is_enabled() && !self.is_withheld();
        let waits = self.delivery.readership().is_some_and(|r| r.waits_for_batch(last));
        let is_clean = self.books.records.is_empty() && !self.books.is_unflushed;
        if trims && waits && is_clean && self.is_exactly_once() && self.delivery.may_send_empty() {
            let batch = OpenBatch::new(self.buffer());
            let end = self.delivery.position().clone();
            let contents = Contents::Rows { end };
            self.send(vec![BuiltBatch { batch, contents }], wal);
            last = self.delivery.next_number();
        }
        let last = self.is_exactly_once().then_some(last);
        let Some(readership) = self.delivery.readership_mut() else {
            return;
        };
        let besides = Besides {
            last: readership.policy().is_some(),
            idle: readership.policy().is_some_and(|policy| policy.silence.is_some()),
        };
        let (number, questions) = readership.ask(now, last, trims, interest);
        if questions.is_empty() {
            return readership.interrupt();
        }
        self.order(Order::Survey(Box::new(Survey::new(number, questions, besides))));
    }

    /// When to say that a survey takes long, if the backend waits for it.
    pub(super) fn survey_slow_at(&self) -> Option<Now> {
        let readership = self.delivery.readership().filter(|_| self.delivery.is_up())?;
        readership.slow_at(self.duty.connection()?.slow_after()?)
    }

    /// Says it, if it is time. Returns whether it was.
    pub(super) fn says_that_survey_is_slow(&mut self, now: Now) -> bool {
        if self.survey_slow_at().is_none_or(|at| now < at) {
            return false;
        }
        let failure = Failure::of(
            Trouble::TimedOut,
            "it answers, but has not told of consumer groups within twice its timeouts",
        );
        if let Some(readership) = self.delivery.readership_mut() {
            readership.is_slow(failure);
        }
        self.books.change(now);
        true
    }

    /// Processes the answers of a survey.
    pub(super) fn take_survey(&mut self, number: u64, found: Vec<Surveyed>, now: Now) {
        let last = self.delivery.number();
        let before = self.delivery.trouble().cloned();
        let Some(readership) = self.delivery.readership_mut() else {
            return;
        };
        let Some(left_out) = readership.surveyed(number, &found, last, now) else {
            return;
        };
        if self.delivery.has_answered() {
            self.note_recovery(now);
        }
        if self.delivery.trouble() != before.as_ref() {
            self.books.change(now);
        }
        self.log_left_out(left_out, now);
        self.last_survey.found(found);
    }

    /// Forgets what was asked on a connection that is lost.
    pub(super) fn forget_survey(&mut self) {
        if let Some(readership) = self.delivery.readership_mut() {
            readership.disconnected();
        }
    }

    /// What has to be saved of the last survey.
    pub(crate) fn unsaved_consumers(&self, interest: Interest, now: Now) -> Option<&[Surveyed]> {
        self.last_survey.unsaved(interest, now)
    }

    /// Called when that is saved.
    pub(crate) fn saved_consumers(&mut self, now: Now) {
        self.last_survey.is_saved(now);
    }

    fn log_left_out(&mut self, left_out: Vec<LeftOut>, now: Now) {
        for LeftOut { stream, group, silent } in left_out {
            if !self.last_survey.is_news(&stream, &group, now) || !self.takes_line(now) {
                continue;
            }
            let name = self.name();
            log(
                LogLevel::Warning,
                &format!("backend \"{name}\" trims stream \"{stream}\" regardless of consumer group \"{group}\""),
                Some(&format!(
                    "The group has been silent for {} seconds, which is longer than trim_ignore_idle.",
                    silent.as_secs()
                )),
                Some(
                    "Entries that it has not acknowledged are trimmed. Start its consumers, or delete the group with XGROUP DESTROY.",
                ),
            );
        }
    }
}
