// Writes a batch of records to a topic and prints where each one is.
import { randomUUID } from "node:crypto";

const api = process.env.API_URL ?? "http://127.0.0.1:8080";
const topic = process.env.TOPIC ?? "example";
const answer = await fetch(`${api}/produce`, {
  method: "POST",
  // With the same key, the request can be repeated after any failure.
  headers: { "Content-Type": "application/json", "Idempotency-Key": randomUUID() },
  body: JSON.stringify({ topic, records: [{ key: "a", payload: 1 }, { key: "b", payload: [2] }] }),
});
for (const { partition, offset } of (await answer.json()).results) console.log(partition, offset);
