// Opens pages in a headless Chromium: `node browser.mjs CHROMIUM API_URL`. The API reference must show every operation,
// ask no other host, and break no rule of its policy; nor may the index.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [chromium, api] = process.argv.slice(2);
const profile = await mkdtemp(join(tmpdir(), "browser-"));
const options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", `--user-data-dir=${profile}`];
const browser = spawn(chromium, [...options, "about:blank"], { stdio: ["ignore", "ignore", "pipe"] });
process.on("exit", () => browser.kill("SIGKILL"));

const address = await new Promise((found, failed) => {
  let log = "";
  browser.stderr.on("data", (text) => {
    log += text;
    const [, address] = log.match(/listening on (ws:\S+)/) ?? [];
    if (address) found(address);
  });
  browser.on("exit", () => failed(new Error(log)));
});

// The protocol that the developer tools speak: requests with an id, and events.
const socket = new WebSocket(address);
await new Promise((open) => socket.addEventListener("open", open));
const answers = new Map();
let listen = () => {};
socket.addEventListener("message", ({ data }) => {
  const message = JSON.parse(data);
  if (!message.id) return listen(message);
  const { resolve, reject } = answers.get(message.id);
  if (message.error) reject(new Error(JSON.stringify(message.error)));
  else resolve(message.result);
});
function call(method, params = {}, sessionId) {
  const id = answers.size + 1;
  return new Promise((resolve, reject) => {
    answers.set(id, { resolve, reject });
    socket.send(JSON.stringify({ id, method, params, sessionId }));
  });
}

// Opens a page and waits until `expression` is true in it. Returns what went wrong meanwhile.
async function open(url, expression) {
  const { targetId } = await call("Target.createTarget", { url: "about:blank" });
  const { sessionId } = await call("Target.attachToTarget", { targetId, flatten: true });
  const faults = [];
  listen = ({ method, params }) => {
    if (method === "Network.requestWillBeSent") {
      const target = new URL(params.request.url);
      if (target.protocol !== "data:" && target.origin !== new URL(api).origin) faults.push(`request to ${target}`);
    }
    if (method === "Log.entryAdded") faults.push(`${params.entry.level}: ${params.entry.text} ${params.entry.url ?? ""}`);
    if (method === "Runtime.exceptionThrown") faults.push(JSON.stringify(params.exceptionDetails));
    if (method === "Runtime.consoleAPICalled" && ["error", "warning", "assert"].includes(params.type)) {
      faults.push(`console: ${JSON.stringify(params.args)}`);
    }
  };
  for (const domain of ["Network", "Log", "Runtime", "Page"]) await call(`${domain}.enable`, {}, sessionId);
  await call("Page.navigate", { url }, sessionId);
  for (const end = Date.now() + 30_000; ; await new Promise((wake) => setTimeout(wake, 100))) {
    const { result } = await call("Runtime.evaluate", { expression, returnByValue: true }, sessionId);
    if (result.value === true) return faults;
    assert(Date.now() < end, `not within 30 s in ${url}: ${expression} ${JSON.stringify(faults)}`);
  }
}

const { paths } = await (await fetch(`${api}/openapi.json`)).json();
const operations = Object.values(paths).flatMap((item) => Object.values(item)).length;
assert(operations > 30);
const shown = `document.querySelectorAll(".opblock").length === ${operations}`;
const opened = `(document.querySelector(".opblock-summary-control")?.click(), document.querySelector(".opblock .responses-wrapper") !== null)`;
assert.deepEqual(await open(`${api}/docs`, `${shown} && ${opened}`), []);
assert.deepEqual(await open(`${api}/`, `document.body.innerText.includes("/pull/{key}")`), []);
await call("Browser.close");
await new Promise((gone) => (browser.exitCode === null ? browser.on("exit", gone) : gone()));
await rm(profile, { recursive: true, force: true });
console.log(`${operations} operations are shown`);
