// A headless Chromium, by the protocol that its developer tools speak: requests with an id, and events.
import { spawn } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";

// Starts the browser. `call` sends a request, `onEvent` sets who gets events, `close` ends it.
export async function launch(chromium) {
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
  return {
    call,
    onEvent: (listener) => {
      listen = listener;
    },
    // Opens an empty page, and returns its session.
    page: async () => {
      const { targetId } = await call("Target.createTarget", { url: "about:blank" });
      return (await call("Target.attachToTarget", { targetId, flatten: true })).sessionId;
    },
    close: async () => {
      await call("Browser.close");
      await new Promise((gone) => (browser.exitCode === null ? browser.on("exit", gone) : gone()));
      await rm(profile, { recursive: true, force: true });
    },
  };
}
