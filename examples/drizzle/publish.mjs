// Publishes with Drizzle: by a function, and by a table. Connects with PGHOST, PGUSER... of the environment.
import { randomUUID } from 'node:crypto';
import { sql } from 'drizzle-orm';
import { drizzle } from 'drizzle-orm/node-postgres';
import { bigint, integer, json, numeric, pgSchema, pgTable, text, uuid } from 'drizzle-orm/pg-core';
import pg from 'pg';

const orders = pgTable('orders', {
  id: bigint({ mode: 'number' }).primaryKey().generatedAlwaysAsIdentity(),
  customer: text().notNull(),
  total: numeric({ precision: 10, scale: 2 }).notNull(),
});

// A row of the outbox: inserting one publishes an event.
const events = pgSchema('outbox').table('events', {
  event_id: uuid().primaryKey().defaultRandom(), // the server's
  event_type: text().notNull(),
  source: text().notNull(),
  data: json(),
  subject: text(),
  backend: text(),
  stream: text(),
  data_schema: text(),
  publisher_config: json(),
  max_retries: integer(),
});

// Publishes within the transaction; the options are arguments of outbox.publish_event.
async function publish(tx, type, data, options = {}) {
  const named = Object.entries(options).map(([name, value]) => sql`, ${sql.identifier(name)} => ${value}`);
  const { rows } = await tx.execute(sql`select outbox.publish_event(${type}, 'shop', ${data}${sql.join(named)}) as id`);
  return rows[0].id;
}

const pool = new pg.Pool();
const db = drizzle({ client: pool });

// The order and its events, or nothing.
await db.transaction(async (tx) => {
  const [order] = await tx.insert(orders).values({ customer: 'Ada', total: '9.90' }).returning();
  const data = { order_id: order.id };
  const placed = { ...data, total: order.total };
  console.log('order.placed', await publish(tx, 'order.placed', placed, { subject: `order/${order.id}` }));
  const publisher_config = { tenant: 'acme' }; // a further field of the entry
  console.log('order.paid', await publish(tx, 'order.paid', data, { max_retries: 5, publisher_config }));
  const scheduled_at = new Date(Date.now() + 14 * 24 * 3600 * 1000);
  console.log('order.reminder', await publish(tx, 'order.reminder', data, { scheduled_at }));

  const [imported] = await tx.insert(events).values({ event_type: 'order.imported', source: 'shop', data }).returning();
  console.log('order.imported', imported.event_id);

  // With your own id, an event is published once, even if the statement is repeated.
  const shipped = { event_id: randomUUID(), event_type: 'order.shipped', source: 'shop', data };
  for (let tries = 0; tries < 2; tries++) {
    await tx.insert(events).values(shipped).onConflictDoNothing({ target: events.event_id });
  }
  console.log('order.shipped', shipped.event_id);
});

await db.transaction(async (tx) => {
  await publish(tx, 'order.cancelled', {});
  tx.rollback(); // and no event is sent
}).catch((error) => console.error(error.message));
await pool.end();
