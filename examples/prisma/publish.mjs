// Publishes with Prisma: by $queryRaw, and by a model. Connects with DATABASE_URL.
import { randomUUID } from 'node:crypto';
import { PrismaPg } from '@prisma/adapter-pg';
import { PrismaClient } from '@prisma/client';

const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString: process.env.DATABASE_URL }) });

// Publishes within the transaction; the options are arguments of outbox.publish_event.
async function publish(tx, type, data, { subject, backend, scheduled_at, max_retries, publisher_config } = {}) {
  const [{ id }] = await tx.$queryRaw`
    select outbox.publish_event(${type}, 'shop', ${data}, subject => ${subject}, backend => ${backend},
      scheduled_at => ${scheduled_at}, max_retries => ${max_retries}, publisher_config => ${publisher_config}) as id`;
  return id;
}

// The order and its events, or nothing.
await prisma.$transaction(async (tx) => {
  const order = await tx.order.create({ data: { customer: 'Ada', total: '9.90' } });
  const data = { order_id: Number(order.id) };
  const placed = { ...data, total: order.total.toFixed(2) };
  console.log('order.placed', await publish(tx, 'order.placed', placed, { subject: `order/${order.id}` }));
  const publisher_config = { tenant: 'acme' }; // a further field of the entry
  console.log('order.paid', await publish(tx, 'order.paid', data, { max_retries: 5, publisher_config }));
  const scheduled_at = new Date(Date.now() + 14 * 24 * 3600 * 1000);
  console.log('order.reminder', await publish(tx, 'order.reminder', data, { scheduled_at }));

  const imported = await tx.event.create({ data: { event_type: 'order.imported', source: 'shop', data } });
  console.log('order.imported', imported.event_id);

  // With your own id, an event is published once, even if the statement is repeated.
  const shipped = { event_id: randomUUID(), event_type: 'order.shipped', source: 'shop', data };
  for (let tries = 0; tries < 2; tries++) await tx.event.createMany({ data: [shipped], skipDuplicates: true });
  console.log('order.shipped', shipped.event_id);
});

await prisma.$transaction(async (tx) => {
  await publish(tx, 'order.cancelled', {});
  throw new Error('the customer thinks again'); // and no event is sent
}).catch((error) => console.error(error.message));
await prisma.$disconnect();
