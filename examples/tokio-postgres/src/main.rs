//! Publishes with tokio-postgres. Connects with DATABASE_URL.

use chrono::{TimeDelta, Utc};
use serde_json::{Value, json};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Error, NoTls, Transaction};
use uuid::Uuid;

/// Publishes within the transaction; the options are arguments of outbox.publish_event.
async fn publish(
    transaction: &Transaction<'_>,
    event_type: &str,
    data: &Value,
    options: &[(&str, &(dyn ToSql + Sync))],
) -> Result<Uuid, Error> {
    let names: String = options.iter().zip(3..).map(|((name, _), place)| format!(", {name} => ${place}")).collect();
    let sql = format!("select outbox.publish_event($1, 'shop', $2{names})");
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&event_type, data];
    values.extend(options.iter().map(|(_, value)| *value));
    Ok(transaction.query_one(&sql, &values).await?.get(0))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut client, connection) = tokio_postgres::connect(&std::env::var("DATABASE_URL")?, NoTls).await?;
    let connection = tokio::spawn(connection);

    // The order and its events, or nothing.
    let transaction = client.transaction().await?;
    let insert = "insert into orders (customer, total) values ('Ada', 9.90) returning id, total::text";
    let order = transaction.query_one(insert, &[]).await?;
    let (id, total): (i64, &str) = (order.get(0), order.get(1));
    let placed = json!({"order_id": id, "total": total});
    let subject = format!("order/{id}");
    println!("order.placed {}", publish(&transaction, "order.placed", &placed, &[("subject", &subject)]).await?);
    let data = json!({"order_id": id});
    let config = json!({"tenant": "acme"}); // a further field of the entry
    let options: [(&str, &(dyn ToSql + Sync)); 2] = [("max_retries", &5), ("publisher_config", &config)];
    println!("order.paid {}", publish(&transaction, "order.paid", &data, &options).await?);
    let later = Utc::now() + TimeDelta::days(14);
    println!("order.reminder {}", publish(&transaction, "order.reminder", &data, &[("scheduled_at", &later)]).await?);

    // The same by a plain INSERT, which takes RETURNING. With your own id, an event is published once, even if the
    // statement is repeated.
    let imported = "insert into outbox.events (event_type, source, data) values ($1, 'shop', $2) returning event_id";
    let row = transaction.query_one(imported, &[&"order.imported", &data]).await?;
    println!("order.imported {}", row.get::<_, Uuid>(0));
    let shipped = Uuid::new_v4();
    let once = "insert into outbox.events (event_id, event_type, source, data) values ($1, 'order.shipped', 'shop', $2)
        on conflict (event_id) do nothing";
    for _ in 0..2 {
        transaction.execute(once, &[&shipped, &data]).await?;
    }
    println!("order.shipped {shipped}");
    transaction.commit().await?;

    let transaction = client.transaction().await?;
    publish(&transaction, "order.cancelled", &data, &[]).await?;
    transaction.rollback().await?; // and no event is sent
    drop(client);
    Ok(connection.await??)
}
