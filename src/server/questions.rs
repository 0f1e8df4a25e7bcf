//! Questions of sessions to the worker of their database, in shared memory: which backend to test, and the result. A
//! question has one owner at a time, which its state names; only the owner accesses the text.

use pgrx::pg_sys;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

/// How many questions can be open at once in the whole server.
pub(crate) const QUESTIONS: usize = 16;
/// Separates the fields of an answer.
pub(crate) const SEPARATOR: char = '\u{1f}';
/// Maximum length of an answer in bytes; a longer one is cut.
const ANSWER_BYTES: usize = 2_048;

/// Who owns a question. Next states in brackets.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// Nobody. [Asking]
    Free = 0,
    /// The session, which writes the question. [Asked]
    Asking = 1,
    /// The worker, which has not read it yet. [Heard, Free]
    Asked = 2,
    /// The worker, which is finding the answer. [Answering, Asked, Free]
    Heard = 3,
    /// The worker, which writes the answer. [Answered]
    Answering = 4,
    /// The session, which can read the answer. [Free]
    Answered = 5,
}

#[repr(C)]
pub(crate) struct Question {
    /// Its [`State`] in the lower bits, and above it the ticket, which counts the questions that have used this place.
    /// The ticket keeps a late answer from being taken for the answer to another question.
    word: AtomicU64,
    database: AtomicU32,
    backend: AtomicI32,
    /// The process id of the session, which may have died.
    asked_by: AtomicI32,
    length: AtomicU32,
    answer: UnsafeCell<[u8; ANSWER_BYTES]>,
}

// SAFETY: only the owner accesses the text, see the head of this file; the other fields are atomics.
unsafe impl Sync for Question {}

/// A question that the worker has heard.
#[derive(Clone, Copy)]
pub(crate) struct Heard {
    question: &'static Question,
    ticket: u64,
    pub backend: i32,
}

/// A question of this session. Dropping it withdraws the question.
pub(crate) struct Asked {
    question: &'static Question,
    ticket: u64,
}

const fn word(ticket: u64, state: State) -> u64 {
    ticket << 8 | state as u64
}

impl Question {
    fn goes(&self, from: u64, to: u64) -> bool {
        let changed = self
            .word
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
        changed.is_ok()
    }

    /// The ticket, if the question is in this state.
    fn ticket_in(&self, state: State) -> Option<u64> {
        let found = self.word.load(Ordering::Acquire);
        let ticket = found >> 8;
        (found == word(ticket, state)).then_some(ticket)
    }

    /// Frees the place if its session has died without freeing it.
    fn free_of_dead(&self) {
        let pid = self.asked_by.load(Ordering::Acquire);
        // SAFETY: checks whether a process exists; sends no signal.
        let is_dead = pid != 0 && unsafe { libc::kill(pid, 0) } != 0;
        if is_dead
            && self
                .asked_by
                .compare_exchange(pid, 0, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        {
            self.free(self.word.load(Ordering::Acquire) >> 8);
        }
    }

    /// Frees the place. Waits while the worker writes its answer, which takes microseconds.
    fn free(&self, ticket: u64) {
        while self.ticket_in(State::Answering).is_some() {
            std::hint::spin_loop();
        }
        self.word.store(word(ticket, State::Free), Ordering::Release);
    }

    /// Asks a question; `None` if no place is free.
    pub(super) fn ask(questions: &'static [Self], database: pg_sys::Oid, backend: i32) -> Option<Asked> {
        questions.iter().for_each(Self::free_of_dead);
        let (question, ticket) = questions.iter().find_map(|q| {
            let before = q.ticket_in(State::Free)?;
            let ticket = before + 1;
            let is_taken = q.goes(word(before, State::Free), word(ticket, State::Asking));
            is_taken.then_some((q, ticket))
        })?;
        question.database.store(database.to_u32(), Ordering::Release);
        question.backend.store(backend, Ordering::Release);
        question.length.store(0, Ordering::Release);
        // SAFETY: a plain read of the process's own variable.
        question.asked_by.store(unsafe { pg_sys::MyProcPid }, Ordering::Release);
        question.word.store(word(ticket, State::Asked), Ordering::Release);
        Some(Asked { question, ticket })
    }

    /// The next question to the worker of a database.
    pub(super) fn hear(questions: &'static [Self], database: pg_sys::Oid) -> Option<Heard> {
        questions.iter().find_map(|question| {
            let ticket = question.ticket_in(State::Asked)?;
            let is_its = question.database.load(Ordering::Acquire) == database.to_u32();
            let backend = question.backend.load(Ordering::Acquire);
            let is_heard = is_its && question.goes(word(ticket, State::Asked), word(ticket, State::Heard));
            is_heard.then_some(Heard {
                question,
                ticket,
                backend,
            })
        })
    }
}

impl Heard {
    /// Answers, unless the session has left.
    pub(crate) fn answer(&self, text: &str) {
        let question = self.question;
        if !question.goes(word(self.ticket, State::Heard), word(self.ticket, State::Answering)) {
            return;
        }
        let length = text.floor_char_boundary(ANSWER_BYTES);
        // SAFETY: the worker owns it in this state.
        unsafe { (&mut *question.answer.get())[..length].copy_from_slice(&text.as_bytes()[..length]) };
        question.length.store(length as u32, Ordering::Release);
        question
            .word
            .store(word(self.ticket, State::Answered), Ordering::Release);
    }
}

impl Asked {
    /// The answer, if there is one yet.
    pub(crate) fn answer(&self) -> Option<String> {
        let question = self.question;
        question.ticket_in(State::Answered).map(|_| {
            let length = (question.length.load(Ordering::Acquire) as usize).min(ANSWER_BYTES);
            // SAFETY: the session owns it in this state.
            let bytes = unsafe { &(&*question.answer.get())[..length] };
            String::from_utf8_lossy(bytes).into_owned()
        })
    }

    /// Called by the next worker: the one that had heard the question has ended.
    pub(crate) fn ask_again(&self) {
        self.question
            .goes(word(self.ticket, State::Heard), word(self.ticket, State::Asked));
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let question = self.question;
        question.asked_by.store(0, Ordering::Release);
        question.free(self.ticket);
    }
}
