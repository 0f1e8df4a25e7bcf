//! The documents: every block of SQL, shell, Python and JavaScript in the README and in docs/*.md runs, or says why it
//! does not; links and paths have targets; the reference is what a server says of itself.
//!
//! A block with `<!-- not run: why -->` (or `<!-- not run here: ... -->`) on the line before it is skipped.

mod consumers;
mod links;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use kit::{Postgres, Redis, env};
use tempfile::TempDir;

/// The languages that are run; other blocks are only for reading.
const LANGUAGES: [&str; 4] = ["sql", "sh", "python", "js"];

/// The documents that have such blocks.
const RUN: [&str; 7] = [
    "README.md",
    "docs/guide.md",
    "docs/testing-your-application.md",
    "docs/backends.md",
    "docs/guarantees.md",
    "docs/operations.md",
    "docs/moving.md",
];

pub(crate) fn checkout() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests is a folder of it")
        .to_path_buf()
}

fn read(document: &str) -> String {
    std::fs::read_to_string(checkout().join(document)).unwrap_or_else(|error| panic!("cannot read {document}: {error}"))
}

/// The Markdown files of these folders.
fn documents(folders: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for folder in folders {
        for entry in std::fs::read_dir(checkout().join(folder)).expect("a folder") {
            let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
            if name.ends_with(".md") {
                found.push(format!("{folder}{name}"));
            }
        }
    }
    found.sort();
    found
}

/// A fenced block.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    line: usize,
    pub(crate) language: String,
    pub(crate) text: String,
    is_left_out: bool,
}

impl Block {
    fn does_not_end(&self) -> bool {
        self.text.contains("while True:") || self.text.contains("for (;;)")
    }
}

/// The blocks of a document, and the rest of its text.
pub(crate) fn parse(document: &str) -> (Vec<Block>, String) {
    let (mut blocks, mut prose): (Vec<Block>, String) = Default::default();
    let (mut open, mut indent, mut before) = (false, 0, String::new());
    for (number, line) in read(document).lines().enumerate() {
        let trimmed = line.trim_start();
        if let Some(language) = trimmed.strip_prefix("```") {
            open = !open;
            if open {
                indent = line.len() - trimmed.len();
                blocks.push(Block {
                    line: number + 1,
                    language: language.trim().to_owned(),
                    text: String::new(),
                    is_left_out: before.starts_with("<!-- not run"),
                });
            }
        } else if open {
            let block = blocks.last_mut().expect("it was begun");
            block.text.push_str(line.get(indent..).unwrap_or_default());
            block.text.push('\n');
        } else {
            prose.push_str(line);
            prose.push('\n');
        }
        if !trimmed.is_empty() {
            before = trimmed.to_owned();
        }
    }
    assert!(!open, "{document}: a block does not end");
    (blocks, prose)
}

fn runnable(document: &str) -> Vec<Block> {
    let (mut blocks, _) = parse(document);
    blocks.retain(|block| LANGUAGES.contains(&block.language.as_str()) && !block.is_left_out);
    blocks
}

/// The servers of a reader: the extension in the database `app`, and Redis at the default address.
struct Reader {
    pg: Postgres,
    redis: Redis,
    /// Where shell blocks run; `bin` has a `redis-cli` for this Redis.
    dir: TempDir,
}

impl Reader {
    fn new() -> Self {
        let redis = Redis::start();
        let port = redis.port().to_string();
        let pg = Postgres::with(&[
            ("outbox_relay.redis_host", "127.0.0.1"),
            ("outbox_relay.redis_port", &port),
        ]);
        let reader = Reader {
            pg: pg.start(),
            redis,
            dir: env::server_dir("doc"),
        };
        reader.pg.exec("create database app");
        reader.pg.exec_db("app", "create extension outbox_relay");
        let bin = reader.dir.path().join("bin");
        std::fs::create_dir(&bin).expect("a folder");
        let cli = bin.join("redis-cli");
        let path = std::env::var("PATH").expect("PATH is set");
        // An error reply of Redis makes it fail.
        let text = format!("#!/bin/sh\nPATH='{path}' exec redis-cli -e -p {port} \"$@\"\n");
        std::fs::write(&cli, text).expect("it can be written");
        std::fs::set_permissions(&cli, PermissionsExt::from_mode(0o755)).expect("chmod");
        reader
    }

    /// Tables of other outboxes, with rows, and their settings, for a reader who moves in.
    fn old_outboxes(&self) {
        let table = read("tests/django_broadcaster/schema.sql");
        let rows = [
            ("waits", "pending", "0 s", 0),
            ("tried", "retry", "0 s", 1),
            ("in.hand", "processing", "0 s", 0),
            ("later", "pending", "1 h", 0),
        ];
        let rows = rows.map(|(event_type, status, later, tried)| {
            format!(
                "(gen_random_uuid(), '1.0', '{event_type}', 's', '', 'application/json', '', null, '{status}', clock_timestamp(), now(), \
                 now() + interval '{later}', null, {tried}, 3, '', '', '{{}}')"
            )
        });
        let other =
            "create table outbox_table (id uuid, aggregatetype text, aggregateid text, type text, payload jsonb);
            insert into outbox_table values (gen_random_uuid(), 'Order', '1', 'OrderCreated', '{}');
            create publication dbz_publication for table outbox_table;";
        self.pg.exec_db(
            "app",
            &format!("{table} insert into outbox_events values {}; {other}", rows.join(", ")),
        );
        let write = |name: &str, text: &str| {
            std::fs::write(self.dir.path().join(name), text).expect("it can be written");
        };
        std::fs::create_dir(self.dir.path().join("mysite")).expect("a folder");
        write(
            "mysite/settings.py",
            &format!(
                "OUTBOX_PUBLISHERS = {{'main': {{'BACKEND': 'django_broadcaster.backends.RedisStreamBackend', \
                 'OPTIONS': {{'host': '127.0.0.1', 'port': {}, 'stream_name': 'orders'}}}}}}\n",
                self.redis.port()
            ),
        );
        write("sequin.yaml", &read("tests/moving/sequin.yaml"));
        std::os::unix::fs::symlink(checkout().join("contrib"), self.dir.path().join("contrib")).expect("a link");
    }

    /// A program, started as the reader would.
    fn command(&self, program: &str) -> Command {
        let path = std::env::var("PATH").expect("PATH is set");
        let bin = self.dir.path().join("bin");
        let mut command = Command::new(program);
        command
            .current_dir(self.dir.path())
            .env(
                "PATH",
                format!("{}:{}:{path}", bin.display(), env::postgres_bin().display()),
            )
            .env("PGHOST", self.pg.host())
            .env("PGPORT", "5432")
            .env("PGUSER", "postgres")
            .env("PGDATABASE", "app");
        command
    }

    /// In one session, as the reader would.
    #[track_caller]
    fn sql(&self, document: &str, script: &str) -> String {
        let ran = self
            .pg
            .run("psql", &["-q", "-v", "ON_ERROR_STOP=1", "-d", "app", "-f", "-"], script);
        assert!(ran.ok, "{document}:\n{}\n{}", ran.stdout, ran.stderr);
        ran.stdout
    }

    #[track_caller]
    fn shell(&self, document: &str, block: &Block) {
        let ran = self
            .command("bash")
            .args(["-euo", "pipefail", "-c", &block.text])
            .output()
            .expect("bash runs");
        assert!(
            ran.status.success(),
            "{document}, line {}:\n{}\n{}",
            block.line,
            String::from_utf8_lossy(&ran.stdout),
            String::from_utf8_lossy(&ran.stderr)
        );
    }

    /// A program in another language, if its packages can be fetched.
    #[track_caller]
    fn program(&self, document: &str, block: &Block) {
        let Some(mut command) = interpreter(self, &block.language, &block.text) else {
            return;
        };
        let ran = command.output().expect("it runs");
        let (said, errors) = (
            String::from_utf8_lossy(&ran.stdout),
            String::from_utf8_lossy(&ran.stderr),
        );
        assert!(
            ran.status.success(),
            "{document}, line {}:\n{said}\n{errors}",
            block.line
        );
    }

    /// Runs a document from its beginning to its end, except for consumers.
    #[track_caller]
    fn follow(&self, document: &str) {
        let mut script = String::new();
        for block in runnable(document) {
            match block.language.as_str() {
                "sql" => {
                    // Before an error, the output tells where it is.
                    writeln!(script, "\\echo line {}\n{}", block.line, block.text).expect("a string grows");
                }
                "sh" => {
                    self.sql(document, &std::mem::take(&mut script));
                    self.shell(document, &block);
                }
                // Blocks that do not end are run by the test of consumers.
                _ if block.does_not_end() => {}
                _ => {
                    self.sql(document, &std::mem::take(&mut script));
                    self.program(document, &block);
                }
            }
        }
        self.sql(document, &script);
    }
}

#[test]
fn the_readme_has_at_most_900_words() {
    let words = read("README.md").split_whitespace().count();
    assert!(words <= 900, "it has {words}");
}

#[test]
fn each_document_with_blocks_is_run() {
    let with_blocks: Vec<String> = documents(&["", "docs/"])
        .into_iter()
        .filter(|document| document == "README.md" || document.starts_with("docs/"))
        .filter(|document| !runnable(document).is_empty())
        .collect();
    let run: BTreeSet<&str> = RUN.into_iter().collect();
    let found: BTreeSet<&str> = with_blocks.iter().map(String::as_str).collect();
    assert_eq!(found, run);
}

#[test]
fn the_readme_works() {
    let reader = Reader::new();
    reader.follow("README.md");
    // The published event is in the stream that the document names.
    let entries = reader.redis.wait_entries("events", 2);
    let types: Vec<_> = entries
        .iter()
        .map(|entry| entry.get("event_type").expect("a type"))
        .collect();
    assert_eq!(types, ["order.placed", "hello"]);
    // The entry in the document is that of the first event, except for its id and time.
    let (blocks, _) = parse("README.md");
    let shown = blocks
        .iter()
        .find(|block| block.text.contains("cloud_event  {"))
        .expect("it shows an entry");
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    let data = entries[0].get("cloud_event").expect("it has one");
    let data = data.split_once(r#""subject": "#).expect("a subject").1;
    assert!(
        words(&shown.text).contains(&words(data)),
        "{data} is not in\n{}",
        shown.text
    );
    for field in ["event_id", "event_type", "source", "timestamp", "cloud_event"] {
        assert!(entries[0].get(field).is_some() && shown.text.contains(field), "{field}");
    }
}

#[test]
fn the_guide_works() {
    let reader = Reader::new();
    reader.follow("docs/guide.md");
    assert!(reader.pg.one_db::<bool>("app", "select outbox.drain('10 s')"));
    reader.redis.wait_entries("invoices", 1);
}

#[test]
fn the_recipes_for_tests_work() {
    Reader::new().follow("docs/testing-your-application.md");
    // The block on Django is that of the example, whose tests run there.
    let tests = read("examples/django/shop/tests.py");
    let (blocks, _) = parse("docs/testing-your-application.md");
    assert!(blocks.iter().any(|block| block.text == tests));
}

#[test]
fn the_guide_to_backends_works() {
    Reader::new().follow("docs/backends.md");
}

#[test]
fn the_statements_of_the_guarantees_work() {
    Reader::new().follow("docs/guarantees.md");
}

#[test]
fn the_runbook_works() {
    Reader::new().follow("docs/operations.md");
}

#[test]
fn moving_in_and_out_works() {
    let reader = Reader::new();
    reader.old_outboxes();
    reader.follow("docs/moving.md");
    // Pending rows, rows that came over the bridge, and rows in progress; scheduled rows went back.
    let types: Vec<String> = reader
        .redis
        .wait_entries("orders", 3)
        .iter()
        .map(|entry| entry.field("event_type").to_owned())
        .collect();
    assert_eq!(types, ["waits", "tried", "in.hand"]);
    assert_eq!(reader.redis.wait_entries("outbox.event.Order", 1).len(), 1);
    let left = "select string_agg(event_type || ' ' || status, ', ' order by event_type) from outbox_events";
    assert_eq!(
        reader.pg.one_db::<String>("app", left),
        "in.hand processing, later pending, tried processing, waits processing"
    );
}

#[test]
fn the_runbook_has_a_section_for_each_check_of_health() {
    let reader = Reader::new();
    let (_, prose) = parse("docs/operations.md");
    let headings: Vec<&str> = prose.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let described: BTreeSet<&str> = headings.iter().flat_map(|heading| heading.split(", ")).collect();
    let checks = reader.sql(
        "outbox.health()",
        "\\pset tuples_only on\n\\pset format unaligned\nselect \"check\" from outbox.health()",
    );
    let missing: Vec<&str> = checks
        .lines()
        .map(|check| {
            if check.starts_with("backend ") {
                "backend NAME"
            } else {
                check
            }
        })
        .filter(|check| !described.contains(check))
        .collect();
    assert!(
        missing.is_empty() && !checks.is_empty(),
        "docs/operations.md has no section for {missing:?}"
    );
}

#[test]
fn the_reference_is_what_the_server_says() {
    let pg = Postgres::with(&[("outbox_relay.redis_port", "6379")]).start();
    pg.extension();
    let script = std::fs::read_to_string(checkout().join("scripts/reference.sql")).expect("it is there");
    let ran = pg.run("psql", &["-q", "-v", "ON_ERROR_STOP=1", "-f", "-"], &script);
    assert!(ran.ok, "{}", ran.stderr);
    if std::env::var_os("OUTBOX_WRITE_REFERENCE").is_some() {
        std::fs::write(checkout().join("docs/reference.md"), &ran.stdout).expect("it can be written");
    }
    let document = read("docs/reference.md");
    let differs = ran.stdout.lines().zip(document.lines()).find(|(now, then)| now != then);
    assert!(
        ran.stdout == document,
        "docs/reference.md is not what the server says: {differs:#?}\nWrite it anew with OUTBOX_WRITE_REFERENCE=1."
    );
}

// --- Consumers

/// Fetches packages of a registry into a folder of the build, once; false, with a message, if they cannot be fetched.
fn fetched(what: &str, folder: &Path, script: &str) -> bool {
    std::fs::create_dir_all(folder).expect("a folder");
    // One test at a time.
    let once = r#"exec 9>lock; flock 9
        test "$(cat fetched 2>/dev/null || :)" = "$1" || { eval "$1"; printf %s "$1" >fetched; }"#;
    let ran = Command::new("bash")
        .args(["-euo", "pipefail", "-c", once, "bash", script])
        .current_dir(folder)
        .output()
        .expect("bash runs");
    if !ran.status.success() {
        let why = env::why_failed(&ran);
        env::not_run(&format!("the packages of the consumer in {what} cannot be had: {why}"));
    }
    ran.status.success()
}

/// Where builds go, and what tests fetch.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| checkout().join("target"), PathBuf::from)
}

fn packages(name: &str) -> PathBuf {
    target().join("documents").join(name)
}

/// The program that runs a text in this language, with the packages that the documents name.
fn interpreter(reader: &Reader, language: &str, text: &str) -> Option<Command> {
    let folder = packages(language);
    match language {
        "python" => {
            let wanted = "redis 'psycopg[binary]' sqlalchemy pytest";
            let script = format!("python3 -m venv .; bin/pip install --quiet --disable-pip-version-check {wanted}");
            fetched("Python", &folder, &script).then(|| {
                let mut command = reader.command(&folder.join("bin/python").display().to_string());
                if text.contains("import pytest") {
                    let file = reader.dir.path().join("test_block.py");
                    std::fs::write(&file, text).expect("it can be written");
                    command.args(["-m", "pytest", "-q", "-p", "no:cacheprovider"]).arg(file);
                } else {
                    command.args(["-c", text]);
                }
                command
            })
        }
        _ => fetched("JavaScript", &folder, "npm init -y; npm install --silent redis pg").then(|| {
            // Packages are looked for beside the file.
            let name = reader.dir.path().file_name().expect("a name").to_string_lossy();
            let file = folder.join(format!("{name}.mjs"));
            std::fs::write(&file, text).expect("it can be written");
            let mut command = reader.command("node");
            command.arg(file);
            command
        }),
    }
}

/// A program that runs until it is dropped.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
