//! URLs that may contain credentials.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

/// Replacement of a hidden value.
pub(super) const MASK: &str = "********";

/// Length of the shortest secret that is masked in other text.
const MIN_SECRET_BYTES: usize = 4;

/// A URL, or several separated by commas, whose user, password and query values must not be
/// printed. `Display`, `Debug` and `Serialize` mask them; scheme and host stay visible, because
/// they identify the server. So does the path, but for HTTP, where it may be the secret of a
/// webhook.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    pub fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }

    /// Returns the plain URL, to pass to a client library.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Masks this URL, and its secret parts, in the text of an error.
    pub fn mask_in(&self, text: &str) -> String {
        let mut masked = text.replace(&self.0, &self.to_string());
        for one in split(&self.0).map(str::trim) {
            let parts = Parts::of(one);
            let values =
                parts.query.into_iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='));
            let password = parts.user.and_then(|user| user.split_once(':'));
            let path = parts.is_http().then(|| parts.host_and_path().1);
            let whole = [parts.user, parts.query, path].into_iter().flatten();
            for secret in whole.chain(password.map(|(_, text)| text)).chain(values.map(|(_, text)| text)) {
                // Shorter values are not secrets, and masking them would break up words.
                if secret.len() >= MIN_SECRET_BYTES {
                    masked = masked.replace(secret, MASK);
                }
            }
        }
        masked
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked_list(&self.0, true))
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for SecretUrl {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for SecretUrl {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SecretUrl".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // Not `uri`: the value may be empty, or several URLs.
        schemars::json_schema!({ "type": "string", "format": "url" })
    }
}

/// Masks user, password, query values and fragment of a URL: of each URL in a comma-separated list,
/// and of a path without a host. Other text is masked as a whole, because it may be a misplaced
/// secret.
pub fn masked(text: &str) -> String {
    masked_list(text, false)
}

fn masked_list(text: &str, hides_http_paths: bool) -> String {
    split(text).map(|one| masked_one(one.trim(), hides_http_paths)).collect::<Vec<_>>().join(",")
}

/// Splits a list of URLs. A password may contain a comma, so only a comma before another URL
/// separates.
fn split(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let now = rest?;
        let begins_url = |at: usize| {
            let next = now[at + 1..].trim_start();
            let is_scheme = |name: &str| {
                !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
            };
            next.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme))
        };
        let at = now.match_indices(',').map(|(at, _)| at).find(|&at| begins_url(at));
        rest = at.map(|at| &now[at + 1..]);
        Some(at.map_or(now, |at| &now[..at]))
    })
}

/// Parts of a URL as it is written. An invalid URL has parts as well, so that its secrets are
/// masked.
struct Parts<'a> {
    scheme: &'a str,
    user: Option<&'a str>,
    /// Host, port and path.
    place: &'a str,
    query: Option<&'a str>,
    fragment: bool,
}

impl<'a> Parts<'a> {
    fn of(text: &'a str) -> Self {
        let (scheme, rest) = match text.find("://") {
            Some(at) => text.split_at(at + 3),
            None => ("", text),
        };
        let (user, rest) = match rest.rfind('@') {
            Some(at) if !scheme.is_empty() => (Some(&rest[..at]), &rest[at + 1..]),
            _ => (None, rest),
        };
        let (rest, fragment) = rest.split_once('#').map_or((rest, false), |(rest, _)| (rest, true));
        let (place, query) = rest.split_once('?').map_or((rest, None), |(place, query)| (place, Some(query)));
        Self { scheme, user, place, query, fragment }
    }

    /// Returns whether this is an HTTP URL, or a path of one.
    fn is_http(&self) -> bool {
        ["", "http://", "https://"].iter().any(|scheme| self.scheme.eq_ignore_ascii_case(scheme))
    }

    /// Splits the place at the slash that begins the path.
    fn host_and_path(&self) -> (&'a str, &'a str) {
        self.place.split_at(self.place.find(['/', '\\']).unwrap_or(self.place.len()))
    }

    /// Returns whether an `@` may belong to a query or to a password, so that the host cannot be
    /// determined.
    fn is_ambiguous(&self) -> bool {
        self.user.is_some_and(|user| user.contains(['?', '#']))
    }
}

fn masked_one(text: &str, hides_http_paths: bool) -> String {
    let parts = Parts::of(text);
    match () {
        () if text.is_empty() => return String::new(),
        () if parts.scheme.is_empty() && !text.starts_with('/') => return MASK.to_owned(),
        () if parts.is_ambiguous() => return format!("{}{MASK}", parts.scheme),
        () => {}
    }
    let mut shown = parts.scheme.to_owned();
    if parts.user.is_some() {
        shown.extend([MASK, "@"]);
    }
    match parts.host_and_path() {
        (host, path) if hides_http_paths && parts.is_http() && path.len() > 1 => shown.extend([host, "/", MASK]),
        _ => shown.push_str(parts.place),
    }
    if let Some(query) = parts.query {
        let mask_pair = |pair: &str| pair.split_once('=').map_or(MASK.to_owned(), |(name, _)| format!("{name}={MASK}"));
        shown.push('?');
        shown.push_str(&query.split('&').map(mask_pair).collect::<Vec<_>>().join("&"));
    }
    if parts.fragment {
        shown.extend(["#", MASK]);
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn credentials_are_masked_and_the_server_is_shown() {
        for (url, shown) in [
            ("", ""),
            ("redis://127.0.0.1:6379", "redis://127.0.0.1:6379"),
            ("redis://:hunter2@r:6379/0", "redis://********@r:6379/0"),
            ("redis://a:hunter2@r:1,redis://b:hunter2@s:2", "redis://********@r:1,redis://********@s:2"),
            (
                "postgres://u:hunter2@h/d?sslmode=require&password=hunter2",
                "postgres://********@h/d?sslmode=********&password=********",
            ),
            ("https://example.com/hook?token=hunter2#hunter2", "https://example.com/hook?token=********#********"),
            ("https://example.com/hook?hunter2", "https://example.com/hook?********"),
            ("https://example.com/@me?mail=a@b", "https://********"),
            ("postgres://u:hun/ter2?#x@h/d", "postgres://********"),
            ("redis://u:hun,ter2@h", "redis://********@h"),
            ("hunter2", "********"),
            ("user:hunter2@host", "********"),
            ("/login?token=hunter2", "/login?token=********"),
        ] {
            assert_eq!(masked(url), shown, "{url}");
        }
    }

    #[test]
    fn nothing_that_prints_a_url_prints_its_secrets() {
        let url = SecretUrl::new("https://u:hunter2@example.com/a?token=hunter3");
        let printed = format!("{url} {url:?} {}", serde_json::to_string(&url).unwrap());
        assert!(!printed.contains("hunter") && printed.contains("//********@example.com/********?"), "{printed}");
        assert_eq!(url.expose(), "https://u:hunter2@example.com/a?token=hunter3");
        for (url, shown) in [
            ("https://example.com", "https://example.com"),
            ("HTTP://example.com:8080/", "HTTP://example.com:8080/"),
            ("http://example.com/hooks/hunter2", "http://example.com/********"),
            ("/hooks/hunter2?token=hunter3", "/********?token=********"),
            ("postgres://u@h/orders", "postgres://********@h/orders"),
        ] {
            assert_eq!(SecretUrl::new(url).to_string(), shown);
        }
        let hook = SecretUrl::new("https://example.com/hooks/hunter2");
        assert_eq!(hook.mask_in("POST /hooks/hunter2 failed"), "POST ******** failed");
        let error = url
            .mask_in("cannot reach https://u:hunter2@example.com/a?token=hunter3, nor /a?token=hunter3 as u:hunter2");
        assert!(!error.contains("hunter") && error.contains("example.com"), "{error}");
    }

    proptest! {
        #[test]
        fn no_user_password_or_query_value_is_ever_shown(
            user in "[a-z]{0,4}", password in "[ -~]{0,12}hunter2[ -~]{0,12}", query in "[a-z]{1,3}", list: bool
        ) {
            let mut text = format!("redis://{user}:{}@host:1/0", password.replace('@', "%40"));
            if list {
                text = format!("redis://other,{text}");
            }
            prop_assert!(!masked(&text).contains("hunter2"), "{}", masked(&text));
            let text = format!("https://host/path?{query}={}", password.replace(['&', ','], ""));
            prop_assert!(!masked(&text).contains("hunter2"), "{}", masked(&text));
        }
    }
}
