//! Accept loops and connections, from the first byte until they are drained.

use std::{
    borrow::Cow,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};

use axum::Router;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use metrics::{counter, gauge};
use postrider_process::drain::{Draining, Ending};
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    activity::{Activity, Audience, Metered, Wire},
    answer::StreamExecutor,
    client_address::Proxies,
    config::Config,
    connection_watch::{Order, Timeouts, Watch},
    counted::Counted,
    shortcut::ShortCuts,
    tls::Tls,
};

/// Binds every address, so that a port in use is an error before anything starts.
pub async fn bind(addresses: &[String]) -> io::Result<Vec<TcpListener>> {
    let mut listeners = Vec::with_capacity(addresses.len());
    for address in addresses {
        let listener = TcpListener::bind(&*with_host(address))
            .await
            .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?;
        listeners.push(listener);
    }
    Ok(listeners)
}

/// Expands a bare port to that port on every address.
fn with_host(address: &str) -> Cow<'_, str> {
    if address.starts_with(':') { format!("0.0.0.0{address}").into() } else { address.into() }
}

/// Bound addresses, and the certificate that they serve; `None`: without TLS.
pub struct Listeners {
    pub bound: Vec<TcpListener>,
    pub tls: Option<Arc<Tls>>,
}

/// Serves the router, and the shortcuts past it, until the stop. Connections then have the grace
/// period to finish the requests in flight.
pub async fn serve(
    audience: Audience,
    Listeners { bound: listeners, tls }: Listeners,
    router: Router,
    short_cuts: ShortCuts,
    config: &Config,
    proxies: Proxies,
    ending: Ending,
) {
    let Ending { draining, died, stop, grace } = ending;
    let server = Arc::new(Server {
        audience,
        tls,
        handshake_timeout: Duration::from_millis(config.header_timeout_ms),
        router,
        short_cuts: Arc::new(short_cuts),
        proxies,
        builder: builder(config),
        slots: Arc::new(Semaphore::new(config.max_connections.clamp(1, Semaphore::MAX_PERMITS))),
        watch: Watch::new(
            stop.clone(),
            Timeouts {
                header: Duration::from_millis(config.header_timeout_ms),
                idle: Duration::from_millis(config.idle_timeout_ms),
                write: Duration::from_millis(config.write_timeout_ms),
            },
        ),
        draining,
        stop: stop.clone(),
        connections: TaskTracker::new(),
    });
    let loops = TaskTracker::new();
    let keeping = (server.watch.clone().keep(), died.clone().drop_guard());
    loops.spawn(async move { (keeping.0.await, keeping.1).0 });
    for listener in listeners {
        cut_stuck_clients(&listener, Duration::from_millis(config.write_timeout_ms));
        let accepting = (server.clone().accept_all(listener), died.clone().drop_guard());
        loops.spawn(async move { (accepting.0.await, accepting.1).0 });
    }
    loops.close();
    // Connections continue until the stop, even if a loop died.
    stop.cancelled().await;
    loops.wait().await;
    server.connections.close();
    if tokio::time::timeout(grace, server.connections.wait()).await.is_err() {
        let left = server.connections.len();
        tracing::warn!(connections = left, "closing connections that did not finish within the grace period");
    }
}

/// Makes the kernel close connections whose peer acknowledges nothing, or leaves no space in its
/// window, for this long. Nothing else does: while nothing can be written, the source of the answer
/// is not polled.
fn cut_stuck_clients(listener: &TcpListener, after: Duration) {
    // Connections inherit the option from their listener.
    if let Err(error) = SockRef::from(listener).set_tcp_user_timeout(Some(after)) {
        tracing::warn!(error = %error, "cannot set TCP_USER_TIMEOUT; clients that stop reading keep their connection");
    }
}

struct Server {
    audience: Audience,
    tls: Option<Arc<Tls>>,
    handshake_timeout: Duration,
    router: Router,
    short_cuts: Arc<ShortCuts>,
    proxies: Proxies,
    builder: Builder<StreamExecutor>,
    slots: Arc<Semaphore>,
    draining: Draining,
    stop: CancellationToken,
    watch: Arc<Watch>,
    connections: TaskTracker,
}

/// Maximum number of bytes that an HTTP/1 connection reads ahead of its handler. A head must fit.
const HTTP1_BUFFER: usize = 64 << 10;

fn builder(config: &Config) -> Builder<StreamExecutor> {
    let mut builder = Builder::new(StreamExecutor { write_timeout: Duration::from_millis(config.write_timeout_ms) });
    // The watch closes connections with slow heads: hyper's own timer would be armed for every
    // request. No `pipeline_flush`: it holds back an answer while unread bytes wait, and if the
    // rest of a request is not read (too large, malformed), the connection would close without an
    // answer.
    builder.http1().header_read_timeout(None).max_buf_size(HTTP1_BUFFER);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).max_concurrent_streams(256).keep_alive_interval(Duration::from_secs(20));
    // Limits of what a client may send before a handler reads it, and of what the library buffers
    // for a client that does not read.
    http2.initial_stream_window_size(64 << 10).initial_connection_window_size(256 << 10).max_send_buf_size(64 << 10);
    builder
}

impl Server {
    async fn accept_all(self: Arc<Self>, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => self.admit(stream, peer),
                Err(error) => {
                    // Mostly out of file descriptors: the loop must neither spin nor end.
                    tracing::warn!(error = %error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) {
        let Ok(slot) = self.slots.clone().try_acquire_owned() else {
            counter!("http_server_connections_refused_total").increment(1);
            return;
        };
        let server = self.clone();
        self.connections.spawn(async move {
            let open = gauge!("http_server_open_connections");
            open.increment(1);
            server.connection(stream, peer).await;
            open.decrement(1);
            drop(slot);
        });
    }

    async fn connection(&self, stream: TcpStream, peer: SocketAddr) {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(error = %error, "cannot set TCP_NODELAY");
        }
        let Some(stream) = self.encrypt(stream).await else { return };
        let activity = Arc::new(Activity::new(self.draining.clone(), self.audience));
        let (router, short_cuts) = (self.router.clone(), self.short_cuts.clone());
        let (peer_address, proxies) = (peer.ip(), self.proxies.clone());
        let service = Counted { router, short_cuts, peer: peer_address, proxies, activity: activity.clone() };
        let mut watched = self.watch.take(activity.clone());
        let stream = TokioIo::new(Metered::new(stream, activity));
        let mut connection = pin!(self.builder.serve_connection_with_upgrades(stream, service));
        let mut finishing = false;
        // Polled by hand: `select!` would poll the stop and a timer at every wake.
        let ended = poll_fn(|cx| {
            match watched.order(cx) {
                Order::GoOn => {}
                Order::Finish if finishing => {}
                Order::Finish => {
                    finishing = true;
                    connection.as_mut().graceful_shutdown();
                }
                Order::Drop => {
                    counter!("http_server_stalled_connections_total").increment(1);
                    return Poll::Ready(Ok(()));
                }
            }
            Poll::Ready(ready!(connection.as_mut().poll(cx)))
        })
        .await;
        if let Err(error) = ended {
            tracing::debug!(error = %error, client.address = %peer, "connection ended early");
        }
    }
}

impl Server {
    /// Performs the handshake if the listener has TLS. Returns `None` if it failed, took too long,
    /// or the server stops.
    async fn encrypt(&self, stream: TcpStream) -> Option<Wire> {
        let Some(tls) = &self.tls else { return Some(Wire::Left(stream)) };
        let handshake = tokio::time::timeout(self.handshake_timeout, tls.accept(stream));
        tokio::select! {
            () = self.stop.cancelled() => None,
            accepted = handshake => match accepted {
                Ok(Ok(stream)) => Some(Wire::Right(Box::new(stream))),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "no TLS with a client");
                    None
                }
                Err(_) => None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_alone_is_that_port_on_every_address() {
        let listeners = bind(&[":0".to_owned()]).await.unwrap();
        assert!(listeners[0].local_addr().unwrap().ip().is_unspecified());
        assert_eq!(with_host("127.0.0.1:80"), "127.0.0.1:80");
    }
}
