//! The routes that an event takes, compared with a plain definition, over random tables of routes.

mod model;

use model::for_each_seed;
use relay::event::routes::{Route, taken};
use relay::event::stream_name::StreamName;
use std::cell::Cell;
use std::collections::BTreeSet;
use wildmatch::WildMatch;

/// What a pattern means: `*` any text, `?` one character.
fn means(pattern: &[char], name: &[char]) -> bool {
    match (pattern, name) {
        ([], name) => name.is_empty(),
        (['*', rest @ ..], name) => (0..=name.len()).any(|from| means(rest, &name[from..])),
        (['?', rest @ ..], [_, name @ ..]) => means(rest, name),
        ([first, rest @ ..], [letter, name @ ..]) => first == letter && means(rest, name),
        _ => false,
    }
}

fn text(rng: &mut fastrand::Rng, letters: &str, most: usize) -> String {
    let letters: Vec<char> = letters.chars().collect();
    let length = rng.usize(1..=most);
    (0..length).map(|_| letters[rng.usize(..letters.len())]).collect()
}

fn matches(pattern: Option<&String>, name: &str) -> bool {
    let chars = |text: &str| text.chars().collect::<Vec<_>>();
    pattern.is_none_or(|pattern| means(&chars(pattern), &chars(name)))
}

#[test]
fn an_event_takes_the_first_route_to_each_stream_of_those_that_match() {
    for_each_seed(3_000, |seed| {
        let rng = &mut fastrand::Rng::with_seed(seed);
        let pattern = |rng: &mut fastrand::Rng| rng.bool().then(|| text(rng, "aé.?**", 5));
        let written: Vec<(Option<String>, Option<String>)> =
            (0..rng.usize(..12)).map(|_| (pattern(rng), pattern(rng))).collect();
        let routes: Vec<Route> = (1..)
            .zip(&written)
            .map(|(number, (event_type, source))| Route {
                number,
                event_type: event_type.as_deref().map(WildMatch::new),
                source: source.as_deref().map(WildMatch::new),
                backend: text(rng, "xy", 1),
                stream: rng.bool().then(|| StreamName::parse(&text(rng, "st", 1))),
            })
            .collect();
        let stream_of = |route: &Route| {
            let name = route.stream.as_ref().and_then(|stream| stream.as_ref().ok()?.plain());
            name.unwrap_or("s").to_owned()
        };
        let (event_type, source) = (text(rng, "aé.", 5), text(rng, "aé.", 5));
        let most = rng.usize(..4);
        let found = taken(&routes, &event_type, &source, most, |route| {
            Ok::<_, String>(stream_of(route))
        })?;
        let found: Vec<i32> = found.iter().map(|(route, _)| route.number).collect();

        let mut there = BTreeSet::new();
        let is_taken = |(route, (of_type, of_source)): &(&Route, &(Option<String>, Option<String>))| {
            matches(of_type.as_ref(), &event_type)
                && matches(of_source.as_ref(), &source)
                && there.insert((route.backend.clone(), stream_of(route)))
        };
        let expected: Vec<i32> = routes
            .iter()
            .zip(&written)
            .filter(is_taken)
            .map(|(r, _)| r.number)
            .take(most + 1)
            .collect();
        match found == expected {
            true => Ok(()),
            false => Err(format!(
                "{event_type} from {source} by {written:?}: {found:?}, not {expected:?}"
            )),
        }
    });
}

/// Each is compared with those before it, so looking at all of very many would take long.
#[test]
fn routes_beyond_the_most_are_not_looked_at() {
    let routes: Vec<Route> = (1..=100_000)
        .map(|number| Route {
            number,
            event_type: None,
            source: None,
            backend: format!("b{number}"),
            stream: None,
        })
        .collect();
    let looked_at = Cell::new(0);
    let found = taken(&routes, "t", "s", 1_000, |_| {
        looked_at.set(looked_at.get() + 1);
        Ok::<_, String>(())
    });
    assert_eq!((found.unwrap().len(), looked_at.get()), (1_001, 1_001));
}
