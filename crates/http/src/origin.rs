//! Pages of other origins: which may use the API, and how browsers are told.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    extract::Request,
    http::{HeaderName, HeaderValue, Method, header},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::{code::Code, problem::Problem};

/// Time for which browsers remember the answer to a preflight.
const MAX_AGE: Duration = Duration::from_secs(600);
/// Headers of answers that scripts of other origins may read.
const EXPOSED: [&str; 8] = [
    "postrider-position",
    "postrider-warning",
    "retry-after",
    "x-request-id",
    "x-cache",
    "ratelimit",
    "ratelimit-policy",
    "idempotent-replayed",
];

/// Pages of other origins (CORS).
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Origins whose pages may use the API, such as `https://example.com`, or `*` for all. Without
    /// it, writes and WebSockets of pages of other origins are refused, and other answers are not
    /// readable for them.
    pub origins: Vec<String>,
}

/// Error of a text that is not an origin.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}`, which is neither an origin such as `https://example.com` nor `*`")]
pub struct NotAnOrigin(String);

/// Origins whose pages may use the API. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    any: bool,
    exact: Arc<[HeaderValue]>,
    /// True if only addresses and `localhost` are this API's own names.
    only_local_names: bool,
}

impl Origins {
    pub fn new(config: &Config) -> Result<Self, NotAnOrigin> {
        let any = config.origins.iter().any(|origin| origin == "*");
        let others = config.origins.iter().filter(|origin| *origin != "*");
        let exact = others.map(|origin| parse(origin)).collect::<Result<_, _>>()?;
        Ok(Self { any, exact, only_local_names: false })
    }

    /// Makes other names than addresses and `localhost` count as other origins. A page of any site
    /// can make its own name lead to this machine (DNS rebinding), where nobody asks for
    /// credentials.
    #[must_use]
    pub fn with_local_names_only(mut self, only: bool) -> Self {
        self.only_local_names = only;
        self
    }

    /// Refuses writes and WebSockets of pages of other origins. Browsers send the header `Origin`
    /// with both; other clients do not.
    pub(super) fn check(&self, request: &Request) -> Result<(), Problem> {
        let Some(origin) = request.headers().get(header::ORIGIN) else { return Ok(()) };
        let only_reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS)
            && !request.headers().contains_key(header::UPGRADE);
        if only_reads || self.allows(origin) || self.is_own(origin, request) {
            return Ok(());
        }
        let shown: String = String::from_utf8_lossy(origin.as_bytes()).chars().take(200).collect();
        let detail = format!("pages of the origin `{shown}` may not do this (`http.cors.origins`)");
        Err(Problem::new(Code::ORIGIN_FORBIDDEN, detail).at_header("Origin"))
    }

    /// Returns whether the origin is that of this API: its host and port are those that the client
    /// asks.
    fn is_own(&self, origin: &HeaderValue, request: &Request) -> bool {
        let asked = request.headers().get(header::HOST).and_then(|host| host.to_str().ok());
        let asked = asked.or_else(|| request.uri().authority().map(|authority| authority.as_str()));
        let own = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
        own.is_some_and(|own| asked.is_some_and(|asked| own.eq_ignore_ascii_case(asked)))
            && (!self.only_local_names || own.is_some_and(is_local_name))
    }

    fn allows(&self, origin: &HeaderValue) -> bool {
        self.any || self.exact.contains(origin)
    }

    /// Returns the layer that answers preflights and adds the headers that browsers ask for; `None`
    /// if no other origin is allowed.
    pub fn layer(&self) -> Option<CorsLayer> {
        let methods = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
        let layer = CorsLayer::new()
            .allow_methods(methods)
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(EXPOSED.map(HeaderName::from_static))
            .max_age(MAX_AGE);
        if self.any {
            // Without credentials of the browser, such as cookies. Tokens in headers work.
            return Some(layer.allow_origin(AllowOrigin::any()));
        }
        let allowed = AllowOrigin::list(self.exact.iter().cloned());
        (!self.exact.is_empty()).then(|| layer.allow_origin(allowed).allow_credentials(true))
    }
}

/// Parses `scheme://host[:port]`, as browsers write it.
fn parse(origin: &str) -> Result<HeaderValue, NotAnOrigin> {
    let wrong = || NotAnOrigin(origin.to_owned());
    let (scheme, host) = origin.split_once("://").ok_or_else(wrong)?;
    let is_host = !host.is_empty() && !host.contains(['/', '?', '#', '@', '*', ' ', ',']);
    let is_small = origin.chars().all(|letter| letter.is_ascii_graphic() && !letter.is_ascii_uppercase());
    if scheme.is_empty() || !is_host || !is_small {
        return Err(wrong());
    }
    HeaderValue::from_str(origin).map_err(|_| wrong())
}

/// Returns whether a host, maybe with a port, is an address or `localhost`.
fn is_local_name(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    name.eq_ignore_ascii_case("localhost") || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn checked(origins: &[&str], method: &str, headers: &[(&str, &str)]) -> bool {
        let config = Config { origins: origins.iter().map(ToString::to_string).collect() };
        let mut request = Request::builder().method(method).uri("/push").header("host", "api.example:8080");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Origins::new(&config).unwrap().check(&request.body(Body::empty()).unwrap()).is_ok()
    }

    #[test]
    fn writes_and_sockets_of_other_origins_need_to_be_allowed() {
        let origin = |origin: &'static str| [("origin", origin)];
        let other = origin("https://page.example");
        let socket = [("origin", "https://page.example"), ("upgrade", "websocket")];
        assert!(checked(&[], "POST", &[]), "not a browser");
        for own in ["http://api.example:8080", "https://API.example:8080"] {
            assert!(checked(&[], "POST", &origin(own)), "{own}");
        }
        for method in ["GET", "HEAD", "OPTIONS"] {
            assert!(checked(&[], method, &other), "{method}");
        }
        for method in ["POST", "DELETE", "PUT", "PATCH"] {
            assert!(!checked(&[], method, &other), "{method}");
            assert!(checked(&["https://page.example"], method, &other), "{method}");
            assert!(checked(&["*"], method, &other), "{method}");
        }
        assert!(!checked(&[], "GET", &socket));
        assert!(checked(&["https://page.example"], "GET", &socket));
        for foreign in
            ["null", "http://api.example", "http://api.example:8080.evil", "http://evil@api.example:8080", ""]
        {
            assert!(!checked(&["https://page.example"], "POST", &origin(foreign)), "{foreign}");
        }
        let similar = ["http://page.example", "https://page.example:444", "https://page.example.evil"];
        for foreign in similar {
            assert!(!checked(&["https://page.example"], "POST", &origin(foreign)), "{foreign}");
        }
    }

    #[test]
    fn a_name_that_leads_here_is_not_this_machine_without_credentials() {
        let origins = Origins::default().with_local_names_only(true);
        for (host, own) in [
            ("127.0.0.1:8080", true),
            ("localhost:8080", true),
            ("[::1]:8080", true),
            ("localhost", true),
            ("evil.example:8080", false),
            ("127.0.0.1.evil.example", false),
            ("localhost.evil.example:80", false),
        ] {
            let request = Request::post("/push").header("host", host).header("origin", format!("http://{host}"));
            assert_eq!(origins.check(&request.body(Body::empty()).unwrap()).is_ok(), own, "{host}");
        }
    }

    #[test]
    fn only_origins_can_be_configured() {
        let wrong =
            ["page.example", "https://", "https://a/", "https://*.example", "HTTPS://a", "https://a b", "://a", ""];
        for text in wrong {
            let config = Config { origins: vec![text.to_owned()] };
            assert_eq!(Origins::new(&config).unwrap_err(), NotAnOrigin(text.to_owned()), "{text}");
        }
    }
}
