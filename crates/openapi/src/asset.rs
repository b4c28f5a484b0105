//! Pages and files in memory. They are answered compressed where the client accepts that, and not
//! again where the client has them.

use std::{
    io::{self, Read, Write},
    sync::OnceLock,
};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, Response, StatusCode, header},
};
use bytes::Bytes;
use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use sha2::{Digest, Sha256};

use super::negotiation::accepts_gzip;

/// One page or file.
pub struct Asset {
    content_type: &'static str,
    /// Distinguishes contents: the beginning of their hash, in hexadecimal.
    tag: String,
    gzip: Bytes,
    /// The uncompressed content, once a client has asked for it.
    plain: OnceLock<Bytes>,
    /// Value of `Content-Security-Policy`.
    policy: Option<HeaderValue>,
}

impl Asset {
    pub fn new(content_type: &'static str, content: impl Into<Bytes>) -> io::Result<Self> {
        let content = content.into();
        let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(&content)?;
        let asset = Self::compressed(content_type, encoder.finish()?);
        Ok(Self { plain: content.into(), ..asset })
    }

    /// Creates an asset from content that is compressed already.
    pub fn compressed(content_type: &'static str, gzip: impl Into<Bytes>) -> Self {
        let gzip = gzip.into();
        let tag = Sha256::digest(&gzip).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Self { content_type, tag, gzip, plain: OnceLock::new(), policy: None }
    }

    /// Sets what the browser may load for this page.
    #[must_use]
    pub fn with_policy(self, policy: HeaderValue) -> Self {
        Self { policy: Some(policy), ..self }
    }

    /// Answers a request with these headers.
    pub fn answer(&self, headers: &HeaderMap) -> Response<Body> {
        let gzip = accepts_gzip(headers);
        let mut response = Response::new(Body::empty());
        let own = response.headers_mut();
        let tag = if gzip { format!("\"{}-gzip\"", self.tag) } else { format!("\"{}\"", self.tag) };
        own.extend(HeaderValue::try_from(tag).ok().map(|tag| (header::ETAG, tag)));
        // Clients ask each time whether it has changed: an update of postrider replaces all of it.
        own.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        own.insert(header::VARY, HeaderValue::from_static("accept, accept-encoding"));
        if self.is_known(headers) {
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            return response;
        }
        let content = match if gzip { Ok(self.gzip.clone()) } else { self.plain() } {
            Ok(content) => content,
            Err(error) => {
                tracing::error!(error = %error, "a file in the program cannot be unpacked");
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                return response;
            }
        };
        own.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        own.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        own.extend(self.policy.clone().map(|policy| (header::CONTENT_SECURITY_POLICY, policy)));
        if gzip {
            own.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        }
        *response.body_mut() = content.into();
        response
    }

    /// Returns whether the client has this content, compressed or not.
    fn is_known(&self, headers: &HeaderMap) -> bool {
        let values = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
        let known = |tag: &str| {
            let tag = tag.trim().trim_start_matches("W/").trim_matches('"');
            tag == "*" || tag.trim_end_matches("-gzip") == self.tag
        };
        values.flat_map(|value| value.split(',')).any(known)
    }

    fn plain(&self) -> io::Result<Bytes> {
        if let Some(plain) = self.plain.get() {
            return Ok(plain.clone());
        }
        let mut plain = Vec::new();
        GzDecoder::new(&*self.gzip).read_to_end(&mut plain)?;
        Ok(self.plain.get_or_init(|| plain.into()).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(asset: &Asset, headers: &[(header::HeaderName, &'static str)]) -> Response<Body> {
        let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value)));
        asset.answer(&headers.collect())
    }

    #[test]
    fn a_client_that_has_the_content_does_not_get_it_again() {
        let asset = Asset::new("text/plain", "hello").unwrap();
        let plain = answer(&asset, &[]);
        let packed = answer(&asset, &[(header::ACCEPT_ENCODING, "gzip")]);
        assert_ne!(plain.headers()[header::ETAG], packed.headers()[header::ETAG], "they differ in their bytes");
        assert_eq!(packed.headers()[header::CONTENT_ENCODING], "gzip");
        for first in [&plain, &packed] {
            let tag = first.headers()[header::ETAG].clone();
            let headers = HeaderMap::from_iter([(header::IF_NONE_MATCH, tag)]);
            assert_eq!(asset.answer(&headers).status(), StatusCode::NOT_MODIFIED);
        }
        assert_eq!(answer(&asset, &[(header::IF_NONE_MATCH, "W/\"x\", *")]).status(), StatusCode::NOT_MODIFIED);
        assert_eq!(answer(&asset, &[(header::IF_NONE_MATCH, "\"other\"")]).status(), StatusCode::OK);
        let other = Asset::new("text/plain", "hello!").unwrap();
        assert_ne!(answer(&other, &[]).headers()[header::ETAG], plain.headers()[header::ETAG]);
    }

    #[test]
    fn compressed_content_is_unpacked_for_clients_without_gzip() {
        let packed = Asset::new("text/plain", "hello").unwrap().gzip;
        assert_eq!(Asset::compressed("text/plain", packed).plain().unwrap(), "hello");
    }
}
