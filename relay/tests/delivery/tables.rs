//! The tables of the worker.

use super::*;

pub(crate) struct Tables {
    /// By stream and seq, with the attempts.
    pub refused: BTreeMap<(Rc<str>, i64), u32>,
    pub failed: BTreeMap<i64, u32>,
    pub cursor: Position,
}

impl Tables {
    pub(crate) fn streams(&self) -> Streams {
        let mut heads = BTreeMap::new();
        for ((stream, _), attempts) in &self.refused {
            heads.entry(stream.to_string()).or_insert(*attempts);
        }
        Streams::waiting(heads)
    }

    pub(crate) fn waiting(&self, stream: &Rc<str>, limit: usize) -> Vec<i64> {
        let rows = self.refused.range((stream.clone(), 0)..);
        let rows = rows.take_while(|((of, _), _)| of == stream);
        rows.map(|((_, seq), _)| *seq).take(limit).collect()
    }
}
