//! Publishes with sqlx. Connects with DATABASE_URL.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

/// Further arguments of outbox.publish_event; there are more.
#[derive(Default)]
struct Options<'a> {
    subject: Option<&'a str>,
    scheduled_at: Option<DateTime<Utc>>,
    max_retries: Option<i32>,
    publisher_config: Option<Value>,
}

/// Publishes within the transaction of the connection.
async fn publish(db: &mut PgConnection, event_type: &str, data: &Value, options: Options<'_>) -> sqlx::Result<Uuid> {
    let sql = "select outbox.publish_event($1, 'shop', $2, subject => $3, scheduled_at => $4, max_retries => $5,
        publisher_config => $6)";
    let query = sqlx::query_scalar(sql).bind(event_type).bind(data).bind(options.subject).bind(options.scheduled_at);
    query.bind(options.max_retries).bind(options.publisher_config).fetch_one(db).await
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;

    // The order and its events, or nothing.
    let mut transaction = pool.begin().await?;
    let insert = "insert into orders (customer, total) values ('Ada', 9.90) returning id, total::text";
    let (id, total): (i64, String) = sqlx::query_as(insert).fetch_one(&mut *transaction).await?;
    let placed = json!({"order_id": id, "total": total});
    let subject = format!("order/{id}");
    let options = Options { subject: Some(&subject), ..Options::default() };
    println!("order.placed {}", publish(&mut transaction, "order.placed", &placed, options).await?);
    let data = json!({"order_id": id});
    // A further field of the entry, and a number of attempts.
    let config = Some(json!({"tenant": "acme"}));
    let options = Options { max_retries: Some(5), publisher_config: config, ..Options::default() };
    println!("order.paid {}", publish(&mut transaction, "order.paid", &data, options).await?);
    let options = Options { scheduled_at: Some(Utc::now() + TimeDelta::days(14)), ..Options::default() };
    println!("order.reminder {}", publish(&mut transaction, "order.reminder", &data, options).await?);

    // The same by a plain INSERT, which takes RETURNING. With your own id, an event is published once, even if the
    // statement is repeated.
    let sql = "insert into outbox.events (event_type, source, data) values ($1, 'shop', $2) returning event_id";
    let imported: Uuid = sqlx::query_scalar(sql).bind("order.imported").bind(&data).fetch_one(&mut *transaction).await?;
    println!("order.imported {imported}");
    let shipped = Uuid::new_v4();
    let once = "insert into outbox.events (event_id, event_type, source, data) values ($1, 'order.shipped', 'shop', $2)
        on conflict (event_id) do nothing";
    for _ in 0..2 {
        sqlx::query(once).bind(shipped).bind(&data).execute(&mut *transaction).await?;
    }
    println!("order.shipped {shipped}");
    transaction.commit().await?;

    let mut transaction = pool.begin().await?;
    publish(&mut transaction, "order.cancelled", &data, Options::default()).await?;
    transaction.rollback().await?; // and no event is sent
    pool.close().await;
    Ok(())
}
