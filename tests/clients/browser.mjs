// Opens pages in a headless Chromium: `node browser.mjs CHROMIUM API_URL`. The API reference must show every operation,
// ask no other host, and break no rule of its policy; nor may the index.
import assert from "node:assert/strict";
import { launch } from "./chromium.mjs";

const [chromium, api] = process.argv.slice(2);
const browser = await launch(chromium);
const { call } = browser;

// Opens a page and waits until `expression` is true in it. Returns what went wrong meanwhile.
async function open(url, expression) {
  const sessionId = await browser.page();
  const faults = [];
  browser.onEvent(({ method, params }) => {
    if (method === "Network.requestWillBeSent") {
      const target = new URL(params.request.url);
      if (target.protocol !== "data:" && target.origin !== new URL(api).origin) faults.push(`request to ${target}`);
    }
    if (method === "Log.entryAdded") faults.push(`${params.entry.level}: ${params.entry.text} ${params.entry.url ?? ""}`);
    if (method === "Runtime.exceptionThrown") faults.push(JSON.stringify(params.exceptionDetails));
    if (method === "Runtime.consoleAPICalled" && ["error", "warning", "assert"].includes(params.type)) {
      faults.push(`console: ${JSON.stringify(params.args)}`);
    }
  });
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
await browser.close();
console.log(`${operations} operations are shown`);
