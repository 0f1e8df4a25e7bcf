//! The projects of examples/: each is copied to target/examples, gets its packages, and runs as its README says, as a
//! role that may publish and has no other right in schema outbox.
//!
//! Most fetch many packages, so `make test` skips them: `make test-examples` runs them.

mod consumers;
mod publishers;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use kit::{Postgres, Redis, env};

use crate::documents::{checkout, parse, target};

/// Both servers, prepared with the `setup.sql` of the examples.
struct Shop {
    pg: Postgres,
    redis: Redis,
}

impl Shop {
    fn open() -> Self {
        let redis = Redis::start();
        let port = redis.port().to_string();
        let settings = [
            ("outbox_relay.redis_host", "127.0.0.1"),
            ("outbox_relay.redis_port", port.as_str()),
        ];
        let shop = Shop {
            pg: Postgres::with(&settings).tcp().start(),
            redis,
        };
        shop.pg.exec("create database app");
        shop.administer("setup.sql");
        shop
    }

    /// Runs a script of the examples as superuser.
    #[track_caller]
    fn administer(&self, script: &str) {
        let script = std::fs::read_to_string(checkout().join("examples").join(script)).expect("it is there");
        let ran = self.pg.run(
            "psql",
            &["-q", "-v", "ON_ERROR_STOP=1", "-d", "app", "-f", "-"],
            &script,
        );
        assert!(ran.ok, "{}", ran.stderr);
    }

    fn one<T: postgres::types::FromSqlOwned>(&self, sql: &str) -> T {
        self.pg.one_db("app", sql)
    }

    fn publish(&self, event_type: &str, count: usize) {
        let sql = format!(
            "select outbox.publish_event('{event_type}', 'shop', '{{\"order_id\": 1}}', subject => 'order/1')
            from generate_series(1, {count})"
        );
        self.pg.exec_db("app", &sql);
    }

    /// A command in an environment as the README of the examples sets it.
    fn command(&self, program: &str) -> Command {
        let (port, redis) = (self.pg.port(), self.redis.port());
        let mut command = Command::new(program);
        command
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", port.to_string())
            .env("PGUSER", "app")
            .env("PGDATABASE", "app")
            .env("DATABASE_URL", format!("postgresql://app@127.0.0.1:{port}/app"))
            .env("JDBC_URL", format!("jdbc:postgresql://127.0.0.1:{port}/app?user=app"))
            .env("REDIS_URL", format!("redis://127.0.0.1:{redis}"))
            .env("PYTHONUNBUFFERED", "1")
            .env("CARGO_TARGET_DIR", target().join("examples").join("cargo"));
        command
    }
}

/// A copy of a project, with its packages.
struct Project {
    name: String,
    dir: PathBuf,
    /// The last of the commands in its README; those before it install packages.
    run: String,
}

/// Files that projects contain when they were run by hand.
const LEFT_BEHIND: [&str; 4] = ["node_modules", ".venv", "target", "__pycache__"];

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let (name, path) = (entry.file_name(), entry.path());
        if path.is_dir() && !LEFT_BEHIND.contains(&name.to_str().expect("UTF-8")) {
            copy(&path, &to.join(name));
        } else if path.is_file() {
            std::fs::copy(&path, to.join(name)).expect("it can be copied");
        }
    }
}

impl Project {
    /// None, with a message, if its packages cannot be fetched and the examples were not asked for.
    fn prepare(shop: &Shop, name: &str) -> Option<Self> {
        let dir = target().join("examples").join(name);
        std::fs::create_dir_all(&dir).expect("a folder");
        // One test at a time.
        let lock = std::fs::File::create(dir.join("lock")).expect("a file");
        lock.lock().expect("it can be locked");
        copy(&checkout().join("examples").join(name), &dir);
        let (blocks, _) = parse(&format!("examples/{name}/README.md"));
        let block = blocks.iter().find(|block| block.language == "sh").expect("commands");
        let (install, run) = block.text.trim().rsplit_once('\n').unwrap_or(("", block.text.trim()));
        // Once, until a file that it depends on changes.
        let manifests = ["requirements.txt", "package-lock.json", "Cargo.lock", "schema.prisma"];
        let texts = manifests.map(|name| std::fs::read_to_string(dir.join(name)).unwrap_or_default());
        let wanted = format!("{install}\n{}", texts.concat());
        let installed = dir.join("installed");
        if std::fs::read_to_string(&installed).ok().as_deref() != Some(&wanted) {
            let ran = shop
                .command("bash")
                .args(["-euo", "pipefail", "-c", install])
                .current_dir(&dir)
                // Prisma would download a program for migrations, which is not needed here.
                .env("PRISMA_SCHEMA_ENGINE_BINARY", "/bin/true")
                .output()
                .expect("bash runs");
            if !ran.status.success() {
                let why = env::why_failed(&ran);
                assert!(
                    std::env::var_os("OUTBOX_TEST_EXAMPLES").is_none(),
                    "{name}: {install}: {why}"
                );
                env::not_run(&format!("examples/{name}: its packages cannot be had: {why}"));
                return None;
            }
            std::fs::write(&installed, wanted).expect("it can be written");
        }
        Some(Project {
            name: name.to_owned(),
            dir,
            run: run.to_owned(),
        })
    }

    fn command(&self, shop: &Shop, line: &str) -> Command {
        let mut command = shop.command("bash");
        command
            .args(["-euo", "pipefail", "-c", line])
            .current_dir(&self.dir)
            .stdin(Stdio::null());
        command
    }

    /// The output of one of its commands.
    #[track_caller]
    fn output(&self, mut command: Command) -> String {
        let ran = command.output().expect("bash runs");
        let (said, errors) = (
            String::from_utf8_lossy(&ran.stdout),
            String::from_utf8_lossy(&ran.stderr),
        );
        assert!(ran.status.success(), "{}:\n{said}\n{errors}", self.name);
        said.into_owned()
    }
}

#[test]
fn each_project_has_a_readme_pinned_packages_and_a_test() {
    let tests = [
        include_str!("examples/publishers.rs"),
        include_str!("examples/consumers.rs"),
    ]
    .concat();
    let mut seen = BTreeSet::new();
    for entry in std::fs::read_dir(checkout().join("examples")).expect("a folder") {
        let path = entry.expect("an entry").path();
        if !path.is_dir() {
            continue;
        }
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .expect("UTF-8")
            .to_owned();
        assert!(
            tests.contains(&format!("fn {}_", name.replace('-', "_"))),
            "{name} has no test"
        );
        let (blocks, _) = parse(&format!("examples/{name}/README.md"));
        assert!(
            blocks.iter().any(|block| block.language == "sh"),
            "{name}: how is it run?"
        );
        let pinned = ["package-lock.json", "Cargo.lock", "Publish.java"]
            .iter()
            .any(|file| path.join(file).is_file());
        let requirements = std::fs::read_to_string(path.join("requirements.txt")).unwrap_or_default();
        let mut wanted = requirements.lines().filter(|line| !line.starts_with('#')).peekable();
        let is_pinned = pinned || (wanted.peek().is_some() && wanted.all(|line| line.contains("==")));
        assert!(is_pinned, "{name}: its packages are not pinned");
        seen.insert(name);
    }
    let (_, index) = parse("examples/README.md");
    for name in &seen {
        assert!(
            index.contains(&format!("]({name}/README.md)")),
            "examples/README.md does not name {name}"
        );
    }
}
