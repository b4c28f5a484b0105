//! Requests that no route takes: a trailing slash leads to the route without it, and other paths
//! name a route that is near.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderValue, Method, Response, StatusCode, header},
    response::IntoResponse,
};

use super::{code::Code, problem::Problem};

/// Longest path that is compared with the routes, in bytes.
const MAX_COMPARED: usize = 64;
const SLASH_HINT: &str = " A slash that belongs to a parameter is written %2F";

/// The paths of all routes, with parameters in braces.
#[derive(Debug, Clone)]
pub struct Routes(Vec<String>);

impl Routes {
    pub fn new(routes: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self(routes.into_iter().map(Into::into).collect())
    }

    /// Answers a request that no route takes.
    pub fn answer(&self, request: &Request) -> Response<Body> {
        let path = request.uri().path();
        let trimmed = path.trim_end_matches('/');
        if trimmed.len() < path.len()
            && let Some(route) = self.0.iter().find(|route| matches(route, trimmed))
        {
            // The slash may belong to a parameter; then a redirect would lead to another value.
            let is_part = route.rsplit('/').next().is_some_and(is_parameter);
            if is_part || request.method() == Method::DELETE {
                let detail = format!("there is no route {path}; did you mean `{trimmed}`?{SLASH_HINT}");
                return Problem::new(Code::NOT_FOUND, detail).into_response();
            }
            if let Some(answer) = redirect(trimmed, request.uri().query()) {
                return answer;
            }
        }
        let hint = self.of_parameter(trimmed).or_else(|| self.near(trimmed)).map_or(String::new(), |route| {
            let has_more = trimmed.matches('/').count() > route.matches('/').count();
            format!("; did you mean `{route}`?{}", if has_more { SLASH_HINT } else { "" })
        });
        Problem::new(Code::NOT_FOUND, format!("there is no route {path}{hint}")).into_response()
    }

    /// Returns the route that ends in a parameter and else begins like this path.
    fn of_parameter(&self, path: &str) -> Option<&str> {
        let begins = |route: &&String| {
            let head = route.rsplit_once('/').filter(|(_, last)| is_parameter(last)).map(|(head, _)| head);
            head.filter(|head| !head.is_empty())
                .and_then(|head| path.strip_prefix(head))
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        self.0.iter().find(begins).map(String::as_str)
    }

    /// Returns the route that is nearest to a path, if it is near enough for a typo.
    fn near(&self, path: &str) -> Option<&str> {
        if path.len() > MAX_COMPARED {
            return None;
        }
        // With the path's own segments in place of parameters, only the words are compared.
        let segments = path.split('/').count();
        let routes = || self.0.iter().filter(|route| route.split('/').count() == segments);
        let filled: Vec<String> = routes().map(|route| fill(route, path)).collect();
        let nearest = postrider_config::nearest(filled.iter().map(String::as_str), path)?;
        filled.iter().zip(routes()).find(|(one, _)| *one == nearest).map(|(_, route)| route.as_str())
    }
}

fn redirect(path: &str, query: Option<&str>) -> Option<Response<Body>> {
    let location = match query {
        Some(query) => HeaderValue::try_from(format!("{path}?{query}")),
        None => HeaderValue::try_from(path),
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    response.headers_mut().insert(header::LOCATION, location.ok()?);
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Some(response)
}

fn is_parameter(segment: &str) -> bool {
    segment.starts_with('{')
}

fn matches(route: &str, path: &str) -> bool {
    let (mut route, mut path) = (route.split('/'), path.split('/'));
    loop {
        match (route.next(), path.next()) {
            (None, None) => return true,
            (Some(one), Some(other)) if is_parameter(one) => {
                if other.is_empty() {
                    return false;
                }
            }
            (one, other) if one == other => {}
            _ => return false,
        }
    }
}

/// Replaces the parameters of a route by the segments of a path.
fn fill(route: &str, path: &str) -> String {
    let mut path = path.split('/');
    let segments = route.split('/').map(|segment| match path.next() {
        Some(own) if is_parameter(segment) => own,
        _ => segment,
    });
    segments.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(method: &str, path: &str) -> (u16, String) {
        let routes = Routes::new(["/push", "/pull/{key}", "/feeds/{user_id}", "/users/{user_id}/following"]);
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let mut response = routes.answer(&request);
        let location = response.headers().get(header::LOCATION).map(|value| value.to_str().unwrap().to_owned());
        let detail = response.extensions_mut().remove::<Problem>().map(|problem| problem.detail);
        (response.status().as_u16(), location.or(detail).unwrap_or_default())
    }

    #[test]
    fn a_trailing_slash_redirects_with_the_query_unless_it_may_belong_to_a_parameter() {
        assert_eq!(answer("POST", "/push/"), (308, "/push".to_owned()));
        let following = "/users/a%2Fb/following";
        assert_eq!(answer("GET", &format!("{following}//?x=1&y")), (308, format!("{following}?x=1&y")));
        assert_eq!(redirect("/push", None).unwrap().headers()["cache-control"], "no-store");
        for (method, path) in [("DELETE", "/pull/a"), ("GET", "/pull/a"), ("GET", "/feeds/u"), ("DELETE", "/push")] {
            let (status, detail) = answer(method, &format!("{path}/"));
            assert_eq!(status, 404);
            assert!(detail.contains(&format!("did you mean `{path}`?")), "{detail}");
        }
        for path in ["/", "//", "/pull/", "//evil.example/", "/pull//a/", "/a/b/"] {
            assert_eq!(answer("GET", path).0, 404, "{path}");
        }
    }

    #[test]
    fn a_path_near_a_route_names_it() {
        for (path, near) in [
            ("/pusch", "/push"),
            ("/feed/u1", "/feeds/{user_id}"),
            ("/user/u1/folowing", "/users/{user_id}/following"),
            ("/Push/", "/push"),
            ("/pull", "/pull/{key}"),
            ("/pull/", "/pull/{key}"),
            ("/feeds/", "/feeds/{user_id}"),
        ] {
            let (status, detail) = answer("GET", path);
            assert_eq!((status, detail), (404, format!("there is no route {path}; did you mean `{near}`?")), "{path}");
        }
        let (status, detail) = answer("DELETE", "/pull/a/b");
        assert!(status == 404 && detail.contains("`/pull/{key}`? A slash that belongs to a parameter"), "{detail}");
        for path in ["/", "/console/x/y/z"] {
            assert!(!answer("GET", path).1.contains("did you mean"), "{path}");
        }
        assert!(!answer("GET", &format!("/push{}", "h".repeat(60_000))).1.contains("did you mean"));
    }
}
