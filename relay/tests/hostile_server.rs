//! A server that gives random answers, most of them valid: from a seed, so that a failure can be repeated. The fuzz
//! targets check the same properties (`fuzz/checks.rs`).
//!
//! `SEED=n` runs only this seed, `SCHEDULES=n` runs n seeds, beginning with `FIRST=n`.

// This test uses only a part of them.
#[allow(dead_code)]
#[path = "../../fuzz/checks.rs"]
mod checks;
#[path = "model/mod.rs"]
mod model;

use model::Rng;
use relay::samples;

/// A string of RESP.
fn bulk(bytes: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

fn array(items: &[Vec<u8>]) -> Vec<u8> {
    [format!("*{}\r\n", items.len()).into_bytes(), items.concat()].concat()
}

/// A number that servers send, or an impossible one.
fn number(rng: &mut Rng) -> i64 {
    let known = [
        0,
        1,
        -1,
        2,
        7,
        1 << 40,
        i64::MAX,
        i64::MAX - 1,
        i64::MIN,
        i64::from(u32::MAX),
    ];
    match rng.u8(..4) {
        0 => rng.i64(..),
        1 => rng.i64(..1_000),
        _ => *rng.choice(known.iter()).expect("some"),
    }
}

fn text(rng: &mut Rng) -> Vec<u8> {
    let known: [&[u8]; 12] = [
        b"",
        b"event_id",
        b"timestamp",
        b"number",
        b"position",
        b"role",
        b"length",
        b"10:20:10,14/25/7/9",
        b"\x1b[2J\0\r\n",
        b"localhost",
        b"127.0.0.1",
        b"18446744073709551615",
    ];
    match rng.u8(..4) {
        0 => (0..rng.usize(..40)).map(|_| rng.u8(..)).collect(),
        1 => vec![b'x'; rng.usize(..20_000)],
        _ => rng.choice(known.iter()).expect("some").to_vec(),
    }
}

/// Any reply, and some that are invalid.
fn anything(rng: &mut Rng, depth: usize) -> Vec<u8> {
    match rng.u8(..14) {
        0 => b"+OK\r\n".to_vec(),
        1 => b"+QUEUED\r\n".to_vec(),
        2 => format!(":{}\r\n", number(rng)).into_bytes(),
        3 => b"$-1\r\n".to_vec(),
        4 => b"*-1\r\n".to_vec(),
        5 => {
            let errors = [
                "ERR no",
                "WRONGTYPE no",
                "MOVED 7 a:1",
                "OOM no",
                "EXECABORT Transaction discarded because of: OOM no",
                "NOPERM no key",
                "READONLY no",
                "ERR Protocol error: invalid bulk length",
            ];
            format!("-{}\r\n", rng.choice(errors.iter()).expect("some")).into_bytes()
        }
        6 | 7 => bulk(&text(rng)),
        8 | 9 if depth < 9 => {
            let items: Vec<Vec<u8>> = (0..rng.usize(..6)).map(|_| anything(rng, depth + 1)).collect();
            array(&items)
        }
        10 => format!("*{}\r\n", number(rng)).into_bytes(),
        11 => format!("${}\r\n", number(rng)).into_bytes(),
        12 => (0..rng.usize(..30)).map(|_| rng.u8(..)).collect(),
        _ => {
            let kinds = [
                ">2\r\n",
                "%1\r\n",
                "|1\r\n",
                "~1\r\n",
                "_\r\n",
                "#t\r\n",
                ",1\r\n",
                "(1\r\n",
                "=3\r\n",
                "HTTP/1.1 400",
            ];
            rng.choice(kinds.iter()).expect("some").as_bytes().to_vec()
        }
    }
}

/// A guard, some of whose fields may be random.
fn guard(rng: &mut Rng) -> Vec<u8> {
    let items: Vec<Vec<u8>> = samples::GUARD
        .iter()
        .flat_map(|(field, value)| {
            let value = match rng.u8(..20) {
                0 => text(rng),
                1 => number(rng).to_string().into_bytes(),
                2 => (number(rng) as u64).to_string().into_bytes(),
                _ => value.as_bytes().to_vec(),
            };
            [bulk(field.as_bytes()), bulk(&value)]
        })
        .collect();
    array(&items)
}

/// The expected replies of a server with one backend, from the first one on; some of them are random.
fn dialogue(rng: &mut Rng) -> Vec<u8> {
    let setup = rng.u8(..16);
    let ok = || b"+OK\r\n".to_vec();
    let (queued, token) = (b"+QUEUED\r\n".to_vec(), array(&[bulk(b"t")]));
    let mut said = Vec::new();
    if setup & 8 != 0 {
        said.push(b":0\r\n".to_vec());
    }
    said.extend([ok(), if rng.bool() { guard(rng) } else { array(&[]) }]);
    said.extend([ok(), queued.clone(), array(&[b":0\r\n".to_vec()])]);
    let wait = (setup & 1 != 0).then(|| b":1\r\n".to_vec());
    said.extend(wait.clone());
    said.extend([ok(), token.clone()]);
    for _ in 0..rng.usize(..20) {
        match rng.u8(..6) {
            0 => {
                let entry = |rng: &mut Rng| array(&[bulk(b"1-0"), array(&[bulk(&text(rng)), bulk(&text(rng))])]);
                let entries: Vec<Vec<u8>> = (0..rng.usize(..3)).map(|_| entry(rng)).collect();
                said.push(array(&entries));
            }
            _ => {
                said.extend([ok(), queued.clone(), queued.clone(), queued.clone()]);
                said.push(array(&[bulk(b"1-0"), bulk(b"2-0"), b":0\r\n".to_vec()]));
                said.extend(wait.clone());
                said.extend([ok(), token.clone()]);
            }
        }
    }
    let often = rng.usize(2..40);
    for reply in &mut said {
        if rng.usize(..often) == 0 {
            *reply = anything(rng, 0);
        }
    }
    [vec![setup], said.concat()].concat()
}

#[test]
fn no_answer_of_a_hostile_server_is_taken_for_a_delivery_or_saved() {
    model::for_each_seed(4_000, |seed| {
        let rng = &mut Rng::with_seed(seed);
        checks::conversation(&dialogue(rng));
        let reply = anything(rng, 0);
        checks::replies(&reply);
        checks::nodes(&reply);
        checks::classify(&reply);
        let (begin, more) = (anything(rng, 0), anything(rng, 0));
        if rng.usize(..20) == 0 {
            checks::replies(&[begin.as_slice(), b"|", &more].concat());
        }
        Ok(())
    });
}
