//! Compares the ledger of the first server with the effects in the second.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use kit::postgres::{DB, USER};
use kit::{LIMIT, Postgres, eventually};
use postgres::NoTls;

use super::Site;

/// How many violations of a kind are shown.
const SHOWN: usize = 5;

/// Stream, key, version.
type Line = (String, String, i64);

#[derive(Debug, Default)]
pub(super) struct Verdict {
    committed: usize,
    effects: usize,
    lost: Vec<String>,
    repeated: Vec<String>,
    phantoms: Vec<String>,
    disorder: Vec<String>,
}

/// A server whose worker was killed last may still have to recover.
fn lines(pg: &Postgres, sql: &str) -> Vec<(String, Line)> {
    let rows = eventually("a server to answer", LIMIT, || {
        pg.config(USER, DB).connect(NoTls).ok()?.query(sql, &[]).ok()
    });
    rows.iter()
        .map(|row| (row.get(0), (row.get(1), row.get(2), row.get(3))))
        .collect()
}

pub(super) fn judge(site: &Site) -> Verdict {
    let ledger = lines(&site.first, "select event_id::text, stream, key, version from ledger");
    let effects = lines(
        &site.second,
        "select event_id::text, stream, key, version from effects order by position",
    );
    let mut verdict = Verdict {
        committed: ledger.len(),
        effects: effects.len(),
        ..Verdict::default()
    };
    let committed: BTreeMap<&str, &Line> = ledger.iter().map(|(id, line)| (id.as_str(), line)).collect();
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut versions: BTreeMap<&str, i64> = BTreeMap::new();
    for (id, line) in &effects {
        if committed.get(id.as_str()) != Some(&line) {
            verdict.phantoms.push(format!("{id} {line:?}"));
        }
        if !seen.insert(id) {
            verdict.repeated.push(format!("{id} {line:?}"));
            continue;
        }
        let last = versions.insert(&line.1, line.2).unwrap_or(0);
        if line.2 != last + 1 {
            verdict.disorder.push(format!("{id} {line:?} after version {last}"));
        }
    }
    let lost = committed.iter().filter(|(id, _)| !seen.contains(**id));
    verdict.lost = lost.map(|(id, line)| format!("{id} {line:?}")).collect();
    let noted = "select event_id::text, 'noted by apply()', key, version from disorder";
    let noted = lines(&site.second, noted)
        .into_iter()
        .map(|(id, line)| format!("{id} {line:?}"));
    verdict.disorder.extend(noted);
    verdict
}

impl Verdict {
    /// Whether no more events are to come.
    pub(super) fn is_complete(&self) -> bool {
        self.lost.is_empty()
    }

    fn sins(&self) -> [(&'static str, &Vec<String>); 4] {
        [
            ("lost", &self.lost),
            ("repeated", &self.repeated),
            ("phantoms", &self.phantoms),
            ("out of order", &self.disorder),
        ]
    }

    pub(super) fn is_clean(&self) -> bool {
        self.committed > 0 && self.sins().iter().all(|(_, cases)| cases.is_empty())
    }

    pub(super) fn show(&self) {
        for (name, cases) in self.sins() {
            for case in cases.iter().take(SHOWN) {
                println!("    {name}: {case}");
            }
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} events committed, {} effects", self.committed, self.effects)?;
        self.sins()
            .iter()
            .try_for_each(|(name, cases)| write!(f, ", {name} {}", cases.len()))
    }
}
