//! Content types and encodings that a client accepts.

use axum::http::{HeaderMap, HeaderName, header};

/// Returns whether the client prefers HTML to JSON, as browsers do. Most other clients name
/// neither.
pub fn prefers_html(headers: &HeaderMap) -> bool {
    let html = quality(headers, &header::ACCEPT, &["text/html", "text/*", "*/*"]);
    let json = quality(headers, &header::ACCEPT, &["application/json", "application/*", "*/*"]);
    html > json
}

/// Returns whether the client accepts gzip.
pub fn accepts_gzip(headers: &HeaderMap) -> bool {
    quality(headers, &header::ACCEPT_ENCODING, &["gzip", "*"]) > 0.0
}

/// Returns the weight that a header gives to the first of these names that it has, from 0 to 1.
fn quality(headers: &HeaderMap, header: &HeaderName, names: &[&str]) -> f32 {
    let values = headers.get_all(header).iter().filter_map(|value| value.to_str().ok());
    let items: Vec<&str> = values.flat_map(|value| value.split(',')).collect();
    let weight = |name: &str| items.iter().find_map(|item| weight_of(item, name));
    names.iter().find_map(|name| weight(name)).unwrap_or(0.0)
}

/// Returns the weight in `text/html;q=0.8`, if the item has this name.
fn weight_of(item: &str, name: &str) -> Option<f32> {
    let mut parts = item.split(';').map(str::trim);
    if !parts.next()?.eq_ignore_ascii_case(name) {
        return None;
    }
    let weight = parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q=")));
    Some(weight.map_or(1.0, |weight| weight.parse().unwrap_or(0.0)))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn with(name: HeaderName, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn browsers_get_html_and_others_json() {
        let prefers = |accept| prefers_html(&with(header::ACCEPT, accept));
        assert!(prefers("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"));
        assert!(prefers("TEXT/HTML"));
        assert!(prefers("application/json;q=0.5, text/html;q=0.6"));
        for other in ["*/*", "", "application/json", "text/html;q=0.5, */*", "text/html, application/json", "image/png"]
        {
            assert!(!prefers(other), "{other}");
        }
        assert!(!prefers_html(&HeaderMap::new()));
    }

    #[test]
    fn gzip_is_used_only_for_clients_that_accept_it() {
        let accepts = |encodings| accepts_gzip(&with(header::ACCEPT_ENCODING, encodings));
        assert!(accepts("gzip, deflate, br") && accepts("br;q=1.0, gzip;q=0.1") && accepts("*"));
        assert!(!accepts("identity") && !accepts("*, gzip;q=0") && !accepts("gzip;q=0.0") && !accepts(""));
        assert!(!accepts_gzip(&HeaderMap::new()));
    }
}
