//! Exactly once from a transaction of one Postgres to a transaction of another: a short run of `make chaos
//! CHAOS_ARGS=--end-to-end`. Consumers without the inbox repeat effects, which shows that the test can fail.

use std::process::Command;

/// Always these seeds, so that a failure repeats.
const SEEDS: &[&str] = &["1", "2"];
const SECONDS: &str = "10";

fn chaos(seed: &str, more: &[&str]) -> (bool, String) {
    let ran = Command::new(env!("CARGO_BIN_EXE_chaos"))
        .args([
            "--end-to-end",
            "--seed",
            seed,
            "--seconds",
            SECONDS,
            "--sessions",
            "4",
            "--quiet",
        ])
        .args(more)
        .output()
        .expect("cannot run chaos");
    let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
    println!("{said}");
    (ran.status.success(), said)
}

#[test]
fn each_committed_event_has_its_effect_once_whatever_breaks() {
    for seed in SEEDS {
        let (went_well, said) = chaos(seed, &[]);
        assert!(went_well && said.contains("nothing violated"), "seed {seed}: {said}");
    }
}

#[test]
fn without_the_inbox_effects_are_repeated() {
    let repeats = SEEDS.iter().any(|seed| {
        let (went_well, said) = chaos(seed, &["--careless"]);
        !went_well && said.contains("VIOLATED") && said.contains(", lost 0") && !said.contains("repeated 0")
    });
    assert!(repeats, "nothing was repeated without the inbox");
}
