//! Links and paths in the documents have targets.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{checkout, documents, parse};

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    heading
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() })
        .collect()
}

fn anchors(document: &str) -> BTreeSet<String> {
    let (_, prose) = parse(document);
    prose
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| anchor(line.trim_start_matches('#').trim()))
        .collect()
}

/// The targets of `[...](target)`.
fn links(prose: &str) -> Vec<&str> {
    prose
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
        .collect()
}

/// Texts in backticks that look like a path of the checkout.
fn paths(prose: &str) -> Vec<&str> {
    const FOLDERS: [&str; 10] = [
        "benches/",
        "contrib/",
        "docs/",
        "examples/",
        "fuzz/",
        "relay/",
        "scripts/",
        "sql/",
        "src/",
        "tests/",
    ];
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    prose
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|text| FOLDERS.iter().any(|folder| text.starts_with(folder)))
        .filter(|text| text.chars().all(is_plain))
        // A pattern for several names.
        .filter(|text| !text.contains("X.Y.Z") && !text.contains("OLD"))
        .collect()
}

#[test]
fn links_and_paths_have_targets() {
    let mut wrong = Vec::new();
    for document in documents(&["", "docs/", "docs/design/", "examples/"]) {
        let (_, prose) = parse(&document);
        let folder = Path::new(&document).parent().expect("it is in a folder").to_path_buf();
        for target in links(&prose).into_iter().filter(|target| !target.contains("://")) {
            let (file, place) = target.split_once('#').unwrap_or((target, ""));
            let path = match file {
                "" => PathBuf::from(&document),
                file => folder.join(file),
            };
            let leads = checkout().join(&path).exists()
                && (place.is_empty() || anchors(path.to_str().expect("UTF-8")).contains(place));
            if !leads {
                wrong.push(format!("{document}: ({target})"));
            }
        }
        let missing = paths(&prose).into_iter().filter(|path| !checkout().join(path).exists());
        wrong.extend(missing.map(|path| format!("{document}: `{path}`")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Of two headings with the same words, a link reaches only the first.
#[test]
fn headings_of_a_document_differ() {
    let mut twice = Vec::new();
    for document in documents(&["", "docs/", "docs/design/", "examples/"]) {
        let (_, prose) = parse(&document);
        let mut seen = BTreeSet::new();
        for heading in prose.lines().filter(|line| line.starts_with('#')) {
            if !seen.insert(anchor(heading.trim_start_matches('#').trim())) {
                twice.push(format!("{document}: {heading}"));
            }
        }
    }
    assert!(twice.is_empty(), "{twice:#?}");
}
