//! Tests whether a backend can be used, when a session asks (`outbox.test_backend`): a thread of its own, beside the
//! sender, logs in and reports.

use crate::server::questions::{Heard, SEPARATOR};
use crate::server::shmem;
use crate::server::threads::without_signals;
use crate::worker::backend::{Backend, destination_to_test};
use crate::worker::state::Worker;
use crate::worker::tested::BackendTest;
use relay::redis::probe::{self, Found};

/// How many tests run at once: each has a thread and a connection.
const MOST_TESTS: usize = 4;

impl Worker {
    /// Hears which tests are asked for. That is done before backends are loaded: whoever has changed a backend and then
    /// asks must not get an answer about the backend as it was.
    pub(super) fn hear_questions(&mut self) {
        if self.slot.take_questions() {
            self.questions.extend(std::iter::from_fn(shmem::hear_question));
        }
    }

    /// Starts tests that were asked for, and reports the results of those that have ended.
    pub(super) fn test_backends(&mut self) {
        for question in std::mem::take(&mut self.questions) {
            if let Err(error) = self.begin_test(question) {
                let error = Some(error);
                question.answer(&text_of(&Found {
                    error,
                    ..Found::default()
                }));
            }
        }
        self.tests.retain(|test| {
            let found = test.probe.found();
            found.iter().for_each(|found| test.question.answer(&text_of(found)));
            found.is_none()
        });
    }

    fn begin_test(&mut self, question: Heard) -> Result<(), String> {
        let is_it = |number: i32| number == question.backend;
        let backend = self.backends.iter().find(|b| is_it(b.number) && b.lane().is_none());
        let Some((row, own_stream)) = backend.and_then(|backend| Some((backend.row()?, backend.stream()))) else {
            return Err("the worker does not know this backend yet: commit first".to_owned());
        };
        // A template has no stream of its own: the test uses one that the template has given recently.
        let mut ones = self.backends.iter().filter(|b| is_it(b.number));
        let stream = match backend.is_some_and(Backend::has_template) {
            true => ones.find_map(Backend::named_stream),
            false => Some(own_stream.clone()),
        };
        let destination = destination_to_test(row, &self.home, stream.as_ref().unwrap_or(own_stream));
        let destination = destination.map_err(|unusable| format!("configuration: {unusable}"))?;
        if self.tests.len() >= MOST_TESTS || self.permits.free() == 0 {
            return Err("too many connections are open: try again".to_owned());
        }
        let stream = stream.map(|stream| stream.to_string());
        let (waker, permit) = (self.waker.clone(), self.permits.take());
        let probe = without_signals(|| probe::spawn(destination, stream, waker, permit));
        let probe = probe.map_err(|error| format!("could not start a thread: {error}"))?;
        self.tests.push(BackendTest { question, probe });
        Ok(())
    }
}

/// The format that `outbox.ask_worker` reads. The separator cannot occur in a server's texts: it was replaced by
/// blanks.
fn text_of(found: &Found) -> String {
    let latency = found.latency.map(|latency| latency.as_micros().to_string());
    let fields = [
        &latency,
        &found.server,
        &found.version,
        &found.role,
        &found.address,
        &found.error,
    ];
    let texts: Vec<String> = fields
        .iter()
        .map(|field| field.as_deref().unwrap_or_default().replace(SEPARATOR, " "))
        .collect();
    texts.join(&SEPARATOR.to_string())
}
