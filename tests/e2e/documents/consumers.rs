//! The consumers in the documents handle each event once.

use std::process::Stdio;

use kit::{ids, wait_eq, wait_until, xreadgroup};

use super::{Reader, Running, interpreter, runnable};

/// Starts the consumer of a document, and checks that it records each event once: new ones, and those that a dead
/// consumer of its group has left.
fn consume(document: &str, group: &str, language: &str) {
    let reader = Reader::new();
    let blocks = runnable(document);
    let table = blocks
        .iter()
        .find(|block| block.text.contains("create table handled"))
        .expect("a table");
    reader.sql(document, &table.text);
    let publish = "select outbox.publish_event('order.placed', 'shop', '{\"order_id\": 1}') from generate_series(1, 5)";
    reader.sql(document, publish);
    let first = ids(&reader.redis.wait_entries("events", 5));
    let takes_over = document != "README.md";
    reader.redis.call(&["XGROUP", "CREATE", "events", group, "0"]);
    if takes_over {
        reader.redis.call(&xreadgroup(group, "dead", &["COUNT", "2"], "events"));
    }
    let block = blocks
        .iter()
        .find(|block| block.language == language && block.does_not_end())
        .expect("a consumer");
    let port = reader.redis.port();
    let text = block
        .text
        .replace("redis.Redis(", &format!("redis.Redis(port={port}, "))
        .replace(
            "createClient()",
            &format!("createClient({{ url: 'redis://127.0.0.1:{port}' }})"),
        )
        .replace("60_000", "100")
        .replace("60000", "100");
    let log = std::fs::File::create(reader.dir.path().join("log")).expect("a file");
    let Some(mut command) = interpreter(&reader, language, &text) else {
        return;
    };
    command
        .stdout(log.try_clone().expect("it is open"))
        .stderr(log)
        .stdin(Stdio::null());
    let mut running = Running(command.spawn().expect("the consumer starts"));
    wait_until("the consumer to note what is there", || {
        let ended = running.0.try_wait().expect("its state");
        assert_eq!(
            ended,
            None,
            "{}",
            std::fs::read_to_string(reader.dir.path().join("log")).unwrap_or_default()
        );
        reader.pg.one_db::<i64>("app", "select count(*) from handled") == 5
    });
    reader.sql(document, publish);
    wait_eq("what it has noted", 10, || {
        reader.pg.one_db::<i64>("app", "select count(*) from handled")
    });
    let noted: i64 = reader.pg.one_db(
        "app",
        "select count(*) from handled h join outbox.events e on e.event_id = h.event_id",
    );
    assert_eq!((noted, first.len()), (10, 5));
    wait_until("all to be acknowledged", || {
        let pending = reader.redis.call(&["XPENDING", "events", group]);
        format!("{pending:?}").contains("int(0)")
    });
}

#[test]
fn the_readmes_consumer_reads_each_event_once() {
    consume("README.md", "billing", "python");
}

#[test]
fn the_guides_consumer_in_python_reads_each_event_once() {
    consume("docs/guide.md", "billing", "python");
}

#[test]
fn the_guides_consumer_in_javascript_reads_each_event_once() {
    consume("docs/guide.md", "shipping", "js");
}
