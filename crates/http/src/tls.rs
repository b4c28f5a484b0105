//! TLS on a listener. The certificate and its key are read again when their files change.

use std::{fs, io, pin::Pin, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use metrics::{counter, gauge};
use openssl::{
    error::ErrorStack,
    ssl::{AlpnError, Ssl, SslAcceptor, SslFiletype, SslMethod, select_next_proto},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_openssl::SslStream;

/// Interval at which the files are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// Protocols that are offered, each after its length.
const PROTOCOLS: &[u8] = b"\x02h2\x08http/1.1";

/// TLS of the API listener.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// PEM file with the certificate and those that lead to its authority. Empty: no TLS.
    pub certificate_file: String,
    /// PEM file with the certificate's key.
    pub key_file: String,
}

/// Error of files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("`http.tls.certificate_file` and `http.tls.key_file` must both be set")]
    OneFile,
    #[error("{path}: {source}")]
    Read { path: String, source: io::Error },
    #[error("{path}: {source}")]
    Pem { path: String, source: ErrorStack },
    #[error("the key does not belong to the certificate: {0}")]
    OtherKey(#[source] ErrorStack),
    #[error("TLS: {0}")]
    Other(#[from] ErrorStack),
}

/// Digest of both files.
type Fingerprint = [u8; 32];

/// The certificate of a listener.
pub struct Tls {
    config: Config,
    /// Digest of the files that `acceptor` was first made from.
    opened: Option<Fingerprint>,
    acceptor: ArcSwap<SslAcceptor>,
}

impl Config {
    pub fn is_on(&self) -> bool {
        !self.certificate_file.is_empty() || !self.key_file.is_empty()
    }
}

impl Tls {
    /// Reads the files; `None` if TLS is off.
    pub fn open(config: &Config) -> Result<Option<Arc<Self>>, TlsError> {
        if !config.is_on() {
            return Ok(None);
        }
        if config.certificate_file.is_empty() || config.key_file.is_empty() {
            return Err(TlsError::OneFile);
        }
        // The digest first: files that change in between are then read again.
        let opened = fingerprint(config);
        let acceptor = ArcSwap::from_pointee(load(config)?);
        Ok(Some(Arc::new(Self { config: config.clone(), opened, acceptor })))
    }

    /// Uses changed files for new connections. Files that cannot be used change nothing.
    pub async fn follow(self: Arc<Self>) {
        let refused = gauge!("http_server_tls_certificate_refused");
        refused.set(0.0);
        let mut used = self.opened;
        loop {
            tokio::time::sleep(LOOK).await;
            let config = self.config.clone();
            let look = move || {
                let found = fingerprint(&config).filter(|found| used != Some(*found))?;
                Some((found, load(&config)))
            };
            let changed = match tokio::task::spawn_blocking(look).await {
                Ok(changed) => changed,
                Err(error) => {
                    tracing::error!(%error, "the certificate was not read");
                    continue;
                }
            };
            let Some((found, loaded)) = changed else { continue };
            used = Some(found);
            match loaded {
                Ok(acceptor) => {
                    self.acceptor.store(Arc::new(acceptor));
                    refused.set(0.0);
                    tracing::info!("the changed certificate is used for new connections");
                }
                Err(error) => {
                    refused.set(1.0);
                    tracing::error!(%error, "the changed certificate cannot be used, the one before stays");
                }
            }
        }
    }

    /// Performs the handshake of a connection.
    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<SslStream<TcpStream>> {
        let accepted = async {
            let ssl = Ssl::new(self.acceptor.load().context())?;
            let mut stream = SslStream::new(ssl, stream)?;
            Pin::new(&mut stream).accept().await.map_err(io::Error::other)?;
            Ok(stream)
        };
        accepted.await.inspect_err(|_: &io::Error| counter!("http_server_tls_failures_total").increment(1))
    }
}

/// Returns the digest of the files; `None` while one cannot be read.
fn fingerprint(config: &Config) -> Option<Fingerprint> {
    let mut hash = Sha256::new();
    for path in [&config.certificate_file, &config.key_file] {
        let bytes = fs::read(path).ok()?;
        hash.update((bytes.len() as u64).to_be_bytes());
        hash.update(bytes);
    }
    Some(hash.finalize().into())
}

fn load(config: &Config) -> Result<SslAcceptor, TlsError> {
    let Config { certificate_file, key_file } = config;
    for path in [certificate_file, key_file] {
        fs::File::open(path).map_err(|source| TlsError::Read { path: path.clone(), source })?;
    }
    let pem = |path: &String| {
        let path = path.clone();
        move |source| TlsError::Pem { path, source }
    };
    // TLS 1.2 and 1.3, with the ciphers that Mozilla calls intermediate.
    let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
    builder.set_certificate_chain_file(certificate_file).map_err(pem(certificate_file))?;
    builder.set_private_key_file(key_file, SslFiletype::PEM).map_err(pem(key_file))?;
    builder.check_private_key().map_err(TlsError::OtherKey)?;
    builder.set_alpn_select_callback(|_, offered| select_next_proto(PROTOCOLS, offered).ok_or(AlpnError::NOACK));
    Ok(builder.build())
}

#[cfg(test)]
mod tests {
    use openssl::{asn1::Asn1Time, hash::MessageDigest, pkey::PKey, rsa::Rsa, x509::X509};

    use super::*;

    fn issue(config: &Config) {
        let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
        let mut builder = X509::builder().unwrap();
        builder.set_pubkey(&key).unwrap();
        builder.set_not_before(&Asn1Time::days_from_now(0).unwrap()).unwrap();
        builder.set_not_after(&Asn1Time::days_from_now(1).unwrap()).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        fs::write(&config.key_file, key.private_key_to_pem_pkcs8().unwrap()).unwrap();
        fs::write(&config.certificate_file, builder.build().to_pem().unwrap()).unwrap();
    }

    #[tokio::test]
    async fn files_that_change_before_they_are_followed_are_used_too() {
        let folder = std::env::temp_dir().join(format!("postrider-tls-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let file = |name| folder.join(name).to_str().unwrap().to_owned();
        let config = Config { certificate_file: file("tls.crt"), key_file: file("tls.key") };
        issue(&config);
        let tls = Tls::open(&config).unwrap().unwrap();
        let opened = tls.acceptor.load_full();
        issue(&config);
        let changed = async {
            while Arc::ptr_eq(&tls.acceptor.load(), &opened) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            () = tls.clone().follow() => unreachable!("it goes on"),
            changed = tokio::time::timeout(5 * LOOK, changed) => changed.unwrap(),
        }
        fs::remove_dir_all(folder).unwrap();
    }
}
