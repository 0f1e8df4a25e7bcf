//! Runs the checks of the fuzz targets over the saved inputs (`fuzz/corpus`): inputs of past faults, and inputs that
//! cover the code. `make fuzz` looks for more.

#[path = "../../fuzz/checks.rs"]
mod checks;

fn replay(target: &str, check: fn(&[u8])) {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(target);
    let files = std::fs::read_dir(&corpus).unwrap_or_else(|error| panic!("{}: {error}", corpus.display()));
    let mut inputs = 0;
    for file in files {
        let path = file.expect("a file").path();
        let input = std::fs::read(&path).expect("readable");
        eprintln!("{}", path.display());
        check(&input);
        // Also truncated, as when a connection ends.
        let step = (input.len() / 20).max(1);
        (0..input.len()).step_by(step).for_each(|end| check(&input[..end]));
        inputs += 1;
    }
    assert!(inputs > 0, "no inputs for {target}");
}

macro_rules! replays {
    ($($target:ident: $check:path,)*) => {$(
        #[test]
        fn $target() {
            replay(stringify!($target), $check);
        }
    )*};
}

replays! {
    replies: checks::replies,
    conversation: checks::conversation,
    classify: checks::classify,
    encode: checks::entries::encode,
    publish: checks::entries::publish,
    nodes: checks::nodes,
    slots: checks::slots,
    survey: checks::surveys::survey,
}
