//! Admission to routes: finds the principal of a request, and checks that it has the route's scope.
//! Handlers check what depends on the request's content, such as its topic or its subject.

use std::{collections::HashMap, net::IpAddr, pin::Pin, sync::Arc, time::Instant};

use axum::{
    extract::Request,
    http::{HeaderMap, Method, header},
};
use metrics::counter;
use parking_lot::Mutex;
use postrider_identity::{Authenticate, Credential, Denied, Permission, Principal};

use super::{origin::Origins, problem::Problem};

/// Maximum number of refused credentials that are logged in a second.
const LINES_PER_SECOND: u32 = 100;

/// Demand of a route on its callers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    Public,
    /// Any credential.
    Credential,
    /// A credential with this permission.
    Scope(Permission),
    /// The same; a ticket is a credential too, since browsers cannot set the headers of a WebSocket
    /// or an event stream.
    Stream(Permission),
}

/// Method, path and access of a route. The path is as the router knows it.
pub type Rule = (Method, &'static str, Access);

/// Checks the requests of a listener. The default lets everything pass, as the anonymous principal,
/// but writes of pages of other origins.
#[derive(Clone, Default)]
pub struct Gate {
    origins: Origins,
    /// `None` while authentication is off.
    credentials: Option<Arc<Credentials>>,
}

struct Credentials {
    authenticator: Arc<dyn Authenticate>,
    rules: HashMap<&'static str, Vec<(Method, Access)>>,
}

type Waiting = Pin<Box<dyn Future<Output = Result<Arc<Principal>, Problem>> + Send>>;

/// Result of the check of a request.
pub(super) enum Checked {
    Passes(Arc<Principal>),
    Refused(Problem),
    /// The credential has to be verified first.
    Waits(Waiting),
}

impl Gate {
    /// Makes the gate ask for credentials. A route without a rule needs any credential.
    #[must_use]
    pub fn with_credentials(
        mut self,
        authenticator: Arc<dyn Authenticate>,
        rules: impl IntoIterator<Item = Rule>,
    ) -> Self {
        let mut by_path: HashMap<_, Vec<_>> = HashMap::new();
        for (method, path, access) in rules {
            by_path.entry(path).or_default().push((method, access));
        }
        self.credentials = Some(Arc::new(Credentials { authenticator, rules: by_path }));
        self
    }

    /// Lets pages of these origins write.
    #[must_use]
    pub fn with_origins(mut self, origins: Origins) -> Self {
        self.origins = origins;
        self
    }

    /// Checks a request for a route; `None` is a path that no route has.
    pub(super) fn check(&self, request: &Request, route: Option<&str>, client: Option<IpAddr>) -> Checked {
        if let Err(problem) = self.origins.check(request) {
            return Checked::Refused(problem);
        }
        let Some(credentials) = &self.credentials else { return Checked::Passes(Principal::anonymous()) };
        let access = credentials.access(request.method(), route);
        if access == Access::Public {
            return Checked::Passes(Principal::nobody());
        }
        let decide = move |found: Result<Arc<Principal>, Denied>| match found {
            Ok(principal) => access.allows(&principal).map(|()| principal),
            Err(denied) => Err(refuse(denied, client)),
        };
        let credential = match credential(request, access) {
            Ok(credential) => credential,
            Err(denied) => return Checked::Refused(refuse(denied, client)),
        };
        match credentials.authenticator.known(credential).map(decide) {
            Some(Ok(principal)) => Checked::Passes(principal),
            Some(Err(problem)) => Checked::Refused(problem),
            None => {
                let verifying = credentials.authenticator.verify(credential);
                Checked::Waits(Box::pin(async move { decide(verifying.await) }))
            }
        }
    }
}

impl Credentials {
    fn access(&self, method: &Method, route: Option<&str>) -> Access {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let rules = route.and_then(|route| self.rules.get(route)).into_iter().flatten();
        rules.filter(|(known, _)| known == method).map(|(_, access)| *access).next().unwrap_or(Access::Credential)
    }
}

impl Access {
    fn allows(self, principal: &Principal) -> Result<(), Problem> {
        match self {
            Self::Public | Self::Credential => Ok(()),
            Self::Scope(permission) | Self::Stream(permission) => Ok(principal.may(permission)?),
        }
    }
}

/// Returns the credential of a request. The header takes precedence over a ticket.
fn credential(request: &Request, access: Access) -> Result<Credential<'_>, Denied> {
    match bearer(request.headers())? {
        Some(token) => Ok(Credential::Bearer(token)),
        None if matches!(access, Access::Stream(_)) => {
            ticket(request.uri().query()).map(Credential::Ticket).ok_or(Denied::NoCredentials)
        }
        None => Err(Denied::NoCredentials),
    }
}

/// Returns the token of the header `Authorization`. A second header is refused: a proxy might have
/// checked the other one.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Denied> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Denied::Malformed);
    }
    let value = value.to_str().map_err(|_| Denied::Malformed)?;
    let (scheme, token) = value.split_once(' ').ok_or(Denied::Malformed)?;
    let token = token.trim_matches(' ');
    let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
    if scheme.eq_ignore_ascii_case("bearer") && is_token { Ok(Some(token)) } else { Err(Denied::Malformed) }
}

/// Returns the parameter `ticket`, which has no characters that need encoding.
fn ticket(query: Option<&str>) -> Option<&str> {
    query?.split('&').find_map(|pair| pair.strip_prefix("ticket=")).filter(|ticket| !ticket.is_empty())
}

/// Returns whether another refusal is logged. Of more than a hundred in a second, the others are
/// counted only.
fn is_logged() -> bool {
    static SECOND: Mutex<Option<(Instant, u32)>> = Mutex::new(None);
    let mut second = SECOND.lock();
    let (began, lines) = second.filter(|(began, _)| began.elapsed().as_secs() < 1).unwrap_or((Instant::now(), 0));
    *second = Some((began, lines + 1));
    lines < LINES_PER_SECOND
}

/// Counts and logs a refused credential; nothing of it is logged.
fn refuse(denied: Denied, client: Option<IpAddr>) -> Problem {
    let reason = denied.reason();
    counter!("postrider_auth_refused_total", "reason" => reason).increment(1);
    if denied != Denied::NoCredentials && is_logged() {
        let client = client.map(tracing::field::display);
        tracing::info!(reason, client.address = client, "credential refused: {denied}");
    }
    denied.into()
}

#[cfg(test)]
mod tests {
    use axum::{
        body::Body,
        http::{HeaderValue, StatusCode},
    };
    use postrider_identity::{Identity, Verifying};
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::code::Code;

    /// Knows the key `reader`, which may read values, and the ticket `t`.
    struct OneReader;

    impl Authenticate for OneReader {
        fn known(&self, credential: Credential<'_>) -> Option<Result<Arc<Principal>, Denied>> {
            match credential {
                Credential::Bearer("reader") | Credential::Ticket("t") => {
                    let scopes = ["kv:read", "messages:read"].map(|scope| scope.parse().unwrap()).into();
                    let (subject, revoked) = ("ann".to_owned(), CancellationToken::new());
                    let (tenant, expires_at, closes_at, key_id) = (None, None, None, None);
                    let identity = Identity { subject, tenant, scopes, expires_at, closes_at, key_id, revoked };
                    Some(Ok(Arc::new(Principal::new(identity))))
                }
                Credential::Bearer("later") => None,
                Credential::Bearer(_) => Some(Err(Denied::UnknownKey)),
                Credential::Ticket(_) => Some(Err(Denied::Ticket)),
            }
        }

        fn verify(&self, _: Credential<'_>) -> Verifying {
            Box::pin(std::future::ready(Err(Denied::Unavailable("the server is away".to_owned()))))
        }
    }

    async fn ask(method: &str, target: &str, route: Option<&str>, authorization: &[&str]) -> Result<(), Code> {
        let rules = [
            (Method::GET, "/health", Access::Public),
            (Method::GET, "/pull/{key}", Access::Scope(Permission::KvRead)),
            (Method::DELETE, "/pull/{key}", Access::Scope(Permission::KvWrite)),
            (Method::GET, "/stream", Access::Stream(Permission::MessagesRead)),
        ];
        let gate = Gate::default().with_credentials(Arc::new(OneReader), rules);
        let mut request = Request::builder().method(method).uri(target).body(Body::empty()).unwrap();
        for value in authorization {
            request.headers_mut().append(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        let checked = match gate.check(&request, route, None) {
            Checked::Passes(_) => Ok(()),
            Checked::Refused(problem) => Err(problem),
            Checked::Waits(waiting) => waiting.await.map(drop),
        };
        checked.map_err(|problem| problem.code)
    }

    #[tokio::test]
    async fn a_route_asks_for_its_scope_and_nothing_else_passes() {
        let (unknown, lacking) = (Err(Code::UNAUTHENTICATED), Err(Code::FORBIDDEN));
        let reader = ["Bearer reader"];
        for (method, target, route, authorization, outcome) in [
            ("GET", "/health", Some("/health"), &[][..], Ok(())),
            ("HEAD", "/health", Some("/health"), &[], Ok(())),
            ("POST", "/health", Some("/health"), &[], unknown),
            ("GET", "/pull/a", Some("/pull/{key}"), &[], unknown),
            ("GET", "/pull/a", Some("/pull/{key}"), &reader, Ok(())),
            ("GET", "/pull/a", Some("/pull/{key}"), &["bearer  reader "], Ok(())),
            ("DELETE", "/pull/a", Some("/pull/{key}"), &reader, lacking),
            ("GET", "/pull/a", Some("/pull/{key}"), &["Bearer later"], Err(Code::AUTHENTICATION_UNAVAILABLE)),
            ("GET", "/nowhere", None, &[], unknown),
            ("GET", "/nowhere", None, &reader, Ok(())),
            ("GET", "/stream?ticket=t", Some("/stream"), &[], Ok(())),
            ("GET", "/stream?a=1&ticket=t", Some("/stream"), &[], Ok(())),
            ("GET", "/stream?ticket=x", Some("/stream"), &[], unknown),
            ("GET", "/stream?ticket=", Some("/stream"), &[], unknown),
            ("GET", "/stream?ticket=t", Some("/stream"), &["Bearer x"], unknown),
            ("GET", "/pull/a?ticket=t", Some("/pull/{key}"), &[], unknown),
        ] {
            let found = ask(method, target, route, authorization).await;
            assert_eq!(found, outcome, "{method} {target} {authorization:?}");
        }
    }

    #[tokio::test]
    async fn other_headers_than_one_bearer_token_are_refused() {
        for authorization in [
            &["reader"][..],
            &["Basic reader"],
            &["Bearer"],
            &["Bearer "],
            &["Bearer reader x"],
            &["Bearer reader,Bearer reader"],
            &["Bearer reader", "Bearer reader"],
            &["Bearer x", "Bearer reader"],
            &["Bearer\treader"],
            &["", "Bearer reader"],
        ] {
            let found = ask("GET", "/pull/a", Some("/pull/{key}"), authorization).await;
            assert_eq!(found, Err(Code::UNAUTHENTICATED), "{authorization:?}");
        }
    }

    #[test]
    fn a_refusal_says_how_to_authenticate_or_which_scope_is_missing() {
        let answer = Problem::from(Denied::NoCredentials).respond(None);
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
        assert_eq!(answer.headers()[header::WWW_AUTHENTICATE], "Bearer");
        let problem = Access::Scope(Permission::KvRead).allows(&Principal::anonymous());
        assert!(problem.is_ok());
    }
}
