// Publishes with TypeORM: by a function, and by an entity. Connects with DATABASE_URL.
import { randomUUID } from 'node:crypto';
import { DataSource, EntitySchema } from 'typeorm';

const Order = new EntitySchema({
  name: 'Order',
  tableName: 'orders',
  columns: {
    id: { type: 'bigint', primary: true, generated: 'identity', generatedIdentity: 'ALWAYS' },
    customer: { type: 'text' },
    total: { type: 'numeric', precision: 10, scale: 2 },
  },
});

// A row of the outbox: saving one publishes an event.
const Event = new EntitySchema({
  name: 'Event',
  schema: 'outbox',
  tableName: 'events',
  synchronize: false,
  columns: {
    event_id: { type: 'uuid', primary: true, generated: 'uuid' },
    event_type: { type: 'text' },
    source: { type: 'text' },
    data: { type: 'json', nullable: true },
    subject: { type: 'text', nullable: true },
    backend: { type: 'text', nullable: true },
    stream: { type: 'text', nullable: true },
    data_schema: { type: 'text', nullable: true },
    publisher_config: { type: 'json', nullable: true },
    max_retries: { type: 'integer', nullable: true },
  },
});

// Publishes within the manager's transaction; the options are arguments of outbox.publish_event.
async function publish(manager, type, data, options = {}) {
  const names = Object.keys(options).map((name, place) => `, ${name} => $${place + 3}`).join('');
  const sql = `select outbox.publish_event($1, 'shop', $2${names}) as id`;
  const [{ id }] = await manager.query(sql, [type, data, ...Object.values(options)]);
  return id;
}

const source = new DataSource({ type: 'postgres', url: process.env.DATABASE_URL, entities: [Order, Event] });
await source.initialize();

// The order and its events, or nothing.
await source.transaction(async (manager) => {
  const order = await manager.save(Order, { customer: 'Ada', total: '9.90' });
  const data = { order_id: Number(order.id) };
  const placed = { ...data, total: order.total };
  console.log('order.placed', await publish(manager, 'order.placed', placed, { subject: `order/${order.id}` }));
  const publisher_config = { tenant: 'acme' }; // a further field of the entry
  console.log('order.paid', await publish(manager, 'order.paid', data, { max_retries: 5, publisher_config }));
  const scheduled_at = new Date(Date.now() + 14 * 24 * 3600 * 1000);
  console.log('order.reminder', await publish(manager, 'order.reminder', data, { scheduled_at }));

  const imported = await manager.save(Event, { event_type: 'order.imported', source: 'shop', data });
  console.log('order.imported', imported.event_id);

  // With your own id, an event is published once, even if the statement is repeated.
  const shipped = { event_id: randomUUID(), event_type: 'order.shipped', source: 'shop', data };
  for (let tries = 0; tries < 2; tries++) {
    await manager.createQueryBuilder().insert().into(Event).values(shipped).orIgnore().execute();
  }
  console.log('order.shipped', shipped.event_id);
});

await source.transaction(async (manager) => {
  await publish(manager, 'order.cancelled', {});
  throw new Error('the customer thinks again'); // and no event is sent
}).catch((error) => console.error(error.message));
await source.destroy();
