//! Builds the entries of a backend's batches from events: streams, buffers, the encoder.

use crate::tables::options::Options;
use crate::worker::backend::settings;
use relay::delivery::batch::BATCH_BYTES;
use relay::event::format::{Encoder, Target};
use relay::event::stream_name::RESERVED;
use relay::event::{Event, NoEntry};
use std::collections::HashSet;
use std::rc::Rc;

/// A buffer that has grown beyond this for one large event is freed.
const KEPT_BUFFER_BYTES: usize = 2 * BATCH_BYTES;
/// How many stream names are kept, so that entries share them.
const KNOWN_STREAMS: usize = 1_000;

pub(super) struct Entries {
    /// The stream of events whose rows name none.
    pub stream: Rc<str>,
    /// The length to which XADD trims streams; 0: it does not trim.
    pub max_len: i64,
    encoder: Encoder,
    buffers: Vec<Vec<u8>>,
    kept_buffers: usize,
    /// Streams that events have named recently.
    named_streams: HashSet<Rc<str>>,
}

impl Entries {
    /// `kept_buffers`: how many unused buffers are kept at most.
    pub(super) fn of(options: Option<&Options>, kept_buffers: usize) -> Self {
        Self {
            stream: settings::stream(options),
            max_len: settings::trimmed_to(options),
            encoder: settings::encoder(options),
            buffers: Vec::new(),
            kept_buffers,
            named_streams: HashSet::new(),
        }
    }

    /// Applies changed options, from the next event on.
    pub(super) fn reconfigure(&mut self, options: &Options) {
        self.stream = settings::stream(Some(options));
        self.max_len = settings::trimmed_to(Some(options));
        self.encoder = settings::encoder(Some(options));
    }

    /// The stream of an event.
    pub(super) fn stream_of(&mut self, event: &Event<'_>) -> Rc<str> {
        match event.stream {
            Some(stream) if *stream != *self.stream => self.named_stream(stream),
            _ => self.stream.clone(),
        }
    }

    fn named_stream(&mut self, name: &str) -> Rc<str> {
        if let Some(stream) = self.named_streams.get(name) {
            return stream.clone();
        }
        if self.named_streams.len() >= KNOWN_STREAMS {
            self.named_streams.clear();
        }
        let stream: Rc<str> = Rc::from(name);
        self.named_streams.insert(stream.clone());
        stream
    }

    /// Appends an event's XADD. `trims`: whether this entry trims the stream.
    pub(super) fn encode(
        &mut self,
        bytes: &mut Vec<u8>,
        stream: &str,
        trims: bool,
        event: &Event<'_>,
    ) -> Result<(), NoEntry> {
        if stream.starts_with(RESERVED) {
            return Err(NoEntry::Reserved(stream.to_owned()));
        }
        let max_len = if trims { self.max_len } else { 0 };
        Ok(self.encoder.append_xadd(bytes, Target { stream, max_len }, event)?)
    }

    /// Sets the position in the WAL that entries carry, if they carry one.
    pub(super) fn tell_lsn(&mut self, position: impl FnOnce() -> u64) {
        if self.encoder.includes_lsn() {
            self.encoder.tell_lsn(position());
        }
    }

    /// Some of the streams that events have named recently.
    pub(super) fn named_streams(&self) -> Vec<Rc<str>> {
        self.named_streams.iter().cloned().collect()
    }

    /// One of these streams.
    pub(super) fn named_stream_of_late(&self) -> Option<Rc<str>> {
        self.named_streams.iter().next().cloned()
    }

    pub(super) fn buffer(&mut self) -> Vec<u8> {
        self.buffers.pop().unwrap_or_default()
    }

    /// Frees what is kept for later.
    pub(super) fn drop_buffers(&mut self) {
        self.buffers = Vec::new();
        self.encoder.drop_scratch();
    }

    pub(super) fn keep(&mut self, mut buffer: Vec<u8>) {
        if buffer.capacity() <= KEPT_BUFFER_BYTES && self.buffers.len() < self.kept_buffers {
            buffer.clear();
            self.buffers.push(buffer);
        }
    }
}
