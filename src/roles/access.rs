//! The one table of what every route asks of its callers while authentication is required.
//!
//! A route that is not in the table cannot be served: [`check`] refuses to start.

use axum::http::Method;
use postrider_http::gate::{Access, Rule};
use postrider_identity::Permission;
use postrider_openapi::{operations, operations_mut};
use utoipa::openapi::{
    OpenApi,
    security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
};

use Access::{Credential, Public, Scope, Stream};
use Permission::{
    Admin, CommentsRead, CommentsWrite, FeedRead, FeedWrite, KvRead, KvWrite, MessagesRead, MessagesWrite, Metrics,
    TopicWrite,
};

const GET: Method = Method::GET;
const POST: Method = Method::POST;
const DELETE: Method = Method::DELETE;

/// The routes of the API listener.
pub const API: &[Rule] = &[
    (GET, "/", Credential),
    (GET, "/openapi.json", Public),
    (GET, "/docs", Credential),
    (GET, "/health", Public),
    (GET, "/metrics", Scope(Metrics)),
    (POST, "/auth/ticket", Credential),
    // Key-value.
    (POST, "/push", Scope(KvWrite)),
    (GET, "/pull/{key}", Scope(KvRead)),
    (DELETE, "/pull/{key}", Scope(KvWrite)),
    // Gateway. The handler compares the topic with the pattern.
    (POST, "/produce", Scope(TopicWrite)),
    (POST, "/webhook-simulator", Credential),
    // Comments. The handler compares the author.
    (GET, "/api/v1/comments", Scope(CommentsRead)),
    (POST, "/api/v1/comments", Scope(CommentsWrite)),
    (GET, "/api/v1/comments/stream", Stream(CommentsRead)),
    // Messages. The handlers compare the sender and the receiver.
    (GET, "/api/v1/websocket/health", Public),
    (POST, "/api/v1/message/action", Scope(MessagesWrite)),
    (GET, "/api/v1/websocket/message", Stream(MessagesRead)),
    (GET, "/api/v1/messages/stream", Stream(MessagesRead)),
    (GET, "/api/v1/messages", Scope(MessagesRead)),
    (GET, "/api/v1/messages/unread", Scope(MessagesRead)),
    (POST, "/api/v1/messages/ack", Scope(MessagesRead)),
    (GET, "/api/v1/presence/{id}", Scope(MessagesRead)),
    // Feed. The handlers compare the author, the follower and the user.
    (POST, "/posts", Scope(FeedWrite)),
    (GET, "/posts/{id}", Scope(FeedRead)),
    (DELETE, "/posts/{id}", Scope(FeedWrite)),
    (POST, "/follow", Scope(FeedWrite)),
    (POST, "/unfollow", Scope(FeedWrite)),
    (GET, "/users/{user_id}/followers", Scope(FeedRead)),
    (GET, "/users/{user_id}/following", Scope(FeedRead)),
    (DELETE, "/users/{user_id}", Scope(FeedWrite)),
    (GET, "/feeds/{user_id}", Scope(FeedRead)),
];

/// The routes of operators: on the management listener, and on the API listener with
/// `http.expose_admin`.
pub const ADMIN: &[Rule] = &[
    (GET, "/admin/dlq", Scope(Admin)),
    (GET, "/admin/dlq/{id}", Scope(Admin)),
    (POST, "/admin/dlq/replay", Scope(Admin)),
    (POST, "/admin/dlq/purge", Scope(Admin)),
    (GET, "/admin/keys", Scope(Admin)),
    (POST, "/admin/keys", Scope(Admin)),
    (GET, "/admin/keys/{id}", Scope(Admin)),
    (DELETE, "/admin/keys/{id}", Scope(Admin)),
];

/// The other routes of the management listener. Supervisors and Prometheus read them without a
/// credential; who may reach the listener is a matter of the network.
pub const MANAGEMENT: &[Rule] = &[
    (GET, "/", Public),
    (GET, "/openapi.json", Public),
    (GET, "/livez", Public),
    (GET, "/readyz", Public),
    (GET, "/startupz", Public),
    (GET, "/metrics", Public),
    (GET, "/consumers", Public),
    (GET, "/config", Public),
];

/// Returns the paths of the API listener that ask for nothing.
pub fn public() -> impl Iterator<Item = &'static str> {
    API.iter().filter(|(_, _, access)| *access == Public).map(|(_, path, _)| *path)
}

/// Error of a route without a rule.
#[derive(Debug, thiserror::Error)]
#[error("the route {method} {path} declares no scope (src/roles/access.rs)")]
pub struct Undeclared {
    method: &'static str,
    path: String,
}

/// Checks that every described route has a rule.
pub fn check(described: &OpenApi, rules: &[Rule]) -> Result<(), Undeclared> {
    for (path, item) in &described.paths.paths {
        for (method, _) in operations(item) {
            if access(rules, method, path).is_none() {
                return Err(Undeclared { method, path: path.clone() });
            }
        }
    }
    Ok(())
}

/// Adds to every described route what it asks of its callers.
pub fn describe(described: &mut OpenApi, rules: &[Rule]) {
    let text = "An API key (`pr_live_…`), or a token (JWT) of the configured issuer. The words beside an operation are the scopes that it needs.";
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(text)).build();
    let components = described.components.get_or_insert_default();
    components.security_schemes.insert("bearer".to_owned(), SecurityScheme::Http(scheme).into());
    for (path, item) in &mut described.paths.paths {
        for (method, operation) in operations_mut(item) {
            let needed: Vec<&str> = match access(rules, method, path) {
                None | Some(Public) => continue,
                Some(Credential) => Vec::new(),
                Some(Scope(permission) | Stream(permission)) => vec![permission.word()],
            };
            operation.security = Some(vec![SecurityRequirement::new("bearer", needed)]);
        }
    }
}

fn access(rules: &[Rule], method: &str, path: &str) -> Option<Access> {
    rules.iter().find(|(known, route, _)| known == method && *route == path).map(|(_, _, access)| *access)
}

#[cfg(test)]
mod tests {
    use utoipa::openapi::{HttpMethod, OpenApiBuilder, PathItem, PathsBuilder, path::OperationBuilder};

    use super::*;

    #[test]
    fn a_route_without_a_rule_is_found() {
        let with = |path: &str, method| {
            let item = PathItem::new(method, OperationBuilder::new().build());
            OpenApiBuilder::new().paths(PathsBuilder::new().path(path, item).build()).build()
        };
        assert!(check(&with("/push", HttpMethod::Post), API).is_ok());
        let found = check(&with("/push", HttpMethod::Put), API).unwrap_err();
        assert_eq!(found.to_string(), "the route PUT /push declares no scope (src/roles/access.rs)");
        assert!(check(&with("/other", HttpMethod::Get), API).is_err());
    }

    #[test]
    fn no_route_has_two_rules_and_only_health_and_the_description_are_public() {
        for rules in [[API, ADMIN].concat(), [MANAGEMENT, ADMIN].concat()] {
            for (place, (method, path, _)) in rules.iter().enumerate() {
                let same = |(other, route, _): &Rule| other == method && route == path;
                assert_eq!(rules.iter().position(same), Some(place), "{method} {path}");
            }
        }
        assert_eq!(public().collect::<Vec<_>>(), ["/openapi.json", "/health", "/api/v1/websocket/health"]);
        assert!(ADMIN.iter().all(|(_, _, access)| *access == Scope(Admin)));
    }
}
