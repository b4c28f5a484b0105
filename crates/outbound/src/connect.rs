//! Connects to external hosts: resolves, checks, dials, and encrypts if asked.

use std::{
    fs,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::http::{Uri, uri::Scheme};
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use native_tls::{Certificate, Protocol, TlsConnector};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_native_tls::TlsStream;
use tower::Service;

use super::{client::OptionsError, guard::Guard};

/// Reasons why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{host} cannot be resolved: {source}")]
    Dns { host: String, source: io::Error },
    #[error("{host} is {address}, which may not be dialled because it is {kind}")]
    Refused { host: String, address: IpAddr, kind: &'static str },
    #[error("{address}: {source}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("TLS with {host}: {source}")]
    Tls { host: String, source: native_tls::Error },
    #[error("no connection to {host} within {} s", .after.as_secs_f32())]
    TimedOut { host: String, after: Duration },
}

impl ConnectError {
    /// Returns a stable word for logs, metrics and dead letters.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Dns { .. } => "dns",
            Self::Refused { .. } => "refused_address",
            Self::Tcp { .. } => "connect",
            Self::Tls { .. } => "tls",
            Self::TimedOut { .. } => "timeout",
        }
    }
}

/// Opens connections, for a pool of the HTTP client or for another protocol.
#[derive(Clone)]
pub struct Connector {
    guard: Arc<Guard>,
    tls: tokio_native_tls::TlsConnector,
    /// Time limit for name, dial and handshake together. The pool may continue to connect for the
    /// next request after the request that asked has given up, so the limit must apply here as
    /// well.
    timeout: Duration,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect(&uri).await.map(TokioIo::new) })
    }
}

impl Connector {
    /// Creates a connector. `ca_file` names certificate authorities that are trusted in addition to
    /// the system's.
    pub fn new(guard: Guard, ca_file: Option<&Path>, timeout: Duration) -> Result<Self, OptionsError> {
        let mut builder = TlsConnector::builder();
        builder.min_protocol_version(Some(Protocol::Tlsv12));
        if let Some(path) = ca_file {
            let unreadable = |source| OptionsError::Unreadable { path: path.display().to_string(), source };
            let pem = fs::read(path).map_err(unreadable)?;
            for authority in Certificate::stack_from_pem(&pem)? {
                builder.add_root_certificate(authority);
            }
        }
        Ok(Self { guard: Arc::new(guard), tls: builder.build()?.into(), timeout })
    }

    /// Connects to the host and port of a URL, with TLS if its scheme is https.
    pub async fn connect(&self, uri: &Uri) -> Result<Stream, ConnectError> {
        let deadline = Instant::now() + self.timeout;
        let (encrypted, host, port) = target_of(uri);
        let late = || ConnectError::TimedOut { host: host.to_owned(), after: self.timeout };
        let addresses = timeout_at(deadline, self.resolve(host, port)).await.map_err(|_| late())??;
        let stream = dial(&addresses, deadline).await?.ok_or_else(late)?;
        // The client waits for an answer after every request, so waiting for more to send would
        // only delay it. If the option cannot be set, the socket still works.
        let _ = stream.set_nodelay(true);
        if !encrypted {
            return Ok(Stream::Plain(stream));
        }
        let handshake = timeout_at(deadline, self.tls.connect(host, stream)).await.map_err(|_| late())?;
        let stream = handshake.map_err(|source| ConnectError::Tls { host: host.to_owned(), source })?;
        Ok(Stream::Tls(Box::new(stream)))
    }

    /// Returns the error that [`Self::connect`] has if it may dial no address of the URL's host,
    /// without dialling one. Asks no name server if every address is permitted.
    pub async fn check(&self, uri: &Uri) -> Result<(), ConnectError> {
        if self.guard.is_open() {
            return Ok(());
        }
        let (_, host, port) = target_of(uri);
        let late = |_| ConnectError::TimedOut { host: host.to_owned(), after: self.timeout };
        tokio::time::timeout(self.timeout, self.resolve(host, port)).await.map_err(late)?.map(drop)
    }

    /// Returns the addresses of a host that may be dialled; never empty.
    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, ConnectError> {
        let found: Vec<SocketAddr> = match host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => {
                let dns = |source| ConnectError::Dns { host: host.to_owned(), source };
                tokio::net::lookup_host((host, port)).await.map_err(dns)?.collect()
            }
        };
        let permitted: Vec<SocketAddr> =
            found.iter().copied().filter(|address| self.guard.permits(address.ip())).collect();
        if !permitted.is_empty() {
            return Ok(permitted);
        }
        let host = host.to_owned();
        let refused = found.iter().find_map(|address| Some((address.ip(), self.guard.refuses(address.ip())?)));
        Err(match refused {
            Some((address, kind)) => ConnectError::Refused { host, address, kind },
            None => ConnectError::Dns { host, source: io::ErrorKind::NotFound.into() },
        })
    }
}

/// Returns whether the URL asks for TLS, its host, and its port.
fn target_of(uri: &Uri) -> (bool, &str, u16) {
    let encrypted = uri.scheme() == Some(&Scheme::HTTPS);
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    (encrypted, host, uri.port_u16().unwrap_or(if encrypted { 443 } else { 80 }))
}

/// Connects to the first address that answers; each gets an even share of the remaining time.
/// `None` when the time is up.
async fn dial(addresses: &[SocketAddr], deadline: Instant) -> Result<Option<TcpStream>, ConnectError> {
    let mut problem = None;
    for (at, &address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - at).unwrap_or(u32::MAX);
        match timeout_at(Instant::now() + share, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(Some(stream)),
            Ok(Err(source)) => problem = Some(ConnectError::Tcp { address, source }),
            Err(_) => {}
        }
    }
    problem.map_or(Ok(None), Err)
}

/// A connection, encrypted or not.
pub enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
        }
    }
}
