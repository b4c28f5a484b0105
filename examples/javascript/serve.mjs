// Serves browser.html, and forwards all other requests to postrider.
import { readFileSync } from "node:fs";
import { createServer, request } from "node:http";

const api = process.env.API_URL ?? "http://127.0.0.1:8080";
const forward = ({ method, url, headers }) => request(new URL(url, api), { method, headers });

const server = createServer((incoming, outgoing) => {
  if (incoming.url === "/") {
    return outgoing.end(readFileSync(new URL("browser.html", import.meta.url)));
  }
  const forwarded = forward(incoming);
  forwarded.on("response", (answer) => answer.pipe(outgoing.writeHead(answer.statusCode, answer.headers)));
  forwarded.on("error", () => outgoing.writeHead(502).end());
  outgoing.on("close", () => forwarded.destroy());
  incoming.pipe(forwarded);
});
server.on("upgrade", (incoming, client) => {
  const forwarded = forward(incoming).on("error", () => client.destroy()).end();
  forwarded.on("upgrade", ({ rawHeaders }, socket) => {
    const pairs = rawHeaders.flatMap((name, at) => (at % 2 ? [] : [`${name}: ${rawHeaders[at + 1]}\r\n`]));
    client.write(`HTTP/1.1 101 Switching Protocols\r\n${pairs.join("")}\r\n`);
    socket.pipe(client).pipe(socket);
  });
});
server.listen(Number(process.env.PORT ?? 8000), "127.0.0.1", () =>
  console.log(`http://127.0.0.1:${server.address().port}/`),
);
