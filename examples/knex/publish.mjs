// Publishes with Knex: by a function, and by an insert. Connects with PGHOST, PGUSER... of the environment.
import { randomUUID } from 'node:crypto';
import createKnex from 'knex';

const knex = createKnex({ client: 'pg', connection: {} });

// Publishes within the transaction; the options are arguments of outbox.publish_event.
async function publish(trx, type, data, options = {}) {
  const names = Object.keys(options).map((name) => `, ${name} => :${name}`).join('');
  const values = { type, data, ...options };
  const { rows } = await trx.raw(`select outbox.publish_event(:type, 'shop', :data${names}) as id`, values);
  return rows[0].id;
}

// The order and its events, or nothing.
await knex.transaction(async (trx) => {
  const [order] = await trx('orders').insert({ customer: 'Ada', total: '9.90' }).returning('*');
  const data = { order_id: Number(order.id) };
  const placed = { ...data, total: order.total };
  console.log('order.placed', await publish(trx, 'order.placed', placed, { subject: `order/${order.id}` }));
  const publisher_config = { tenant: 'acme' }; // a further field of the entry
  console.log('order.paid', await publish(trx, 'order.paid', data, { max_retries: 5, publisher_config }));
  const scheduled_at = new Date(Date.now() + 14 * 24 * 3600 * 1000);
  console.log('order.reminder', await publish(trx, 'order.reminder', data, { scheduled_at }));

  const events = () => trx.withSchema('outbox').table('events');
  const event = { event_type: 'order.imported', source: 'shop', data };
  const [imported] = await events().insert(event).returning('event_id');
  console.log('order.imported', imported.event_id);

  // With your own id, an event is published once, even if the statement is repeated.
  const shipped = { event_id: randomUUID(), event_type: 'order.shipped', source: 'shop', data };
  for (let tries = 0; tries < 2; tries++) await events().insert(shipped).onConflict('event_id').ignore();
  console.log('order.shipped', shipped.event_id);
});

await knex.transaction(async (trx) => {
  await publish(trx, 'order.cancelled', {});
  throw new Error('the customer thinks again'); // and no event is sent
}).catch((error) => console.error(error.message));
await knex.destroy();
