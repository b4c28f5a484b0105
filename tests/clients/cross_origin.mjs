// Uses the API from pages of other origins in a headless Chromium: `node cross_origin.mjs CHROMIUM API_URL PAGE_PORT`.
// The API lets pages of http://localhost:PAGE_PORT in, and no others. The variable API_KEY is of the subject `ann`.
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { launch } from "./chromium.mjs";

const [chromium, api, port] = process.argv.slice(2);
const key = process.env.API_KEY;
const server = createServer((_, answer) => answer.setHeader("content-type", "text/html").end("<!doctype html>"));
await new Promise((listening) => server.listen(Number(port), "127.0.0.1", listening));
const browser = await launch(chromium);

// Runs a function in a page of this origin, and returns what it returns.
async function run(origin, script, ...words) {
  const session = await browser.page();
  await browser.call("Page.enable", {}, session);
  const loaded = new Promise((done) => browser.onEvent(({ method }) => method === "Page.loadEventFired" && done()));
  await browser.call("Page.navigate", { url: `${origin}/` }, session);
  await loaded;
  const expression = `(${script})(...${JSON.stringify(words)})`;
  const options = { expression, awaitPromise: true, returnByValue: true };
  const { result, exceptionDetails } = await browser.call("Runtime.evaluate", options, session);
  assert(!exceptionDetails, JSON.stringify(exceptionDetails));
  return result.value;
}

async function requests(api, key) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const ask = async (path, options) => {
    try {
      const answer = await fetch(api + path, options);
      const text = await answer.text();
      const position = answer.headers.get("postrider-position") !== null;
      return { status: answer.status, position, code: text.startsWith("{") ? JSON.parse(text).code : undefined };
    } catch (error) {
      return { blocked: error.name };
    }
  };
  const body = (key) => JSON.stringify({ key, value: 1 });
  return {
    write: await ask("/push", { method: "POST", headers, body: body("preflighted") }),
    withCredentials: await ask("/push", { method: "POST", headers, credentials: "include", body: body("included") }),
    delete: await ask("/pull/preflighted", { method: "DELETE", headers }),
    read: await ask("/pull/absent", { headers }),
    unauthenticated: await ask("/pull/absent", {}),
    forbidden: await ask("/posts/1", { headers }),
    unknown: await ask("/nothing", { headers }),
    // Browsers send a form without asking first.
    form: await ask("/push", { method: "POST", body: new URLSearchParams({ key: "form" }) }),
  };
}

async function connections(api, key) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const ticket = async () => (await (await fetch(`${api}/auth/ticket`, { method: "POST", headers })).json()).ticket;
  const query = async () => `receiverId=ann&ticket=${await ticket()}`;
  const socket = new WebSocket(`${api.replace("http", "ws")}/api/v1/websocket/message?${await query()}`);
  const received = new Promise((done) => (socket.onmessage = ({ data }) => done(JSON.parse(data).content)));
  await new Promise((open, failed) => ((socket.onopen = open), (socket.onerror = () => failed(new Error("socket")))));
  const source = new EventSource(`${api}/api/v1/messages/stream?${await query()}`);
  const streamed = new Promise((done) => (source.onmessage = ({ data }) => done(JSON.parse(data).content)));
  await new Promise((open, failed) => ((source.onopen = open), (source.onerror = () => failed(new Error("stream")))));
  const message = { chatId: "c", senderId: "ann", receiverId: "ann", content: "hello" };
  const sent = await fetch(`${api}/api/v1/message/action`, { method: "POST", headers, body: JSON.stringify(message) });
  return { sent: sent.status, received: await received, streamed: await streamed };
}

async function opens(url) {
  const socket = new WebSocket(url);
  return new Promise((done) => ((socket.onopen = () => done(true)), (socket.onerror = () => done(false))));
}

async function newTicket() {
  const headers = { authorization: `Bearer ${key}` };
  return (await (await fetch(`${api}/auth/ticket`, { method: "POST", headers })).json()).ticket;
}

const [allowed, foreign] = [`http://localhost:${port}`, `http://127.0.0.1:${port}`];
assert.deepEqual(await run(allowed, requests, api, key), {
  write: { status: 202, position: true },
  withCredentials: { status: 202, position: true },
  delete: { status: 202, position: true },
  read: { status: 404, position: false, code: "key_not_found" },
  unauthenticated: { status: 401, position: false, code: "unauthenticated" },
  forbidden: { status: 403, position: false, code: "forbidden" },
  unknown: { status: 404, position: false, code: "not_found" },
  form: { status: 401, position: false, code: "unauthenticated" },
});
assert.deepEqual(await run(allowed, connections, api, key), { sent: 200, received: "hello", streamed: "hello" });

for (const [name, outcome] of Object.entries(await run(foreign, requests, api, key))) {
  assert.deepEqual(outcome, { blocked: "TypeError" }, name);
}
const socket = async () =>
  `${api.replace("http", "ws")}/api/v1/websocket/message?receiverId=ann&ticket=${await newTicket()}`;
assert.equal(await run(foreign, opens, await socket()), false);
assert.equal(await run(allowed, opens, await socket()), true);
await browser.close();
server.close();
console.log("pages of other origins get what they may");
