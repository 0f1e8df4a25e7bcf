//! A short run of `make chaos`: everything around the relay is broken at random, and no event may be lost, repeated or
//! out of order.

use std::process::Command;

/// Always these seeds, so that a failure repeats: together they have most kinds of faults.
const SEEDS: &[&str] = &["216", "46"];
const SECONDS: &str = "8";
/// With `trim = 'read'`, and consumer groups that come and go.
const WITH_GROUPS: &str = "1002";

#[test]
fn nothing_is_lost_repeated_or_reordered_whatever_breaks() {
    for seed in SEEDS {
        run(seed, &[]);
    }
}

#[test]
fn nothing_is_trimmed_that_a_group_has_not_acknowledged_whatever_breaks() {
    run(WITH_GROUPS, &["--groups"]);
}

fn run(seed: &str, more: &[&str]) {
    let ran = Command::new(env!("CARGO_BIN_EXE_chaos"))
        .args(["--seed", seed, "--seconds", SECONDS, "--quiet"])
        .args(more)
        .output()
        .expect("cannot run chaos");
    let (said, errors) = (
        String::from_utf8_lossy(&ran.stdout),
        String::from_utf8_lossy(&ran.stderr),
    );
    println!("{said}");
    assert!(ran.status.success(), "seed {seed}: {}\n{said}\n{errors}", ran.status);
    assert!(
        said.contains("nothing violated"),
        "it said nothing of its verdict: {said}"
    );
}
