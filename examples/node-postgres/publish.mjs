// Publishes with node-postgres. Connects with PGHOST, PGUSER... of the environment.
import { randomUUID } from 'node:crypto';
import pg from 'pg';

const db = new pg.Client();
await db.connect();

// Publishes within the transaction of the connection; the options are arguments of outbox.publish_event.
async function publish(type, data, options = {}) {
  const names = Object.keys(options).map((name, place) => `, ${name} => $${place + 3}`).join('');
  const sql = `select outbox.publish_event($1, 'shop', $2${names}) as id`;
  const { rows } = await db.query(sql, [type, data, ...Object.values(options)]);
  return rows[0].id;
}

await db.query('begin'); // the order and its events, or nothing
const insert = "insert into orders (customer, total) values ('Ada', 9.90) returning id, total";
const { rows: [order] } = await db.query(insert);
// A bigint and a numeric are strings in JavaScript.
const data = { order_id: Number(order.id) };
const placed = { ...data, total: order.total };
console.log('order.placed', await publish('order.placed', placed, { subject: `order/${order.id}` }));
const publisher_config = { tenant: 'acme' }; // a further field of the entry
console.log('order.paid', await publish('order.paid', data, { max_retries: 5, publisher_config }));
const scheduled_at = new Date(Date.now() + 14 * 24 * 3600 * 1000);
console.log('order.reminder', await publish('order.reminder', data, { scheduled_at }));

// The same by a plain INSERT, which takes RETURNING. With your own id, an event is published once, even if the statement is repeated.
const imported = "insert into outbox.events (event_type, source, data) values ($1, 'shop', $2) returning event_id";
console.log('order.imported', (await db.query(imported, ['order.imported', data])).rows[0].event_id);
const shipped = randomUUID();
const once = `insert into outbox.events (event_id, event_type, source, data) values ($1, 'order.shipped', 'shop', $2)
  on conflict (event_id) do nothing`;
for (let tries = 0; tries < 2; tries++) await db.query(once, [shipped, data]);
console.log('order.shipped', shipped);
await db.query('commit');

await db.query('begin');
await publish('order.cancelled', data);
await db.query('rollback'); // and no event is sent
await db.end();
