//! Target of requests, created once: the parsed address and the headers that all requests share.

use axum::http::{
    HeaderMap, HeaderName, HeaderValue, Uri,
    header::{self, InvalidHeaderName, InvalidHeaderValue},
    uri,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use postrider_config::SecretUrl;
use url::Url;

/// Reasons why a URL cannot be called.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("not a URL: {0}")]
    Url(#[from] url::ParseError),
    #[error("the scheme is `{0}`, which is neither http nor https")]
    Scheme(String),
    #[error("not a URL that HTTP can use: {0}")]
    Uri(#[from] uri::InvalidUri),
    #[error("user name or password cannot be sent")]
    Credentials,
}

/// Reasons why a header cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error("`{name}` is not a valid header name")]
    Name { name: String, source: InvalidHeaderName },
    #[error("the value of header `{name}` has invalid characters")]
    Value { name: String, source: InvalidHeaderValue },
}

/// One URL with its headers. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub(super) uri: Uri,
    headers: HeaderMap,
    shown: String,
}

impl Endpoint {
    /// Parses a URL. A user name and password in it become basic authentication, unless `headers`
    /// have one.
    pub fn new(url: &str, mut headers: HeaderMap) -> Result<Self, EndpointError> {
        let mut url = Url::parse(url.trim())?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(EndpointError::Scheme(url.scheme().to_owned()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            let basic = basic_authentication(&url)?;
            headers.entry(header::AUTHORIZATION).or_insert(basic);
            // Neither can fail on a URL that has a host.
            let _ = (url.set_username(""), url.set_password(None));
        }
        url.set_fragment(None);
        let uri: Uri = url.as_str().parse()?;
        if let Some(authority) = uri.authority()
            && let Ok(host) = HeaderValue::from_str(authority.as_str())
        {
            headers.entry(header::HOST).or_insert(host);
        }
        let shown = SecretUrl::new(url.as_str()).to_string();
        Ok(Self { uri, headers, shown })
    }

    /// Returns the headers of one request, with capacity for `more` headers.
    pub fn headers(&self, more: usize) -> HeaderMap {
        let mut headers = HeaderMap::with_capacity(self.headers.len() + more);
        headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        headers
    }

    /// Returns the URL for logs, with credentials, path and the values of its query masked.
    pub fn shown(&self) -> &str {
        &self.shown
    }
}

fn basic_authentication(url: &Url) -> Result<HeaderValue, EndpointError> {
    let decode = |text: &str| percent_encoding::percent_decode_str(text).collect::<Vec<u8>>();
    let mut plain = decode(url.username());
    plain.push(b':');
    plain.extend(decode(url.password().unwrap_or_default()));
    let text = format!("Basic {}", BASE64_STANDARD.encode(plain));
    let mut value = HeaderValue::from_str(&text).map_err(|_| EndpointError::Credentials)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Parses a header that an operator configured.
pub fn parse_header(name: &str, value: &str) -> Result<(HeaderName, HeaderValue), HeaderError> {
    let owned = || name.to_owned();
    let parsed = HeaderName::try_from(name).map_err(|source| HeaderError::Name { name: owned(), source })?;
    let mut value = HeaderValue::try_from(value).map_err(|source| HeaderError::Value { name: owned(), source })?;
    // Hides the value from code that logs requests.
    value.set_sensitive(true);
    Ok((parsed, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(url: &str) -> Endpoint {
        Endpoint::new(url, HeaderMap::new()).unwrap()
    }

    #[test]
    fn credentials_become_a_header_and_are_not_shown() {
        let endpoint = endpoint("https://Aladdin:open%20sesame@example.com/a/b?token=t#part");
        assert_eq!(endpoint.headers(0)[header::AUTHORIZATION], "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(endpoint.uri, "https://example.com/a/b?token=t");
        assert_eq!(endpoint.shown(), "https://example.com/********?token=********");
    }

    #[test]
    fn the_host_header_names_a_port_that_is_not_the_schemes_own() {
        let host = |url: &str| endpoint(url).headers(0)[header::HOST].clone();
        assert_eq!(host("http://example.com:8080/x"), "example.com:8080");
        assert_eq!(host("http://example.com:80/x"), "example.com");
        assert_eq!(host("http://[::1]:9/"), "[::1]:9");
    }

    #[test]
    fn names_and_paths_are_encoded_for_http() {
        assert_eq!(endpoint("http://bücher.example/ä b").uri, "http://xn--bcher-kva.example/%C3%A4%20b");
        assert_eq!(endpoint("http://example.com").uri.path(), "/");
        assert_eq!(endpoint("http://0x7f.1/").uri.host(), Some("127.0.0.1"), "as browsers read it");
    }

    #[test]
    fn a_url_that_cannot_be_called_is_refused() {
        for bad in ["", "example.com/x", "ftp://example.com/", "file:///etc/passwd", "http://", "http://[::g]/"] {
            assert!(Endpoint::new(bad, HeaderMap::new()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_header_of_the_operator_wins_over_the_url() {
        let own = HeaderMap::from_iter([parse_header("authorization", "Bearer t").unwrap()]);
        let endpoint = Endpoint::new("http://a:b@example.com/", own).unwrap();
        assert_eq!(endpoint.headers(0)[header::AUTHORIZATION], "Bearer t");
        assert!(parse_header("a b", "c").is_err() && parse_header("a", "b\nc").is_err());
    }
}
