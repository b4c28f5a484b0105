// Does the README's tour with a client whose types are generated from the API description.
import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

const { API_URL, TOPIC } = process.env;
assert(API_URL && TOPIC, "API_URL and TOPIC are set");
const client = createClient<paths>({ baseUrl: API_URL });

// Calls `look` until it returns something, for at most 20 s.
async function eventually<T>(what: string, look: () => Promise<T | undefined>): Promise<T> {
  for (const end = Date.now() + 20_000; Date.now() < end; await new Promise((wake) => setTimeout(wake, 50))) {
    const found = await look();
    if (found !== undefined) return found;
  }
  throw new Error(`not within 20 s: ${what}`);
}

function given<T>(answer: { data?: T; error?: components["schemas"]["Problem"] | undefined; response: Response }): T {
  assert(answer.data !== undefined, `${answer.response.url}: ${JSON.stringify(answer.error)}`);
  return answer.data;
}

function text(answer: Parameters<typeof given<unknown>>[0]): string {
  const data = given(answer);
  assert(typeof data === "string");
  return data;
}

async function values() {
  const pushed = await client.POST("/push", { body: { key: "ts", value: { hello: ["world"] } } });
  assert.equal(given(pushed).status, "accepted");
  const position = pushed.response.headers.get("Postrider-Position");
  assert(position);
  const pull = { params: { path: { key: "ts" }, header: { "Postrider-After": position } } };
  assert.deepEqual(given(await client.GET("/pull/{key}", pull)), { key: "ts", value: { hello: ["world"] } });
  const deleted = await client.DELETE("/pull/{key}", { params: { path: { key: "ts" } } });
  pull.params.header["Postrider-After"] = deleted.response.headers.get("Postrider-Position") ?? "";
  const { error, response } = await client.GET("/pull/{key}", pull);
  assert.equal(response.status, 404);
  assert.equal(error?.code, "key_not_found");
}

async function records(topic: string) {
  const one = given(await client.POST("/produce", { body: { topic, key: "k", payload: { message: "Hello Kafka!" } } }));
  assert(typeof one === "object" && "offset" in one && one.topic === topic && one.message.startsWith("Message delivered"));
  const batch = await client.POST("/produce", {
    body: { topic, records: [{ key: "a", payload: 1 }, { key: "b" }, { key: "a", payload: 3 }] },
  });
  assert.equal(batch.response.status, 207);
  const mixed = given(batch);
  assert(typeof mixed === "object" && "results" in mixed);
  assert.deepEqual(mixed.results.map((result) => "offset" in result), [true, false, true]);
  const streamed = await client.POST("/produce", {
    params: { query: { topic } },
    headers: { "content-type": "application/x-ndjson" },
    body: '{"payload":1}\n{"payload":2}\n',
    bodySerializer: (body) => body,
    parseAs: "text",
  });
  const lines = text(streamed).trim().split("\n").map((line) => JSON.parse(line) as components["schemas"]["RecordResult"]);
  assert.deepEqual(lines.map((line) => line.success), [true, true]);
}

async function comments() {
  const body = { text: "nice", author_id: "ann", post_id: "ts-7" };
  const sent = given(await client.POST("/api/v1/comments", { body }));
  assert.deepEqual(sent.comment, body);
  const listed = await eventually("the comment is listed", async () => {
    const page = given(await client.GET("/api/v1/comments", { params: { query: { post_id: "ts-7" } } }));
    assert.equal(page.next_cursor, null);
    return page.comments[0];
  });
  assert.equal(listed.text, "nice");
  assert(Date.parse(listed.created_at) > 0);
  const resumed = { params: { header: { "Last-Event-ID": "0.0-0-0" } }, parseAs: "text" } as const;
  await eventually("the stream has the comment", async () =>
    text(await client.GET("/api/v1/comments/stream", resumed)).includes(listed.id) || undefined,
  );
}

async function messages() {
  const receiverId = "ts-bob";
  const body = { chatId: "c", senderId: "ann", receiverId, content: "hello" };
  assert.equal(given(await client.POST("/api/v1/message/action", { body, parseAs: "text" })), "Message Sent");
  const message = await eventually("the message is listed", async () => {
    const page = given(await client.GET("/api/v1/messages", { params: { query: { receiverId, limit: 1 } } }));
    return page.messages[0];
  });
  assert.deepEqual(message.data, body);
  const unread = given(await client.GET("/api/v1/messages/unread", { params: { query: { receiverId: [receiverId] } } }));
  assert("last" in unread && unread.unread === 1);
  const live = { params: { query: { receiverId } }, parseAs: "text" } as const;
  await eventually("the stream has the message", async () =>
    text(await client.GET("/api/v1/messages/stream", live)).includes('"content":"hello"') || undefined,
  );
  const after = given(await client.POST("/api/v1/messages/ack", { body: { receiverId, ack: unread.last } }));
  assert.equal(after.unread, 0);
  // Unknown (503) for a moment after the start with an empty Redis.
  const nobody = { params: { path: { id: "ts-nobody" } } };
  const presence = await eventually("presence is known", async () =>
    (await client.GET("/api/v1/presence/{id}", nobody)).data,
  );
  assert.equal(presence.state, "disconnected");
}

async function feeds() {
  const follow = { follower_id: "ts-bea", followee_id: "ts-ann" };
  assert.equal(given(await client.POST("/follow", { body: follow })).message, "followed successfully");
  const posted = given(await client.POST("/posts", { body: { author_id: "ts-ann", content: "first" } }));
  const read = { params: { path: { user_id: "ts-bea" }, query: { expand: "posts" } } };
  const page = await eventually("the post is in the feed", async () => {
    const page = given(await client.GET("/feeds/{user_id}", read));
    return page.post_ids.length > 0 ? page : undefined;
  });
  assert.deepEqual(page.post_ids, [posted.post_id]);
  assert.equal(page.posts?.[0]?.content, "first");
  given(await client.POST("/unfollow", { body: follow }));
  assert.deepEqual(given(await client.GET("/feeds/{user_id}", read)).post_ids, []);
}

async function service() {
  assert.equal(given(await client.GET("/health")).status, "healthy");
  const index = given(await client.GET("/", { headers: { accept: "application/json" } }));
  assert(typeof index === "object" && index.docs === "/docs");
  assert(given(await client.GET("/metrics", { parseAs: "text" })).includes("http_server_request_duration_seconds"));
  const letters = given(await client.GET("/admin/dlq", { params: { query: { since: "2h" } } }));
  assert.deepEqual(letters.letters, []);
}

await Promise.all([values(), records(TOPIC), comments(), messages(), feeds(), service()]);
console.log("the tour is done");
