// Sends a message and receives it as a server-sent event.
import { events } from "./events.mjs";

const api = process.env.API_URL ?? "http://127.0.0.1:8080";
const stream = await fetch(`${api}/api/v1/messages/stream?receiverId=javascript`);
await fetch(`${api}/api/v1/message/action`, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ chatId: "c", senderId: "ann", receiverId: "javascript", content: "hello" }),
});
for await (const { data } of events(stream)) {
  console.log(data.content);
  break;
}
