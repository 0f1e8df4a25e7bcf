//! The reasons for refusing an event, with SQLSTATE and message.

use crate::server::encoding::NoUtf8Form;
use crate::server::error::raise;
use pgrx::PgSqlErrorCode;
use pgrx::pg_sys::panic::ErrorReport;
use relay::delivery::refusal::MOST_ATTEMPTS;
use relay::event::ConfigError;
use relay::event::routes::Route;
use relay::event::stream_name::{Fault, Field, NAME_LIMIT, RESERVED, StreamName};
use thiserror::Error;

/// Why an event is refused, in the publisher's transaction.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum PublishError {
    #[error("{0} must not be null or empty")]
    Missing(&'static str),
    /// A user's trigger has set it: publishers who pass '' mean NULL.
    #[error("stream must not be empty")]
    EmptyStream,
    #[error("{field} is too long")]
    TooLong {
        field: &'static str,
        length: usize,
        limit: usize,
    },
    #[error("max_retries must not be negative")]
    NegativeRetries(String),
    #[error("max_retries is too high")]
    ManyRetries(String),
    #[error("max_retries must be a whole number")]
    BadRetries(String),
    #[error("scheduled_at must be a finite time")]
    EndlessSchedule,
    #[error("backend \"{0}\" does not exist")]
    UnknownBackend(String),
    #[error("backend \"{backend}\" does not allow the stream \"{stream}\"")]
    StreamNotAllowed { backend: String, stream: String },
    #[error("event has no {field}, which the stream of backend \"{backend}\" is named after")]
    LacksPartOfStream { backend: String, field: Field },
    #[error("event would go into a stream of backend \"{backend}\" with too long a name")]
    LongStream { backend: String, length: usize },
    /// Possible only where a trigger was switched off, or with the settings at the server's start.
    #[error("stream_name of backend \"{backend}\" {fault}")]
    UnusableStreamName { backend: String, fault: Fault },
    #[error("permission denied to publish to backend \"{backend}\"")]
    BackendBeyondLimit { backend: String, allowed: String },
    #[error("permission denied to publish to stream \"{stream}\" of backend \"{backend}\"")]
    StreamBeyondLimit {
        backend: String,
        stream: String,
        allowed: String,
    },
    #[error("{error}")]
    ByRoute {
        route: i32,
        is_template: bool,
        error: Box<Self>,
    },
    #[error("more than {0} routes send the event to as many streams")]
    TooManyRoutes(usize),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("data and {0} exclude each other")]
    TwoPayloads(&'static str),
    #[error("event is too large")]
    TooLarge { size: usize, limit: usize },
    #[error("a trigger has changed a row of outbox.events that only complete_event may fill in")]
    Changed,
    #[error("{field} has no UTF-8 form")]
    NoUtf8Form { field: &'static str, why: NoUtf8Form },
    #[error("an argument of type bytea is not text")]
    NotText,
    #[error("publish_events expects a JSON array of objects")]
    NotAnArray { is_encoded_twice: bool },
    #[error("invalid event in publish_events: {message}")]
    BadItem { index: usize, message: String },
}

impl PublishError {
    /// The same refusal, for a backend that a route has chosen.
    pub(super) fn by_route(self, route: &Route) -> Self {
        match self {
            Self::UnknownBackend(_) => self,
            error => Self::ByRoute {
                route: route.number,
                is_template: matches!(route.stream, Some(Ok(StreamName::Template(_)))),
                error: Box::new(error),
            },
        }
    }

    fn code(&self) -> PgSqlErrorCode {
        use PgSqlErrorCode::*;
        match self {
            Self::UnknownBackend(_) => ERRCODE_UNDEFINED_OBJECT,
            Self::StreamNotAllowed { .. } | Self::BackendBeyondLimit { .. } | Self::StreamBeyondLimit { .. } => {
                ERRCODE_INSUFFICIENT_PRIVILEGE
            }
            Self::ByRoute { error, .. } => error.code(),
            Self::TooLarge { .. } | Self::TooManyRoutes(_) => ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            Self::UnusableStreamName { .. } => ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            Self::Changed => ERRCODE_TRIGGERED_DATA_CHANGE_VIOLATION,
            Self::NoUtf8Form { why, .. } => why.code(),
            Self::NotText => ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
            Self::Config(ConfigError::TooManyDigits) => ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            // The SQLSTATE that jsonb uses for this.
            Self::Config(ConfigError::OutOfRange(_)) => ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE,
            Self::Missing(_)
            | Self::EmptyStream
            | Self::TooLong { .. }
            | Self::NegativeRetries(_)
            | Self::ManyRetries(_)
            | Self::BadRetries(_)
            | Self::EndlessSchedule
            | Self::LacksPartOfStream { .. }
            | Self::LongStream { .. }
            | Self::Config(_)
            | Self::TwoPayloads(_)
            | Self::NotAnArray { .. }
            | Self::BadItem { .. } => ERRCODE_INVALID_PARAMETER_VALUE,
        }
    }

    fn detail(&self) -> String {
        match self {
            Self::Missing(_) => "Every event has a type and a source.".into(),
            Self::EmptyStream => "Every stream has a name.".into(),
            Self::TooLong { length, limit, .. } => format!("It has {length} characters; at most {limit} are allowed."),
            Self::NegativeRetries(n) | Self::BadRetries(n) => format!("It is {n}."),
            Self::ManyRetries(n) => format!("It is {n}; at most {MOST_ATTEMPTS} are allowed."),
            Self::EndlessSchedule => "An event that is scheduled for infinity would never be sent.".into(),
            Self::UnknownBackend(_) => "Backends are the rows of outbox.backends.".into(),
            Self::StreamNotAllowed { stream, .. } if stream.starts_with(RESERVED) => {
                format!("Names that begin with {} are reserved for guards.", RESERVED)
            }
            Self::StreamNotAllowed { .. } => "No pattern in the backend's allowed_streams matches.".into(),
            Self::LacksPartOfStream { field, .. } => {
                format!("The backend's stream_name is a template with the placeholder {{{field}}}.")
            }
            Self::LongStream { length, .. } => {
                format!(
                    "The backend's stream_name is a template. The name has {length} characters; at most {NAME_LIMIT} are allowed."
                )
            }
            Self::UnusableStreamName { fault, .. } => fault.detail().into(),
            Self::BackendBeyondLimit { allowed, .. } => {
                format!("The current role may publish to these backends: {allowed}.")
            }
            Self::StreamBeyondLimit { allowed, .. } => {
                format!("The current role may publish to these streams of that backend: {allowed}.")
            }
            Self::ByRoute {
                route,
                is_template: true,
                error,
            } if matches!(**error, Self::LacksPartOfStream { .. } | Self::LongStream { .. }) => {
                format!(
                    "The stream of route {route} of outbox.routes is a template, and the event takes it because it names no backend."
                )
            }
            Self::ByRoute { route, error, .. } => format!(
                "{} It goes there by route {route} of outbox.routes, because it names no backend.",
                error.detail()
            ),
            Self::TooManyRoutes(limit) => format!("At most {limit} are allowed."),
            Self::Config(ConfigError::EncodedTwice) => {
                "It is a JSON string that holds an object: it was encoded twice.".into()
            }
            Self::Config(_) => "Its keys and values become further fields of the stream entry.".into(),
            Self::TwoPayloads(_) => "An event has one payload: JSON, or bytes.".into(),
            Self::TooLarge { size, limit } => format!("It has {size} bytes; at most {limit} are allowed."),
            Self::Changed => "The relay relies on seq, xid, backend_number and event_id of each row.".into(),
            Self::NoUtf8Form { why, .. } => why.detail(),
            Self::NotText => "It must be JSON, or a value of that argument, in the encoding of the database.".into(),
            Self::NotAnArray { is_encoded_twice: true } => {
                "It is a JSON string that holds JSON: it was encoded twice, by the application and by its driver."
                    .into()
            }
            Self::NotAnArray { .. } => "Each object has the keys of outbox.publish_event.".into(),
            Self::BadItem { index, .. } => format!("It is element {index} of the array, counted from 0."),
        }
    }

    fn hint(&self) -> &'static str {
        match self {
            Self::Missing(_) => "Pass a text of 1 to 255 characters.",
            Self::EmptyStream => "Pass a name, or NULL for the backend's own stream.",
            Self::TooLong { .. } => "Put longer texts into data.",
            Self::NegativeRetries(_) | Self::ManyRetries(_) | Self::BadRetries(_) => {
                "Pass the total number of attempts, or NULL for outbox_relay.max_retries."
            }
            Self::EndlessSchedule => "Pass a time, or NULL to send at once.",
            Self::UnknownBackend(_) => "Check the name, or outbox_relay.default_backend if none was given.",
            Self::StreamNotAllowed { stream, .. } if stream.starts_with(RESERVED) => "Choose another name.",
            Self::StreamNotAllowed { .. } => "Ask the administrator to extend allowed_streams.",
            Self::LacksPartOfStream { .. } => "Pass it, or name a stream.",
            Self::LongStream { .. } => {
                "Pass a shorter subject, name a stream, or have the template hash the value, as {subject|16} does."
            }
            Self::UnusableStreamName { .. } => {
                "Name a stream, or have the administrator correct outbox.backends.stream_name or outbox_relay.redis_stream_name."
            }
            Self::BackendBeyondLimit { .. } | Self::StreamBeyondLimit { .. } => {
                "Ask the administrator to allow more with outbox.grant_publisher()."
            }
            Self::ByRoute { error, .. } => error.hint(),
            Self::TooManyRoutes(_) => "Ask the administrator to narrow the patterns in outbox.routes.",
            Self::Config(ConfigError::OutOfRange(_) | ConfigError::TooManyDigits) => "Pass it as a string.",
            Self::Config(_) => "Pass a flat JSON object such as {\"priority\": 1}.",
            Self::TwoPayloads(_) => "Omit one of them, or pass NULL for it.",
            Self::TooLarge { .. } => {
                "Put large payloads elsewhere and publish a reference, or raise outbox_relay.max_event_size."
            }
            Self::Changed => {
                "Do not change these columns in a trigger. To replace an event, return NULL and publish another one."
            }
            Self::NoUtf8Form { .. } => "Events are sent as UTF-8. Replace the character, or pass bytes as data_bytes.",
            Self::NotText => "Pass a payload that is bytes as data_bytes.",
            Self::NotAnArray { is_encoded_twice: true } => "Pass the list itself, or its text as text.",
            Self::NotAnArray { .. } => {
                "Pass for example [{\"event_type\": \"user.created\", \"source\": \"user-service\"}]."
            }
            Self::BadItem { .. } => {
                "The keys are event_type, source, data, subject, backend, scheduled_at, max_retries, publisher_config, stream, \
                 data_schema, event_id and data_base64, with values as outbox.publish_event takes them."
            }
        }
    }

    /// Message and DETAIL without the HINT.
    pub(super) fn in_one_line(&self) -> String {
        format!("{self}. {}", self.detail())
    }

    /// Raises it as an ERROR.
    pub(super) fn raise(self) -> ! {
        raise(
            ErrorReport::new(self.code(), self.to_string(), "")
                .set_detail(self.detail())
                .set_hint(self.hint()),
        )
    }
}
