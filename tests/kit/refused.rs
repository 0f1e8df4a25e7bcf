//! The error of a refused statement.

use std::fmt::Debug;

/// The parts of an ERROR that a user or a program sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Refused {
    pub code: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Refused {
    /// The error of a statement; panics if it succeeded, or failed without an answer of the server.
    #[track_caller]
    pub fn of<T: Debug>(outcome: Result<T, ::postgres::Error>) -> Self {
        let error = outcome.expect_err("it should have been refused");
        let Some(said) = error.as_db_error() else {
            panic!("no refusal by the server: {error:?}");
        };
        Refused {
            code: said.code().code().to_string(),
            message: said.message().to_string(),
            detail: said.detail().map(str::to_string),
            hint: said.hint().map(str::to_string),
        }
    }

    /// An expected error, with a detail and a hint.
    pub fn new(code: &str, message: &str, detail: &str, hint: &str) -> Self {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_string());
        Refused {
            code: code.to_string(),
            message: message.to_string(),
            detail: text(detail),
            hint: text(hint),
        }
    }
}
