// Reads the entries of a stream as CloudEvents, with the SDK from npm. Prints each, and ends.
import { HTTP } from 'cloudevents';
import { createClient } from 'redis';

const stream = await createClient({ url: process.env.REDIS_URL }).connect();
const headers = { 'content-type': 'application/cloudevents+json' };
for (const { message } of await stream.xRange('events', '-', '+')) {
  const event = HTTP.toEvent({ headers, body: message.cloud_event });
  event.validate();
  console.log(event.type, event.id, event.source, event.time, event.subject, JSON.stringify(event.data));
}
await stream.close();
