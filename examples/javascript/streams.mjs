// Follows the comments, and resumes after the last one that it has seen.
import { events } from "./events.mjs";

const api = process.env.API_URL ?? "http://127.0.0.1:8080";
const open = (headers) => fetch(`${api}/api/v1/comments/stream`, { headers });
const first = async (stream) => (await events(stream).next()).value;

const stream = await open({});
for (const text of ["one", "two"]) {
  await fetch(`${api}/api/v1/comments`, { method: "POST", body: new URLSearchParams({ text }) });
}
const { id, data } = await first(stream);
console.log(data.text);
const resumed = await first(await open({ "Last-Event-ID": id }));
console.log(resumed.data.text);
process.exit(); // the streams are still open
