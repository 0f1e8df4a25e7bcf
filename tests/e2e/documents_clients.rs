//! The clients that the guide shows only as text (Rails, Spring, Go, Ecto): their statements are run as their drivers
//! send them, by a role that may only publish.

use chrono::Utc;
use kit::{Stack, wait_eq};
use postgres::Client;
use postgres::types::{ToSql, Type};
use serde_json::json;
use uuid::Uuid;

use crate::documents::parse;

/// The languages of those clients, and how many statements each has.
const CLIENTS: [(&str, usize); 4] = [("ruby", 2), ("java", 2), ("go", 1), ("elixir", 2)];

/// The statements of a block that use schema outbox: string literals, and comments that show what an ORM makes.
fn statements(block: &str) -> Vec<String> {
    let is_ours = |text: &str| {
        let text = text.to_lowercase();
        (text.starts_with("select ") || text.starts_with("insert ")) && text.contains("outbox")
    };
    let mut found = Vec::new();
    for line in block.lines().map(str::trim) {
        let comment = line.strip_prefix("# ").or_else(|| line.strip_prefix("// "));
        match comment {
            Some(text) if is_ours(text) => found.push(text.to_owned()),
            Some(_) => {}
            None => found.extend(line.split('"').filter(|text| is_ours(text)).map(str::to_owned)),
        }
    }
    found
}

/// Numbers the parameters as JDBC does.
fn numbered(sql: &str) -> String {
    let mut parts = sql.split('?');
    let first = parts.next().unwrap_or_default().to_owned();
    parts
        .zip(1..)
        .fold(first, |sql, (part, number)| format!("{sql}${number}{part}"))
}

/// Runs a statement with values of the types that the server expects, or that the driver has declared.
fn run(client: &mut Client, sql: &str, declared: &[Type]) {
    let statement = client
        .prepare_typed(sql, declared)
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    let values: Vec<Box<dyn ToSql + Sync>> = statement
        .params()
        .iter()
        .enumerate()
        .map(|(place, wanted)| -> Box<dyn ToSql + Sync> {
            match *wanted {
                Type::UUID => Box::new(Uuid::new_v4()),
                Type::JSON | Type::JSONB => Box::new(json!({"order_id": 1})),
                Type::TIMESTAMPTZ => Box::new(Utc::now()),
                // The data are the third parameter.
                _ if place == 2 && sql.starts_with("select") => Box::new(r#"{"order_id": 1}"#),
                _ => Box::new("order.placed"),
            }
        })
        .collect();
    let values: Vec<&(dyn ToSql + Sync)> = values.iter().map(AsRef::as_ref).collect();
    client
        .execute(&statement, &values)
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"));
}

#[test]
fn statements_of_clients_that_are_text_alone_publish() {
    let stack = Stack::start();
    stack
        .pg
        .exec("create role app login; select outbox.grant_publisher('app')");
    let mut client = stack.pg.client_as("app", "postgres");
    let (blocks, _) = parse("docs/guide.md");
    let mut published = 0;
    for (language, count) in CLIENTS {
        let of_client: Vec<String> = blocks
            .iter()
            .filter(|block| block.language == language)
            .flat_map(|block| statements(&block.text))
            .collect();
        assert_eq!(of_client.len(), count, "{language}: {of_client:#?}");
        for sql in of_client {
            if language == "java" {
                // setString; an entity's JSON is declared as jsonb, and its id as uuid.
                let is_insert = sql.starts_with("insert");
                let sql = numbered(&sql);
                let declared = if is_insert {
                    vec![Type::JSONB, Type::VARCHAR, Type::VARCHAR, Type::UUID]
                } else {
                    vec![Type::VARCHAR; 4]
                };
                run(&mut client, &sql, &declared);
            } else {
                run(&mut client, &sql, &[]);
            }
            published += 1;
            wait_eq(&sql, published, || stack.redis.xlen("events"));
        }
    }
}
