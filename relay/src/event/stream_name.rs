//! The stream of events that name none: a name, or a template of names such as `orders.{event_type}`.
//!
//! A template is text with placeholders: `{event_type}`, `{source}`, `{subject}`, `{database}`. With a number of
//! streams, as in `{subject|16}`, a placeholder stands for the [`part_of`] the value, from 0 on. `{{` and `}}` are
//! literal braces. Other programs compute the same parts, so [`part_of`] must never change.

use std::fmt;
use std::num::NonZeroU32;

/// Keys of guards begin with this. No stream may have such a name.
pub const RESERVED: &str = "outbox_relay:";
/// How many characters a stream's name or a template may have.
pub const NAME_LIMIT: usize = 1_024;
/// How many streams a value may be spread over.
pub const MOST_PARTS: u32 = 65_536;

const PLACEHOLDERS: [(&str, Field); 4] = [
    ("event_type", Field::EventType),
    ("source", Field::Source),
    ("subject", Field::Subject),
    ("database", Field::Database),
];

/// What a template takes from an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    EventType,
    Source,
    Subject,
    Database,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = PLACEHOLDERS.iter().find(|(_, field)| field == self);
        f.write_str(found.map_or("", |(name, _)| name))
    }
}

/// `stream_name`, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamName {
    /// One stream. Its braces are no longer doubled.
    Plain(String),
    /// A stream for each event.
    Template(Template),
}

/// A text with at least one placeholder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Value { field: Field, parts: Option<NonZeroU32> },
}

/// The values of the placeholders.
#[derive(Clone, Copy, Debug, Default)]
pub struct Values<'a> {
    pub event_type: &'a str,
    pub source: &'a str,
    pub subject: Option<&'a str>,
    pub database: &'a str,
}

/// Why a text is not a valid template, worded to follow the name of its setting or column.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fault {
    #[error("has the unknown placeholder \"{{{0}}}\"")]
    Unknown(String),
    #[error("has an unclosed \"{{\"")]
    NotClosed,
    #[error("has an unmatched \"}}\"")]
    NotOpened,
    #[error("has the placeholder \"{{{0}}}\", whose number of streams is not between 1 and 65536")]
    Parts(String),
    #[error("is too long: it has {0} characters, but at most 1024 are allowed")]
    TooLong(usize),
    #[error("begins with \"{RESERVED}\"")]
    Reserved,
}

impl Fault {
    pub fn detail(&self) -> &'static str {
        match self {
            Self::Reserved => "Such names are those of guards.",
            _ => {
                "Placeholders are {event_type}, {source}, {subject} and {database}; with a number, as in {subject|16}, a \
                hash of the value from 0 to 15."
            }
        }
    }

    pub fn hint(&self) -> &'static str {
        match self {
            Self::Reserved => "Choose another name.",
            _ => "Correct the placeholder, or write {{ and }} for literal braces.",
        }
    }
}

/// The event lacks this value, which its stream's name needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lacking(pub Field);

impl StreamName {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        // A character has at least one byte, so a short enough text need not be counted.
        if text.len() > NAME_LIMIT {
            let length = text.chars().count();
            if length > NAME_LIMIT {
                return Err(Fault::TooLong(length));
            }
        }
        if text.starts_with(RESERVED) {
            return Err(Fault::Reserved);
        }
        let (mut pieces, mut literal, mut rest) = (Vec::new(), String::new(), text);
        while let Some(at) = rest.find(['{', '}']) {
            let (before, brace) = rest.split_at(at);
            literal.push_str(before);
            rest = &brace[1..];
            if rest.as_bytes().first() == brace.as_bytes().first() {
                literal.push_str(&brace[..1]);
                rest = &rest[1..];
                continue;
            }
            if brace.starts_with('}') {
                return Err(Fault::NotOpened);
            }
            let placeholder = rest.find(['{', '}']).filter(|end| rest[*end..].starts_with('}'));
            let Some(end) = placeholder else {
                return Err(Fault::NotClosed);
            };
            if !literal.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut literal)));
            }
            pieces.push(Piece::of(&rest[..end])?);
            rest = &rest[end + 1..];
        }
        literal.push_str(rest);
        if pieces.is_empty() {
            return Ok(Self::Plain(literal));
        }
        if !literal.is_empty() {
            pieces.push(Piece::Text(literal));
        }
        Ok(Self::Template(Template { pieces }))
    }

    /// The name, unless it is a template.
    pub fn plain(&self) -> Option<&str> {
        match self {
            Self::Plain(name) => Some(name),
            Self::Template(_) => None,
        }
    }
}

impl Piece {
    /// A placeholder from the text between its braces.
    fn of(placeholder: &str) -> Result<Self, Fault> {
        let (name, number) = match placeholder.split_once('|') {
            Some((name, number)) => (name, Some(number)),
            None => (placeholder, None),
        };
        let known = PLACEHOLDERS.iter().find(|(known, _)| *known == name);
        let Some((_, field)) = known else {
            return Err(Fault::Unknown(placeholder.to_owned()));
        };
        let parts = number.map(|number| parts_of(number).ok_or_else(|| Fault::Parts(placeholder.to_owned())));
        Ok(Self::Value {
            field: *field,
            parts: parts.transpose()?,
        })
    }
}

/// A number of streams, which must be written without sign or leading zeros.
fn parts_of(number: &str) -> Option<NonZeroU32> {
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
    let parts = number.parse::<NonZeroU32>().ok().filter(|_| is_plain)?;
    (parts.get() <= MOST_PARTS).then_some(parts)
}

impl Template {
    /// The stream of an event.
    pub fn resolve(&self, values: &Values<'_>) -> Result<String, Lacking> {
        let mut name = String::with_capacity(64);
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => name.push_str(text),
                Piece::Value { field, parts } => {
                    let value = match field {
                        Field::EventType => Some(values.event_type),
                        Field::Source => Some(values.source),
                        Field::Subject => values.subject,
                        Field::Database => Some(values.database),
                    };
                    // All events without a value would share one stream, although they have nothing in common.
                    let value = value.filter(|value| !value.is_empty()).ok_or(Lacking(*field))?;
                    match parts {
                        None => name.push_str(value),
                        Some(parts) => name.push_str(itoa::Buffer::new().format(part_of(value, *parts))),
                    }
                }
            }
        }
        Ok(name)
    }
}

/// To which of `parts` parts a value belongs: the CRC-32 of its UTF-8 bytes (as in zlib, gzip and PNG; available in
/// every language), modulo the number of parts.
pub fn part_of(value: &str, parts: NonZeroU32) -> u32 {
    crc32(value.as_bytes()) % parts
}

const REMAINDERS: [u32; 256] = remainders();

/// Source: ISO 3309, as in RFC 1952, section 8: polynomial 0xEDB88320 (reflected).
const fn remainders() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut remainder, mut bit) = (byte as u32, 0);
        while bit < 8 {
            remainder = match remainder & 1 {
                0 => remainder >> 1,
                _ => (remainder >> 1) ^ 0xEDB8_8320,
            };
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| (crc >> 8) ^ REMAINDERS[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENT: Values<'_> = Values {
        event_type: "order.placed",
        source: "shop",
        subject: Some("4711"),
        database: "app",
    };

    fn resolved(template: &str, values: &Values<'_>) -> Result<String, Lacking> {
        match StreamName::parse(template).unwrap() {
            StreamName::Plain(name) => panic!("{template} is the plain name {name}"),
            StreamName::Template(template) => template.resolve(values),
        }
    }

    fn fault(text: &str) -> Fault {
        StreamName::parse(text).unwrap_err()
    }

    /// These values are documented in docs/backends.md: never change them.
    #[test]
    fn parts_are_as_documented() {
        for (value, parts, part) in [
            ("123456789", 65_536, 14_630),
            ("4711", 16, 7),
            ("order-1", 16, 15),
            ("0b0e63a2-9a3c-4f2e-8a57-6a1f1f0f2b11", 16, 9),
            ("Zürich", 16, 14),
            ("a", 3, 0),
            ("4711", 1, 0),
        ] {
            let found = part_of(value, NonZeroU32::new(parts).unwrap());
            assert_eq!(found, part, "{value} of {parts}");
        }
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926, "the check value of CRC-32");
        assert_eq!(crc32(b""), 0);
    }

    #[test]
    fn placeholders_are_replaced_by_the_events_values() {
        for (template, name) in [
            ("orders.{event_type}", "orders.order.placed"),
            ("{source}", "shop"),
            ("{subject}", "4711"),
            ("s{subject|16}", "s7"),
            ("{database}:{source}:{event_type}", "app:shop:order.placed"),
            ("{{orders:{subject|16}}}:{subject}", "{orders:7}:4711"),
            ("{{}}{source}{{{{", "{}shop{{"),
            ("{subject|1}", "0"),
            ("é{source}é", "éshopé"),
        ] {
            assert_eq!(resolved(template, &EVENT).as_deref(), Ok(name), "{template}");
        }
    }

    #[test]
    fn a_name_without_placeholders_is_one_stream() {
        for (text, name) in [("events", "events"), ("{{a}}:b", "{a}:b"), ("", ""), ("}}{{", "}{")] {
            assert_eq!(
                StreamName::parse(text),
                Ok(StreamName::Plain(name.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn an_invalid_template_is_refused() {
        for (text, expected) in [
            ("{event}", Fault::Unknown("event".into())),
            ("{}", Fault::Unknown(String::new())),
            ("{ subject }", Fault::Unknown(" subject ".into())),
            ("{Subject}", Fault::Unknown("Subject".into())),
            ("{|16}", Fault::Unknown("|16".into())),
            ("a{subject", Fault::NotClosed),
            ("{", Fault::NotClosed),
            ("{{{", Fault::NotClosed),
            ("{subject{source}", Fault::NotClosed),
            ("a}", Fault::NotOpened),
            ("{subject}}", Fault::NotOpened),
            ("{subject|0}", Fault::Parts("subject|0".into())),
            ("{subject|x}", Fault::Parts("subject|x".into())),
            ("{subject|}", Fault::Parts("subject|".into())),
            ("{subject|-1}", Fault::Parts("subject|-1".into())),
            ("{subject|+1}", Fault::Parts("subject|+1".into())),
            ("{subject|016}", Fault::Parts("subject|016".into())),
            ("{subject|1.5}", Fault::Parts("subject|1.5".into())),
            ("{subject|16|2}", Fault::Parts("subject|16|2".into())),
            ("{subject|65537}", Fault::Parts("subject|65537".into())),
            ("{subject|99999999999}", Fault::Parts("subject|99999999999".into())),
            ("outbox_relay:guard:x", Fault::Reserved),
            ("outbox_relay:{subject}", Fault::Reserved),
        ] {
            assert_eq!(fault(text), expected, "{text}");
        }
        assert_eq!(fault(&"x".repeat(1_025)), Fault::TooLong(1_025));
        assert!(StreamName::parse(&"ü".repeat(1_024)).is_ok());
        assert!(StreamName::parse("{subject|65536}").is_ok());
    }

    #[test]
    fn an_event_that_lacks_the_value_has_no_stream() {
        for subject in [None, Some("")] {
            let event = Values { subject, ..EVENT };
            assert_eq!(resolved("o.{subject}", &event), Err(Lacking(Field::Subject)));
            assert_eq!(resolved("o.{subject|16}", &event), Err(Lacking(Field::Subject)));
            assert_eq!(resolved("o.{source}", &event).as_deref(), Ok("o.shop"));
        }
    }

    /// A text of these characters, drawn from a seed.
    fn drawn(random: &mut fastrand::Rng, characters: &[char], most: usize) -> String {
        (0..random.usize(..=most))
            .map(|_| characters[random.usize(..characters.len())])
            .collect()
    }

    const CHARACTERS: [char; 12] = ['{', '}', '{', '}', '|', '1', '0', 's', 'é', '\n', '*', '語'];

    #[test]
    fn doubled_braces_allow_any_name() {
        for seed in 0..10_000 {
            let name = drawn(&mut fastrand::Rng::with_seed(seed), &CHARACTERS, 40);
            let doubled = name.replace('{', "{{").replace('}', "}}");
            assert_eq!(StreamName::parse(&doubled), Ok(StreamName::Plain(name)), "seed {seed}");
        }
    }

    /// No text makes parsing panic, and an accepted template gives each complete event a name.
    #[test]
    fn any_text_is_parsed_or_refused() {
        const WORDS: [&str; 10] = [
            "{",
            "}",
            "{{",
            "}}",
            "|",
            "16",
            "subject",
            "{source}",
            "{subject|3}",
            "x",
        ];
        let mut templates = 0;
        for seed in 0..20_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let text: String = (0..random.usize(..8))
                .map(|_| WORDS[random.usize(..WORDS.len())])
                .collect();
            if let Ok(StreamName::Template(template)) = StreamName::parse(&text) {
                templates += 1;
                assert!(template.resolve(&EVENT).is_ok(), "{text}");
            }
        }
        assert!(templates > 1_000, "{templates}");
    }

    #[test]
    fn values_are_inserted_unchanged_and_parts_are_in_range() {
        let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC);
        for seed in 0..10_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let subject = format!("s{}", drawn(&mut random, &CHARACTERS, 30));
            let event = Values {
                subject: Some(&subject),
                ..EVENT
            };
            assert_eq!(
                resolved("a.{subject}.b", &event),
                Ok(format!("a.{subject}.b")),
                "seed {seed}"
            );
            let parts = random.u32(1..=MOST_PARTS);
            let part = resolved(&format!("{{subject|{parts}}}"), &event);
            assert_eq!(
                part,
                Ok((crc.checksum(subject.as_bytes()) % parts).to_string()),
                "seed {seed}"
            );
        }
    }

    /// Numeric keys, which are the most common, are spread evenly.
    #[test]
    fn keys_are_spread_evenly() {
        for parts in [2, 3, 4, 8, 10, 16] {
            let mut counts = vec![0_u32; parts as usize];
            for key in 0..10_000 {
                counts[part_of(&key.to_string(), NonZeroU32::new(parts).unwrap()) as usize] += 1;
            }
            let fair = 10_000 / parts;
            let is_fair = |count: &u32| (fair * 8 / 10..=fair * 12 / 10).contains(count);
            assert!(counts.iter().all(is_fair), "{parts}: {counts:?}");
        }
    }
}
