//! Questions of sessions to the worker of their database, in shared memory: which backend to test, and what came of it.
//! A question has one owner at a time, which its state names; the owner alone touches the text.

use pgrx::pg_sys;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

/// Questions that can be open at once in the whole server.
pub(crate) const QUESTIONS: usize = 16;
/// Between the fields of an answer.
pub(crate) const SEPARATOR: char = '\u{1f}';
/// Bytes of an answer; what is longer is cut.
const ANSWER_BYTES: usize = 2_048;

/// Next states in brackets.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum State {
    /// Nobody's. [Asking]
    Free = 0,
    /// A session writes it. [Asked]
    Asking = 1,
    /// For the worker. [Heard, Free]
    Asked = 2,
    /// The worker is finding the answer. [Answering, Asked, Free]
    Heard = 3,
    /// The worker writes it. [Answered]
    Answering = 4,
    /// For the session. [Free]
    Answered = 5,
}

#[repr(C)]
pub(crate) struct Question {
    /// Its [`State`], and above that the ticket, which counts the questions that this room was used for: so a late
    /// answer is not taken for the answer to another question.
    word: AtomicU64,
    database: AtomicU32,
    backend: AtomicI32,
    /// The session, which may have died.
    asked_by: AtomicI32,
    length: AtomicU32,
    answer: UnsafeCell<[u8; ANSWER_BYTES]>,
}

// SAFETY: the text is touched by the owner alone, see the head of this file; the rest are atomics.
unsafe impl Sync for Question {}

/// A question that the worker has heard.
#[derive(Clone, Copy)]
pub(crate) struct Heard {
    question: &'static Question,
    ticket: u64,
    pub backend: i32,
}

/// A question of this session. Dropped, it is taken back.
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

    /// The ticket, if it is in this state.
    fn ticket_in(&self, state: State) -> Option<u64> {
        let found = self.word.load(Ordering::Acquire);
        let ticket = found >> 8;
        (found == word(ticket, state)).then_some(ticket)
    }

    /// Frees the room of a session that has died without a word.
    fn free_of_dead(&self) {
        let pid = self.asked_by.load(Ordering::Acquire);
        // SAFETY: asks whether a process is there; sends nothing.
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

    /// Frees it, once the worker is not writing its answer, which takes microseconds.
    fn free(&self, ticket: u64) {
        while self.ticket_in(State::Answering).is_some() {
            std::hint::spin_loop();
        }
        self.word.store(word(ticket, State::Free), Ordering::Release);
    }

    /// Asks; `None`: there is no room.
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
        let mut length = text.len().min(ANSWER_BYTES);
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        // SAFETY: the worker owns it in this state.
        unsafe { (&mut *question.answer.get())[..length].copy_from_slice(&text.as_bytes()[..length]) };
        question.length.store(length as u32, Ordering::Release);
        question
            .word
            .store(word(self.ticket, State::Answered), Ordering::Release);
    }
}

impl Asked {
    /// The answer, once it is there.
    pub(crate) fn answer(&self) -> Option<String> {
        let question = self.question;
        question.ticket_in(State::Answered).map(|_| {
            let length = (question.length.load(Ordering::Acquire) as usize).min(ANSWER_BYTES);
            // SAFETY: the session owns it in this state.
            let bytes = unsafe { &(&*question.answer.get())[..length] };
            String::from_utf8_lossy(bytes).into_owned()
        })
    }

    /// The worker that had heard it has ended: for the next one.
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
