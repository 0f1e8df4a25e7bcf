//! The options of a backend: columns of `outbox.backends`, with what they mean.
//!
//! The table's constraints refuse values that have no meaning here, but an administrator may have dropped them. Such a
//! value is [`Unusable`]. It must not be read as another value, which could be a weaker guarantee or another Redis.

use crate::tables::found_row::FoundRow;
use pgrx::datum::Interval;
use relay::delivery::Guarantee;
use relay::event::format::Format;
use relay::event::further_fields;
use relay::event::stream_name::StreamName;
use relay::guard::claim::OnMissing;
use relay::redis::destination::Address;
use std::fmt;
use std::time::Duration;

/// Declares options by the names of their columns. The type decides how a column is read (see [`Column`]).
macro_rules! options {
    ($(#[$doc:meta])* pub(crate) struct $name:ident { $($(#[$field_doc:meta])* pub(crate) $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        pub(crate) struct $name { $($(#[$field_doc])* pub(crate) $field: $type,)* }

        impl $name {
            pub(super) fn of(row: &FoundRow<'_>) -> Self {
                Self { $($field: Column::read(row, stringify!($field)),)* }
            }

            /// The first option that cannot be used.
            pub(crate) fn unusable(&self) -> Option<&Unusable> {
                [$(self.$field.unusable()),*].into_iter().flatten().next()
            }
        }
    };
}

options! {
    /// How the events of a backend are sent. For most options, NULL (`None`) means the setting `outbox_relay.redis_*`
    /// of that name.
    #[derive(Clone, PartialEq, Eq)]
    pub(crate) struct Options {
        pub(crate) mode: Known<Topology>,
        pub(crate) host: Option<String>,
        pub(crate) port: Known<Option<u16>>,
        pub(crate) db: Option<i32>,
        pub(crate) username: Option<String>,
        pub(crate) stream_name: Known<Option<StreamName>>,
        /// The stream of events whose rows name none; `None`: the common stream.
        pub(crate) own_stream: Option<String>,
        /// The stream of `outbox_relay.redis_stream_name`, or its last stream before it became a template.
        pub(crate) common_stream: Option<String>,
        pub(crate) max_len: Known<Option<i64>>,
        pub(crate) trim: Known<Trimming>,
        pub(crate) trim_ignore_idle: Known<Option<Silence>>,
        pub(crate) connect_timeout: Option<Duration>,
        pub(crate) socket_timeout: Option<Duration>,
        pub(crate) unix_socket: Option<String>,
        pub(crate) nodes: Known<Vec<Address>>,
        pub(crate) sentinel_master: Option<String>,
        pub(crate) password_file: Option<String>,
        pub(crate) delivery: Known<Guarantee>,
        pub(crate) on_missing_guard: Known<OnMissing>,
        pub(crate) wait_replicas: Known<u32>,
        pub(crate) max_rate: Known<Option<u32>>,
        pub(crate) format: Known<Format>,
        pub(crate) static_fields: Known<StaticFields>,
        pub(crate) include_lsn: Known<bool>,
        pub(crate) tls: Known<bool>,
        pub(crate) tls_ca_file: Option<String>,
        pub(crate) tls_cert_file: Option<String>,
        pub(crate) tls_key_file: Option<String>,
        pub(crate) tls_insecure: bool,
    }
}

/// Names and values of fields that every entry gets.
pub(crate) type StaticFields = Vec<(String, String)>;

/// How a backend's nodes are organised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Topology {
    Standalone,
    Sentinel,
    Cluster,
}

/// What decides how far streams are trimmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trimming {
    Length,
    /// Only entries that all consumer groups have acknowledged.
    Read,
}

/// How long a consumer group may be silent before it no longer holds trimming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Silence(pub(crate) Duration);

/// An option, or why it cannot be used.
pub(crate) type Known<T> = Result<T, Unusable>;

/// A column has a value that is not allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unusable {
    column: &'static str,
    /// The problem, worded to follow the column's name.
    problem: String,
}

impl Unusable {
    pub(crate) fn new(column: &'static str, problem: impl Into<String>) -> Self {
        Self {
            column,
            problem: problem.into(),
        }
    }

    pub(crate) fn null(column: &'static str) -> Self {
        Self::new(column, "is NULL")
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.column, self.problem)
    }
}

/// A type that a column of `outbox.backends` can be read as.
trait Column: Sized {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self;

    fn unusable(&self) -> Option<&Unusable> {
        None
    }
}

impl Column for Option<String> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        row.text(column)
    }
}

impl Column for Option<i32> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        row.value(column)
    }
}

/// NULL is read as false. Only for options where false is the safer value.
impl Column for bool {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        row.value(column).unwrap_or_default()
    }
}

impl Column for Known<bool> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        row.value(column).ok_or_else(|| Unusable::null(column))
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

impl Column for Option<Duration> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        const LIMITS: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(3_600));
        let micros = row.value::<Interval>(column)?.as_micros();
        let micros = u64::try_from(micros.max(0)).unwrap_or(u64::MAX);
        Some(Duration::from_micros(micros).clamp(LIMITS.0, LIMITS.1))
    }
}

impl Column for Known<u32> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        let number: i32 = row.value(column).ok_or_else(|| Unusable::null(column))?;
        number
            .try_into()
            .map_err(|_| Unusable::new(column, format!("is {number}")))
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

/// A number of at least one.
impl Column for Known<Option<u32>> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        let number = |number: i32| match number.try_into() {
            Ok(number) if number > 0 => Ok(number),
            _ => Err(Unusable::new(column, format!("is {number}"))),
        };
        row.value(column).map(number).transpose()
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

/// A port.
impl Column for Known<Option<u16>> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        let port = |port: i32| match port.try_into() {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(Unusable::new(column, format!("is {port}"))),
        };
        row.value(column).map(port).transpose()
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

/// A stream, or a template of streams.
impl Column for Known<Option<StreamName>> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        let parsed = row.text(column).map(|name| StreamName::parse(&name)).transpose();
        parsed.map_err(|fault| Unusable::new(column, fault.to_string()))
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

/// A length.
impl Column for Known<Option<i64>> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        match row.value(column) {
            Some(length) if length < 0 => Err(Unusable::new(column, format!("is {length}"))),
            length => Ok(length),
        }
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

/// A span.
impl Column for Known<Option<Silence>> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        let silence = |span: Interval| match u64::try_from(span.as_micros()) {
            Ok(micros) if micros > 0 => Ok(Silence(Duration::from_micros(micros))),
            Ok(_) => Err(Unusable::new(column, "is zero")),
            Err(_) if span.as_micros() < 0 => Err(Unusable::new(column, "is negative")),
            Err(_) => Ok(Silence(Duration::MAX)),
        };
        row.value::<Interval>(column).map(silence).transpose()
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

/// Hosts and ports.
impl Column for Known<Vec<Address>> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        let address = |node: &String| {
            let problem = || Unusable::new(column, format!("holds \"{node}\", which is not a host and a port"));
            Address::of_node(node).ok_or_else(problem)
        };
        row.texts(column).unwrap_or_default().iter().map(address).collect()
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

impl Column for Known<StaticFields> {
    fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
        let fields = row.text(column).map(|fields| further_fields(&fields, &[])).transpose();
        let fields = fields.map_err(|_| Unusable::new(column, "is not an object of strings, numbers and booleans"));
        fields.map(Option::unwrap_or_default)
    }

    fn unusable(&self) -> Option<&Unusable> {
        self.as_ref().err()
    }
}

/// An option whose value must be one of these words.
fn one_of<T: Copy>(row: &FoundRow<'_>, column: &'static str, words: &[(&str, T)]) -> Known<T> {
    let word = row.text(column).ok_or_else(|| Unusable::null(column))?;
    let found = words.iter().find(|(name, _)| *name == word);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let all: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
        Unusable::new(column, format!("is \"{word}\" but must be one of {}", all.join(", ")))
    })
}

/// Implements [`Column`] for options with fixed words.
macro_rules! words {
    ($type:ty: $words:expr) => {
        impl Column for Known<$type> {
            fn read(row: &FoundRow<'_>, column: &'static str) -> Self {
                one_of(row, column, &$words)
            }

            fn unusable(&self) -> Option<&Unusable> {
                self.as_ref().err()
            }
        }
    };
}

words!(Topology: [
    ("standalone", Topology::Standalone),
    ("sentinel", Topology::Sentinel),
    ("cluster", Topology::Cluster),
]);
words!(Guarantee: [
    ("exactly_once", Guarantee::ExactlyOnce),
    ("at_least_once", Guarantee::AtLeastOnce),
]);
words!(Trimming: [
    ("length", Trimming::Length),
    ("read", Trimming::Read),
]);
words!(OnMissing: [
    ("continue", OnMissing::Continue),
    ("halt", OnMissing::Halt),
    ("replay", OnMissing::Replay),
]);
words!(Format: Format::WORDS);
