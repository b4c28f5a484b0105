// Uses the API with tokens of oauth2-mock-server: `node issuer.mjs API_URL PORT`. The API accepts the issuer
// http://localhost:PORT, whose keys change, and which then stops.
import assert from "node:assert/strict";
import { OAuth2Server } from "oauth2-mock-server";

const [api, port] = process.argv.slice(2);
const server = new OAuth2Server();
await server.issuer.keys.generate("RS256", { kid: "first" });
await server.start(Number(port), "localhost");
server.service.on("beforeTokenSigning", (token) => {
  Object.assign(token.payload, { aud: "postrider", sub: "ann", scope: "openid messages:read" });
});

// Returns a token as a program gets it, by the grant for client credentials.
async function token() {
  const body = new URLSearchParams({ grant_type: "client_credentials", scope: "openid" });
  const answer = await fetch(`http://localhost:${port}/token`, { method: "POST", body });
  return (await answer.json()).access_token;
}

async function status(token, receiver = "ann") {
  const headers = { authorization: `Bearer ${token}` };
  return (await fetch(`${api}/api/v1/messages?receiverId=${receiver}`, { headers })).status;
}

const first = await token();
for (const end = Date.now() + 20_000; (await status(first)) !== 200; ) {
  assert(Date.now() < end, "the token is not accepted within 20 s");
  await new Promise((wake) => setTimeout(wake, 100));
}
assert.equal(await status(first, "bob"), 403);

// The key changes. Of several, the server signs with each in turn.
await server.issuer.keys.generate("ES256", { kid: "second" });
const kids = new Map();
while (kids.size < 2) {
  const next = await token();
  kids.set(JSON.parse(Buffer.from(next.split(".")[0], "base64url")).kid, next);
}
assert.equal(await status(kids.get("second")), 200);

await server.stop();
assert.equal(await status(kids.get("second")), 200, "the issuer is away");
const fresh = kids.get("first");
assert.equal(await status(fresh), 200, "the issuer is away");
assert.equal(await status(`${fresh.slice(0, -4)}AAAA`), 401);
console.log("tokens of the issuer are accepted");
