//! Tokens of an issuer.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::{
    auth::get,
    harness::{
        App, World,
        issuer::{SigningKey, base64url, jwks},
        socket::Socket,
        stack::off_runtime,
        target::{Act, Target},
        tools::Tools,
        until,
        wait::seconds,
    },
};

const ISSUER: &str = "https://issuer.example";
/// A route that a token with the scope `messages:read` for `ann` may use.
const MESSAGES: &str = "/api/v1/messages?receiverId=ann";
const SECRET: &str = "a-secret-that-is-shared-with-the-issuer";

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// Returns claims that are accepted, for the subject `ann`, which may read values.
fn claims() -> Value {
    let scope = "openid kv:read messages:read";
    json!({"iss": ISSUER, "aud": ["other", "postrider"], "sub": "ann", "exp": now() + 300, "scope": scope})
}

fn changed(name: &str, value: Value) -> Value {
    let mut claims = claims();
    match value {
        Value::Null => drop(claims.as_object_mut().unwrap().remove(name)),
        value => claims[name] = value,
    }
    claims
}

async fn world(settings: &[(&str, &str)]) -> World {
    let mut world = World::new().await.with_postgres().await;
    world.set("POSTRIDER_AUTH__MODE", "required");
    world.set("POSTRIDER_AUTH__TOKEN__ISSUER", ISSUER);
    world.set("POSTRIDER_AUTH__TOKEN__AUDIENCES", "postrider");
    for (name, value) in settings {
        world.set(&format!("POSTRIDER_AUTH__TOKEN__{name}"), value);
    }
    world
}

/// Serves documents by their path.
async fn serve(documents: Vec<(&'static str, Value)>) -> Target {
    let target = Target::start().await;
    publish(&target, documents);
    target
}

fn publish(target: &Target, documents: Vec<(&'static str, Value)>) {
    let documents: Vec<(&str, &str)> =
        documents.into_iter().map(|(path, document)| (path, &*document.to_string().leak())).collect();
    target.decide(move |seen| {
        let found = documents.iter().find(|(path, _)| seen.head.starts_with(&format!("GET {path} ")));
        found.map_or(Act::status(404), |(_, document)| Act::Answer(200, "content-type: application/json\r\n", document))
    });
}

async fn status(app: &App, token: &str) -> u16 {
    get(app, token, MESSAGES).await.status
}

/// Waits until the keys of the issuer have been read.
async fn accepted(app: &App, token: &str) {
    until("the token is accepted", seconds(10), || async { (status(app, token).await == 200).then_some(()) }).await;
}

#[tokio::test]
async fn tokens_are_accepted_as_their_claims_and_the_issuers_keys_say() {
    let (rsa, ec, ed) = (SigningKey::rsa("r"), SigningKey::ec("e"), SigningKey::ed25519("d"));
    let issuer = serve(vec![("/keys", jwks(&[&rsa, &ec, &ed]))]).await;
    let world = world(&[("JWKS_URL", &issuer.url("/keys"))]).await;
    let app = world.app().role("api").start().await;
    for key in [&rsa, &ec, &ed] {
        accepted(&app, &key.sign(&claims())).await;
    }
    let reads = issuer.count();
    for (what, claims) in [
        ("a single audience", changed("aud", json!("postrider"))),
        ("scopes as a list", changed("scope", json!(["messages:read"]))),
        ("past its end, within the leeway", changed("exp", json!(now() - 30))),
        ("before its beginning, within the leeway", changed("nbf", json!(now() + 30))),
        ("the largest number as its end", changed("exp", json!(i64::MAX))),
        ("a fraction of a second", changed("exp", json!(now() as f64 + 100.5))),
    ] {
        assert_eq!(status(&app, &rsa.sign(&claims)).await, 200, "{what}");
    }
    let lacking = get(&app, &rsa.sign(&changed("scope", json!("kv:write openid"))), MESSAGES).await;
    assert_eq!(lacking.problem(403, "forbidden")["scope"], "messages:read");
    let lacking = get(&app, &rsa.sign(&changed("scope", Value::Null)), MESSAGES).await;
    lacking.problem(403, "forbidden");
    get(&app, &rsa.sign(&claims()), "/api/v1/messages?receiverId=bob").await.problem(403, "forbidden");
    for (what, claims) in [
        ("another issuer", changed("iss", json!("https://other.example"))),
        ("the issuer with a slash", changed("iss", json!("https://issuer.example/"))),
        ("no issuer", changed("iss", Value::Null)),
        ("another audience", changed("aud", json!(["other"]))),
        ("an audience that begins alike", changed("aud", json!("postrider2"))),
        ("no audience", changed("aud", Value::Null)),
        ("expired", changed("exp", json!(now() - 90))),
        ("no end", changed("exp", Value::Null)),
        ("an end that is a text", changed("exp", json!((now() + 300).to_string()))),
        ("not valid yet", changed("nbf", json!(now() + 90))),
        ("a beginning that is a text", changed("nbf", json!("tomorrow"))),
        ("no subject", changed("sub", Value::Null)),
        ("an empty subject", changed("sub", json!(""))),
        ("a subject that is a number", changed("sub", json!(7))),
        ("a long subject", changed("sub", json!("x".repeat(256)))),
        ("a subject with a control character", changed("sub", json!("a\u{1}b"))),
        ("a tenant that is a list", changed("tenant", json!(["acme"]))),
        ("an empty tenant", changed("tenant", json!(""))),
    ] {
        let refused = get(&app, &rsa.sign(&claims), MESSAGES).await;
        assert_eq!(refused.status, 401, "{what}: {refused:?}");
        assert_eq!(refused.header("www-authenticate"), "Bearer", "{what}");
        refused.problem(401, "unauthenticated");
    }
    assert_eq!(issuer.count(), reads, "tokens with known keys made it read the keys");
    app.stop().await;
}

#[tokio::test]
async fn forged_tokens_are_refused_and_logged_without_their_text() {
    let (rsa, foreign) = (SigningKey::rsa("r"), SigningKey::rsa("r"));
    let issuer = serve(vec![("/keys", jwks(&[&rsa]))]).await;
    let world = world(&[("JWKS_URL", &issuer.url("/keys"))]).await;
    let app = world.app().role("api").start().await;
    let good = rsa.sign(&claims());
    accepted(&app, &good).await;
    let parts: Vec<&str> = good.split('.').collect();
    let (head, body, signature) = (parts[0], parts[1], parts[2]);
    let headed = |head: Value| rsa.sign_with_head(&head, &claims());
    let unsigned = |head: Value| format!("{}.{body}.", base64url(head.to_string()));
    // The public key as the secret of an HMAC.
    let confused = |secret: &[u8]| {
        let key = SigningKey::hmac(secret);
        key.sign_with_head(&json!({"alg": "HS256", "kid": "r", "typ": "JWT"}), &claims())
    };
    let other_claims = base64url(changed("sub", json!("bob")).to_string());
    let pem = rsa.public_pem();
    let attacks = [
        ("alg none", unsigned(json!({"alg": "none"}))),
        ("alg None", unsigned(json!({"alg": "None"}))),
        ("alg NONE with the signature", format!("{}.{body}.{signature}", base64url(r#"{"alg":"NONE"}"#))),
        ("no alg", unsigned(json!({"typ": "JWT"}))),
        ("alg as a list", unsigned(json!({"alg": ["RS256"]}))),
        ("alg null", unsigned(json!({"alg": null}))),
        ("no signature", format!("{head}.{body}.")),
        ("two parts", format!("{head}.{body}")),
        ("four parts", format!("{good}.x")),
        ("five parts, as of an encrypted token", format!("{head}.x.x.x.x")),
        ("other claims", format!("{head}.{other_claims}.{signature}")),
        ("a signature cut off", good[..good.len() - 4].to_owned()),
        ("a signature with more", format!("{good}AAAA")),
        ("a key of somebody else with the same id", foreign.sign(&claims())),
        ("HS256 by the public key as PEM", confused(&pem)),
        ("HS256 by the public key without its last line break", confused(pem.trim_ascii_end())),
        ("HS256 by the modulus", confused(rsa.jwk()["n"].as_str().unwrap().as_bytes())),
        ("HS256 by nothing", confused(b"\0")),
        ("RS384, which is not accepted", headed(json!({"alg": "RS384", "kid": "r"}))),
        ("PS256, which is not accepted", headed(json!({"alg": "PS256", "kid": "r"}))),
        ("ES256 with an RSA key", headed(json!({"alg": "ES256", "kid": "r"}))),
        ("rs256 in small letters", headed(json!({"alg": "rs256", "kid": "r"}))),
        ("crit", headed(json!({"alg": "RS256", "kid": "r", "crit": ["b64"], "b64": false}))),
        ("crit that is empty", headed(json!({"alg": "RS256", "kid": "r", "crit": []}))),
        ("kid as a path", headed(json!({"alg": "RS256", "kid": "../../../../dev/null"}))),
        ("kid as SQL", headed(json!({"alg": "RS256", "kid": "r' OR '1'='1"}))),
        ("kid as a URL", headed(json!({"alg": "RS256", "kid": issuer.url("/keys")}))),
        ("kid as a number", headed(json!({"alg": "RS256", "kid": 1}))),
        ("kid as an object", headed(json!({"alg": "RS256", "kid": {"r": 1}}))),
        ("the forger's key in the head", {
            foreign.sign_with_head(&json!({"alg": "RS256", "kid": "x", "jwk": foreign.jwk()}), &claims())
        }),
        ("the forger's JWKS in the head", {
            foreign.sign_with_head(&json!({"alg": "RS256", "kid": "x", "jku": issuer.url("/evil")}), &claims())
        }),
        ("the forger's certificate in the head", {
            foreign.sign_with_head(&json!({"alg": "RS256", "kid": "x", "x5u": issuer.url("/evil")}), &claims())
        }),
        ("a head that is a list", format!("{}.{body}.{signature}", base64url("[]"))),
        ("a head that is not JSON", format!("{}.{body}.{signature}", base64url("{"))),
        ("a head with padding", format!("{head}==.{body}.{signature}")),
        ("claims that are a list", rsa.sign(&json!(["sub"]))),
        ("claims that are a text", rsa.sign(&json!("ann"))),
        ("a huge token", format!("{good}{}", "A".repeat(17 << 10))),
        ("a key that does not exist", "pr_live_0123456789abcdef_0123".to_owned()),
        ("the beginning of a key", "pr_live_".to_owned()),
        ("no token at all", "x".to_owned()),
        ("dots", "..".to_owned()),
    ];
    for (what, token) in &attacks {
        let refused = get(&app, token, MESSAGES).await;
        assert_eq!(refused.status, 401, "{what}: {refused:?}");
        refused.problem(401, "unauthenticated");
    }
    let log = app.log();
    let refused = log.lines().filter(|line| line.contains("credential refused")).count();
    assert_eq!(refused, attacks.len(), "each attack is logged once");
    for (what, token) in attacks.iter().filter(|(_, token)| token.len() > 20) {
        assert!(!log.contains(&token[..20]), "{what}: the log has the token");
    }
    assert!(issuer.seen().iter().all(|seen| !seen.head.contains("/evil")), "it fetched what a token names");
    app.stop().await;
}

#[tokio::test]
async fn the_issuer_may_change_its_keys_and_be_away() {
    let (old, new) = (SigningKey::ec("old"), SigningKey::ec("new"));
    let issuer = serve(vec![("/keys", jwks(&[&old]))]).await;
    let world = world(&[("JWKS_URL", &issuer.url("/keys")), ("REFRESH_SECONDS", "3600")]).await;
    let app = world.app().role("api").start().await;
    let fresh = |key: &SigningKey| key.sign(&changed("jti", json!(fastrand::u64(..))));
    accepted(&app, &fresh(&old)).await;

    // A token with a new key makes it read the keys, once: others of that kind wait for the interval.
    publish(&issuer, vec![("/keys", jwks(&[&old, &new]))]);
    let before = issuer.count();
    assert_eq!(status(&app, &fresh(&new)).await, 200);
    assert_eq!(issuer.count(), before + 1);
    let unknown = SigningKey::ec("unknown");
    for _ in 0..20 {
        assert_eq!(status(&app, &fresh(&unknown)).await, 401);
    }
    assert_eq!(issuer.count(), before + 1, "unknown keys make it read more often than every 30 s");

    // While the issuer is away, its keys stay.
    issuer.decide(|_| Act::Reset);
    assert_eq!(status(&app, &fresh(&old)).await, 200);
    app.stop().await;
}

#[tokio::test]
async fn keys_that_cannot_be_read_yet_are_no_reason_to_refuse_a_token_for_good() {
    let key = SigningKey::ed25519("k");
    let issuer = Target::start().await;
    issuer.decide(|_| Act::status(500));
    let world = world(&[("JWKS_URL", &issuer.url("/keys"))]).await;
    let app = world.app().role("api").start().await;
    let token = key.sign(&claims());
    get(&app, &token, MESSAGES).await.problem(503, "authentication_unavailable");
    for wrong in [json!({}), json!({"keys": []}), json!({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "k"}]})] {
        publish(&issuer, vec![("/keys", wrong)]);
        get(&app, &token, MESSAGES).await.problem(503, "authentication_unavailable");
    }
    publish(&issuer, vec![("/keys", jwks(&[&key]))]);
    accepted(&app, &token).await;
    app.stop().await;
}

#[tokio::test]
async fn requests_do_not_queue_behind_an_issuer_that_hangs() {
    let key = SigningKey::ed25519("k");
    let issuer = Target::start().await;
    issuer.decide(|_| Act::Hang);
    let world = world(&[("JWKS_URL", &issuer.url("/keys"))]).await;
    let app = world.app().role("api").start().await;
    let tokens: Vec<String> = (0..30).map(|number| key.sign(&changed("jti", json!(number)))).collect();
    // One after the other they would take longer than the client waits.
    let answers = futures_util::future::join_all(tokens.iter().map(|token| get(&app, token, MESSAGES))).await;
    answers.iter().for_each(|answer| drop(answer.problem(503, "authentication_unavailable")));
    app.stop().await;
}

#[tokio::test]
async fn a_file_and_a_shared_secret_are_keys_too() {
    let (first, second) = (SigningKey::rsa("1"), SigningKey::rsa("2"));
    let folder = tempfile(&jwks(&[&first]));
    let algorithms = "RS256,HS256";
    let settings = [("JWKS_FILE", folder.as_str()), ("ALGORITHMS", algorithms), ("SECRET", SECRET)];
    let world = world(&settings).await;
    let app = world.app().role("api").start().await;
    let old = first.sign(&claims());
    accepted(&app, &old).await;
    let shared = SigningKey::hmac(SECRET.as_bytes());
    assert_eq!(status(&app, &shared.sign_with_head(&json!({"alg": "HS256"}), &claims())).await, 200);
    let wrong = SigningKey::hmac(b"another-secret-of-at-least-32-bytes");
    assert_eq!(status(&app, &wrong.sign_with_head(&json!({"alg": "HS256"}), &claims())).await, 401);
    let confused = SigningKey::hmac(&first.public_pem());
    assert_eq!(status(&app, &confused.sign_with_head(&json!({"alg": "HS256", "kid": "1"}), &claims())).await, 401);
    std::fs::write(&folder, jwks(&[&second]).to_string()).unwrap();
    accepted(&app, &second.sign(&claims())).await;
    let removed = first.sign(&changed("jti", json!("new")));
    assert_eq!(status(&app, &removed).await, 401, "a key that the file no longer has");
    assert_eq!(status(&app, &old).await, 401, "a token of that key that was accepted before");
    app.stop().await;
    std::fs::remove_file(&folder).unwrap();
}

fn tempfile(document: &Value) -> String {
    let path = std::env::temp_dir().join(format!("jwks-{}-{}.json", std::process::id(), fastrand::u64(..)));
    std::fs::write(&path, document.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_issuers_discovery_document_leads_to_its_keys() {
    let key = SigningKey::ec("k");
    let issuer = Target::start().await;
    let url = issuer.url("");
    let own = issuer.url("/keys");
    let document = json!({"issuer": url, "jwks_uri": own});
    publish(&issuer, vec![("/.well-known/openid-configuration", document), ("/keys", jwks(&[&key]))]);
    let world = world(&[("ISSUER", &url)]).await;
    let app = world.app().role("api").start().await;
    accepted(&app, &key.sign(&changed("iss", json!(url)))).await;
    app.stop().await;
}

#[tokio::test]
async fn a_connection_ends_when_its_token_expires() {
    let key = SigningKey::ec("k");
    let issuer = serve(vec![("/keys", jwks(&[&key]))]).await;
    let world = world(&[("JWKS_URL", &issuer.url("/keys"))]).await;
    let app = world.app().role("api").start().await;
    accepted(&app, &key.sign(&claims())).await;
    let token = key.sign(&changed("exp", json!(now() + 3)));
    let authorization = format!("Bearer {token}");
    let headers = [("authorization", authorization.as_str())];
    let socket = Socket::try_open(&app.api, "?receiverId=ann", &headers).await.unwrap();
    assert_eq!(socket.closed().await.0, 4401);
    app.stop().await;
}

fn free_port() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

#[tokio::test]
async fn tokens_of_an_oauth_server_are_accepted_through_its_rotation_and_while_it_is_away() {
    let port = free_port();
    let world = world(&[("ISSUER", &format!("http://localhost:{port}"))]).await;
    let app = world.app().role("api").start().await;
    let (tools, address) = (Tools::new(&world), app.api.clone());
    off_runtime(move || Tools::expect(tools.node("issuer.mjs", &[&address, &port], &[]))).await;
    app.stop().await;
}

#[tokio::test]
async fn a_token_of_an_openid_provider_is_accepted() {
    let port = free_port();
    let world = world(&[("ISSUER", &format!("http://localhost:{port}"))]).await;
    let app = world.app().role("api").start().await;
    let (tools, address) = (Tools::new(&world), app.api.clone());
    off_runtime(move || Tools::expect(tools.python("python", &["provider.py", &address, &port], &[]))).await;
    app.stop().await;
}
