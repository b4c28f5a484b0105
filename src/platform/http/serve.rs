//! The accept loops and the connections, from first byte to drained.

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
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    activity::{Activity, Counted, Metered},
    answer::StreamExecutor,
    client::Proxies,
    config::Config,
    shortcut::ShortCuts,
    watch::{Order, Timeouts, Watch},
};
use crate::platform::drain::{Draining, Ending};

/// Binds every address, so that a port that is taken is known before anything starts.
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

/// A port alone is that port on every address.
fn with_host(address: &str) -> Cow<'_, str> {
    if address.starts_with(':') { format!("0.0.0.0{address}").into() } else { address.into() }
}

/// Who can reach a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    Callers,
    /// Whoever runs it. Answers do not draw from the memory budgets: they say what is wrong when those are used up.
    Operators,
}

/// Serves the router, and short cuts past it, until the stop, then lets connections finish what they answer, up to the grace.
pub async fn serve(
    audience: Audience,
    listeners: Vec<TcpListener>,
    router: Router,
    short_cuts: ShortCuts,
    config: &Config,
    proxies: Proxies,
    ending: Ending,
) {
    let Ending { draining, died, stop, grace } = ending;
    let server = Arc::new(Server {
        audience,
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
    // Connections go on until the stop, also where a loop died.
    stop.cancelled().await;
    loops.wait().await;
    server.connections.close();
    if tokio::time::timeout(grace, server.connections.wait()).await.is_err() {
        let left = server.connections.len();
        tracing::warn!(connections = left, "closing connections that did not finish within the grace period");
    }
}

/// Has the kernel cut connections whose peer acknowledges nothing, or leaves no room, for this long.
/// Nothing else would: while nothing can be written, whatever makes the answer is not asked for more.
fn cut_stuck_clients(listener: &TcpListener, after: Duration) {
    // Connections inherit it from their listener.
    if let Err(error) = SockRef::from(listener).set_tcp_user_timeout(Some(after)) {
        tracing::warn!(error = %error, "cannot set TCP_USER_TIMEOUT; clients that stop reading keep their connection");
    }
}

struct Server {
    audience: Audience,
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

/// What a connection of HTTP/1 reads ahead of its handler, at most. A head must fit.
const HTTP1_BUFFER: usize = 64 << 10;

fn builder(config: &Config) -> Builder<StreamExecutor> {
    let mut builder = Builder::new(StreamExecutor { write_timeout: Duration::from_millis(config.write_timeout_ms) });
    // Slow heads are the watch's business: hyper's own timer would be armed for every request.
    // And no `pipeline_flush`: it holds back an answer while unread bytes wait, and where the rest of
    // a request is not to be read (too large, malformed), the connection would close without one.
    builder.http1().header_read_timeout(None).max_buf_size(HTTP1_BUFFER);
    let mut http2 = builder.http2();
    http2.timer(TokioTimer::new()).max_concurrent_streams(256).keep_alive_interval(Duration::from_secs(20));
    // What a client may send before a handler reads it, and what the library keeps for one that does not read.
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
                    // Out of files, mostly: the loop must not spin, and must not end either.
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
        let activity = Arc::new(Activity::new(self.draining.clone(), self.audience));
        let (router, short_cuts) = (self.router.clone(), self.short_cuts.clone());
        let (peer_address, proxies) = (peer.ip(), self.proxies.clone());
        let service = Counted { router, short_cuts, peer: peer_address, proxies, activity: activity.clone() };
        let mut watched = self.watch.take(activity.clone());
        let stream = TokioIo::new(Metered::new(stream, activity));
        let mut connection = pin!(self.builder.serve_connection_with_upgrades(stream, service));
        let mut finishing = false;
        // By hand instead of `select!`, which would ask the stop and a timer at every wake.
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
