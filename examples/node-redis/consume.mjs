// Consumes with node-redis, as one worker of a group: each event has its effect once, even if workers die.
import pg from 'pg';
import { createClient } from 'redis';

const stream = await createClient({ url: process.env.REDIS_URL }).connect();
const db = new pg.Client();
await db.connect();
const [STREAM, GROUP, ME] = ['events', 'shipping', process.env.WORKER ?? 'worker-1'];
const MIN_IDLE_MS = Number(process.env.MIN_IDLE_MS ?? 60_000); // longer than handling one entry takes

await stream.xGroupCreate(STREAM, GROUP, '0', { MKSTREAM: true }).catch((error) => {
  if (!error.message.startsWith('BUSYGROUP')) throw error; // the group exists already
});

async function handle({ id, message }) {
  await db.query('begin');
  try {
    // In the transaction of the effects: a second delivery of the same event finds it recorded.
    const note = 'insert into handled (consumer, event_id) values ($1, $2) on conflict do nothing';
    const noted = await db.query(note, [GROUP, message.event_id]);
    if (noted.rowCount === 1) {
      const event = JSON.parse(message.cloud_event);
      await db.query('insert into effects (consumer, event_type) values ($1, $2)', [GROUP, event.type]);
    }
    await db.query('commit');
  } catch (error) {
    await db.query('rollback');
    throw error;
  }
  await stream.xAck(STREAM, GROUP, id);
}

let running = true;
process.on('SIGTERM', () => { running = false; });
while (running) {
  const left = await stream.xAutoClaim(STREAM, GROUP, ME, MIN_IDLE_MS, '0', { COUNT: 100 });
  const read = await stream.xReadGroup(GROUP, ME, { key: STREAM, id: '>' }, { COUNT: 100, BLOCK: 1000 });
  // null: trimmed meanwhile
  const entries = [...left.messages.filter((entry) => entry !== null), ...(read?.[0].messages ?? [])];
  for (const entry of entries) {
    // The entry stays pending, and is delivered again after MIN_IDLE_MS.
    await handle(entry).catch((error) => console.error(`${entry.message.event_id} failed: ${error.message}`));
  }
}
await stream.close();
await db.end();
