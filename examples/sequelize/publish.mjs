// Publishes with Sequelize: by a function, and by a model. Connects with DATABASE_URL.
import { randomUUID } from 'node:crypto';
import { DataTypes, QueryTypes, Sequelize } from 'sequelize';

const db = new Sequelize(process.env.DATABASE_URL, { logging: false, define: { timestamps: false } });

const Order = db.define('Order', {
  id: { type: DataTypes.BIGINT, primaryKey: true, autoIncrement: true },
  customer: DataTypes.TEXT,
  total: DataTypes.DECIMAL(10, 2),
}, { tableName: 'orders' });

// A row of the outbox: creating one publishes an event.
const Event = db.define('Event', {
  event_id: { type: DataTypes.UUID, primaryKey: true, defaultValue: DataTypes.UUIDV4 },
  event_type: DataTypes.TEXT,
  source: DataTypes.TEXT,
  data: DataTypes.JSON,
  subject: DataTypes.TEXT,
  backend: DataTypes.TEXT,
  stream: DataTypes.TEXT,
  data_schema: DataTypes.TEXT,
  publisher_config: DataTypes.JSON,
  max_retries: DataTypes.INTEGER,
}, { schema: 'outbox', tableName: 'events' });

// Publishes within the transaction; the options are arguments of outbox.publish_event.
async function publish(transaction, type, data, options = {}) {
  const names = Object.keys(options).map((name, place) => `, ${name} => $${place + 3}`).join('');
  const sql = `select outbox.publish_event($1, 'shop', $2${names}) as id`;
  const bind = [type, data, ...Object.values(options)];
  const [{ id }] = await db.query(sql, { bind, type: QueryTypes.SELECT, transaction });
  return id;
}

// The order and its events, or nothing.
await db.transaction(async (transaction) => {
  const order = await Order.create({ customer: 'Ada', total: '9.90' }, { transaction });
  const data = { order_id: Number(order.id) };
  const placed = { ...data, total: order.total };
  console.log('order.placed', await publish(transaction, 'order.placed', placed, { subject: `order/${order.id}` }));
  const publisher_config = { tenant: 'acme' }; // a further field of the entry
  console.log('order.paid', await publish(transaction, 'order.paid', data, { max_retries: 5, publisher_config }));
  const scheduled_at = new Date(Date.now() + 14 * 24 * 3600 * 1000);
  console.log('order.reminder', await publish(transaction, 'order.reminder', data, { scheduled_at }));

  const imported = await Event.create({ event_type: 'order.imported', source: 'shop', data }, { transaction });
  console.log('order.imported', imported.event_id);

  // With your own id, an event is published once, even if the statement is repeated.
  const shipped = { event_id: randomUUID(), event_type: 'order.shipped', source: 'shop', data };
  for (let tries = 0; tries < 2; tries++) await Event.bulkCreate([shipped], { ignoreDuplicates: true, transaction });
  console.log('order.shipped', shipped.event_id);
});

await db.transaction(async (transaction) => {
  await publish(transaction, 'order.cancelled', {});
  throw new Error('the customer thinks again'); // and no event is sent
}).catch((error) => console.error(error.message));
await db.close();
