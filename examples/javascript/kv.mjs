// Writes a value and reads it back: the read waits until it sees the write.
const api = process.env.API_URL ?? "http://127.0.0.1:8080";
const pushed = await fetch(`${api}/push`, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ key: "javascript", value: { visits: 2 } }),
});
const position = pushed.headers.get("Postrider-Position"); // 202: Kafka has the record
const pulled = await fetch(`${api}/pull/javascript`, { headers: { "Postrider-After": position } });
console.log((await pulled.json()).value);
