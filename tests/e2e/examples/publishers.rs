//! The events of the examples that publish are in the streams, and their output is true.

use std::path::PathBuf;

use kit::{Entry, TakenPort, env, ids, types, wait_eq, wait_until};
use serde_json::{Value, json};

use super::{Project, Shop};
use crate::documents::{Running, checkout};

/// The events that an example is expected to print, in order.
const PUBLISHED: [&str; 5] = [
    "order.placed",
    "order.paid",
    "order.reminder",
    "order.imported",
    "order.shipped",
];

/// What an example printed of its events: type and id.
fn announced(said: &str) -> Vec<(String, String)> {
    said.lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(event_type, _)| event_type.starts_with("order."))
        .map(|(event_type, id)| (event_type.to_owned(), id.to_owned()))
        .collect()
}

fn cloud_event(entry: &Entry) -> Value {
    serde_json::from_str(entry.field("cloud_event")).expect("JSON")
}

/// Compares the output of a publisher with the stream and the database.
#[track_caller]
fn check_published(shop: &Shop, said: &[(String, String)]) {
    let said_types: Vec<&str> = said.iter().map(|(event_type, _)| event_type.as_str()).collect();
    assert_eq!(said_types, PUBLISHED);
    let entries = shop.redis.wait_entries("events", 4);
    assert!(shop.one::<bool>("select outbox.drain('10 s')"));
    assert_eq!(shop.redis.xlen("events"), 4, "what was rolled back is not sent");
    let sent: Vec<_> = said
        .iter()
        .filter(|(event_type, _)| event_type != "order.reminder")
        .collect();
    let found = types(&entries).into_iter().zip(ids(&entries));
    for ((event_type, id), (found_type, found_id)) in sent.into_iter().zip(found) {
        assert_eq!(
            (event_type.as_str(), id.as_str()),
            (found_type, found_id.to_string().as_str())
        );
    }
    let placed = cloud_event(&entries[0]);
    assert_eq!(placed["data"], json!({"order_id": 1, "total": "9.90"}));
    assert_eq!(placed["subject"], "order/1");
    for entry in &entries[1..] {
        assert_eq!(cloud_event(entry)["data"], json!({"order_id": 1}));
    }
    assert_eq!(entries[1].field("tenant"), "acme");
    let attempts = format!("select max_retries from outbox.events where event_id = '{}'", said[1].1);
    assert_eq!(shop.one::<i32>(&attempts), 5);
    let scheduled = "select event_id::text from outbox.scheduled_events
        where scheduled_at - clock_timestamp() between '13 days 23 hours' and '14 days'";
    assert_eq!(shop.one::<String>(scheduled), said[2].1);
}

fn publishes(name: &str) {
    let shop = Shop::open();
    if let Some(project) = Project::prepare(&shop, name) {
        let said = project.output(project.command(&shop, &project.run));
        check_published(&shop, &announced(&said));
    }
}

#[test]
fn psycopg_publishes() {
    publishes("psycopg");
}

#[test]
#[ignore = "make test-examples"]
fn asyncpg_publishes() {
    publishes("asyncpg");
}

#[test]
#[ignore = "make test-examples"]
fn sqlalchemy_publishes() {
    publishes("sqlalchemy");
}

#[test]
#[ignore = "make test-examples"]
fn node_postgres_publishes() {
    publishes("node-postgres");
}

#[test]
#[ignore = "make test-examples"]
fn prisma_publishes() {
    publishes("prisma");
}

#[test]
#[ignore = "make test-examples"]
fn drizzle_publishes() {
    publishes("drizzle");
}

#[test]
#[ignore = "make test-examples"]
fn typeorm_publishes() {
    publishes("typeorm");
}

#[test]
#[ignore = "make test-examples"]
fn sequelize_publishes() {
    publishes("sequelize");
}

#[test]
#[ignore = "make test-examples"]
fn knex_publishes() {
    publishes("knex");
}

#[test]
#[ignore = "make test-examples"]
fn jdbc_publishes() {
    publishes("jdbc");
}

#[test]
#[ignore = "make test-examples"]
fn tokio_postgres_publishes() {
    publishes("tokio-postgres");
}

#[test]
#[ignore = "make test-examples"]
fn sqlx_publishes() {
    publishes("sqlx");
}

#[test]
#[ignore = "make test-examples"]
fn django_publishes_and_retries_in_its_admin() {
    let shop = Shop::open();
    shop.administer("django/setup.sql");
    let Some(project) = Project::prepare(&shop, "django") else {
        return;
    };
    let said = project.output(project.command(&shop, &project.run));
    check_published(&shop, &announced(&said));
    // Its tests run in separate databases, and send nothing.
    project.output(project.command(&shop, ".venv/bin/python manage.py test"));
    assert_eq!(shop.redis.xlen("events"), 4);
    // An event that Redis refuses for good, and accepts later.
    shop.redis.call(&["SET", "wrong", "no stream"]);
    let refused = "select outbox.publish_event('order.refused', 'shop', stream => 'wrong', max_retries => 1)";
    shop.pg.exec_db("app", refused);
    wait_eq("a failed event", 1, || {
        shop.one::<i64>("select count(*) from outbox.failed_events")
    });
    shop.redis.call(&["DEL", "wrong"]);
    let try_admin = checkout().join("tests/examples/try_admin.py");
    let mut command = project.command(&shop, ".venv/bin/python -");
    command.stdin(std::fs::File::open(try_admin).expect("it is there"));
    project.output(command);
    assert_eq!(types(&shop.redis.wait_entries("wrong", 1)), ["order.refused"]);
}

#[test]
#[ignore = "make test-examples"]
fn pytest_tests_an_application() {
    let shop = Shop::open();
    shop.administer("pytest/setup.sql");
    if let Some(project) = Project::prepare(&shop, "pytest") {
        project.output(project.command(&shop, &project.run));
        assert_eq!(shop.redis.xlen("events"), 0, "tests send nothing to the real stream");
        assert_eq!(shop.redis.xlen("test_events"), 1);
    }
}

/// Debian's PgBouncer, or the one that `scripts/test-examples` unpacked.
fn pgbouncer() -> PathBuf {
    std::env::var_os("PGBOUNCER").map_or_else(|| "pgbouncer".into(), PathBuf::from)
}

#[test]
#[ignore = "make test-examples"]
fn pgbouncer_passes_events_on() {
    let shop = Shop::open();
    shop.administer("pgbouncer/setup.sql");
    let Some(project) = Project::prepare(&shop, "pgbouncer") else {
        return;
    };
    let dir = env::server_dir("bouncer");
    let port = TakenPort::any();
    let ini = std::fs::read_to_string(project.dir.join("pgbouncer.ini")).expect("it is there");
    let ini = ini
        .replace("port=5432", &format!("port={}", shop.pg.port()))
        .replace("6432", &port.number.to_string());
    env::server_file(&dir.path().join("pgbouncer.ini"), ini.as_bytes(), 0o644);
    let users = std::fs::read(project.dir.join("userlist.txt")).expect("it is there");
    env::server_file(&dir.path().join("userlist.txt"), &users, 0o644);
    let mut server = env::server_command(pgbouncer());
    server.arg("-q").arg("pgbouncer.ini").current_dir(dir.path());
    let _running = Running(server.spawn().expect("pgbouncer starts"));
    let address = ("127.0.0.1", port.number);
    wait_until("pgbouncer to listen", || std::net::TcpStream::connect(address).is_ok());

    let mut command = project.command(&shop, &project.run);
    command.env("PGPORT", port.number.to_string());
    let said = announced(&project.output(command));
    assert_eq!(
        types(&shop.redis.wait_entries("archived_events", 1)),
        ["order.archived"]
    );
    let entries = shop.redis.wait_entries("events", 5);
    let of_default: Vec<&str> = PUBLISHED.into_iter().filter(|name| *name != "order.reminder").collect();
    assert_eq!(types(&entries), [of_default, vec!["order.closed"]].concat());
    assert_eq!(said.len(), 7);
    assert_eq!(said[6].1, ids(&entries)[4].to_string());
}
