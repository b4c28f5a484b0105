//! The watch over all connections of a server. It closes connections that stall in a request's head
//! or are idle for too long, and makes all of them finish at the stop. One look at all connections
//! now and then costs less than a timer per connection, which would be polled at every wake.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{
            AtomicU8, AtomicU64,
            Ordering::{AcqRel, Acquire, Relaxed},
        },
    },
    task::{Context, Waker},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use parking_lot::{Mutex, MutexGuard};
use tokio_util::sync::CancellationToken;

use super::activity::Activity;

/// Order to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
pub enum Order {
    GoOn,
    /// Answer the requests that have arrived, and close.
    Finish,
    /// Close at once, because the head of a request is not completed, or an answer is not read.
    Drop,
}

/// Mailbox through which a connection gets orders.
#[derive(Default)]
struct Mailbox {
    order: AtomicU8,
    waker: AtomicWaker,
}

impl Mailbox {
    fn send(&self, order: Order) {
        self.order.fetch_max(order as u8, AcqRel);
        self.waker.wake();
    }
}

/// Watch over the connections of a server.
pub struct Watch {
    connections: Mutex<HashMap<u64, Watched>>,
    next_id: AtomicU64,
    stop: CancellationToken,
    timeouts: Timeouts,
}

/// Longest time that a connection may spend in each state.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// In the head of a request.
    pub header: Duration,
    /// Without a request.
    pub idle: Duration,
    /// Without reading the answer.
    pub write: Duration,
}

impl Watch {
    pub fn new(stop: CancellationToken, timeouts: Timeouts) -> Arc<Self> {
        Arc::new(Self { connections: Mutex::default(), next_id: AtomicU64::new(0), stop, timeouts })
    }

    /// Watches a connection until the returned value is dropped.
    pub fn take(self: &Arc<Self>, activity: Arc<Activity>) -> UnderWatch {
        let mailbox = Arc::<Mailbox>::default();
        let id = self.next_id.fetch_add(1, Relaxed);
        self.connections().insert(id, Watched::new(activity, mailbox.clone()));
        // The stop may have come before the connection was registered.
        if self.stop.is_cancelled() {
            mailbox.send(Order::Finish);
        }
        UnderWatch { watch: self.clone(), id, mailbox, waker: None }
    }

    /// Looks at all connections until the stop, and then orders them to finish.
    pub async fn keep(self: Arc<Self>) {
        let every = (self.timeouts.header.min(self.timeouts.write) / 4).max(Duration::from_millis(10));
        while self.stop.run_until_cancelled(tokio::time::sleep(every)).await.is_some() {
            for watched in self.connections().values_mut() {
                watched.look(every, self.timeouts);
            }
        }
        for watched in self.connections().values() {
            watched.mailbox.send(Order::Finish);
        }
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Watched>> {
        self.connections.lock()
    }
}

/// Connection's end of the watch.
pub struct UnderWatch {
    watch: Arc<Watch>,
    id: u64,
    mailbox: Arc<Mailbox>,
    waker: Option<Waker>,
}

impl UnderWatch {
    /// Returns the current order; the task is woken when it changes.
    pub fn order(&mut self, cx: &Context<'_>) -> Order {
        if !self.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.mailbox.waker.register(cx.waker());
            self.waker = Some(cx.waker().clone());
        }
        match self.mailbox.order.load(Acquire) {
            0 => Order::GoOn,
            1 => Order::Finish,
            _ => Order::Drop,
        }
    }
}

impl Drop for UnderWatch {
    fn drop(&mut self) {
        self.watch.connections().remove(&self.id);
    }
}

/// State of one connection at the last look.
struct Watched {
    activity: Arc<Activity>,
    mailbox: Arc<Mailbox>,
    requests: u64,
    idle: Duration,
    /// Time since the connection was first seen in the head of a request.
    in_head: Option<Duration>,
}

impl Watched {
    fn new(activity: Arc<Activity>, mailbox: Arc<Mailbox>) -> Self {
        Self { activity, mailbox, requests: 0, idle: Duration::ZERO, in_head: None }
    }

    fn look(&mut self, since_last: Duration, timeouts: Timeouts) -> Order {
        let activity = &self.activity;
        let requests = activity.requests.load(Relaxed);
        let busy = activity.active.load(Relaxed) > 0 || requests != self.requests;
        let in_head = !busy
            && !activity.http2.load(Relaxed)
            && activity.bytes_read.load(Relaxed) > activity.bytes_settled.load(Relaxed);
        self.requests = requests;
        self.idle = if busy || in_head { Duration::ZERO } else { self.idle + since_last };
        self.in_head = in_head.then(|| self.in_head.map_or(Duration::ZERO, |before| before + since_last));
        // Streams that still exist are reset one by one before that.
        let stuck = activity.unsent_for().is_some_and(|unsent| unsent >= 2 * timeouts.write);
        let order = match self.in_head {
            _ if stuck => Order::Drop,
            Some(so_far) if so_far >= timeouts.header => Order::Drop,
            _ if self.idle >= timeouts.idle => Order::Finish,
            _ => return Order::GoOn,
        };
        self.mailbox.send(order);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::{super::activity::Running, *};

    const LOOK: Duration = Duration::from_secs(5);

    fn watched() -> Watched {
        Watched::new(Arc::default(), Arc::default())
    }

    fn look(watched: &mut Watched) -> Order {
        watched.look(LOOK, Timeouts { header: 2 * LOOK, idle: 4 * LOOK, write: LOOK })
    }

    #[test]
    fn a_head_that_is_not_finished_within_its_time_is_a_stall() {
        let mut watched = watched();
        watched.activity.bytes_read.store(5, Relaxed);
        let orders: Vec<Order> = (0..3).map(|_| look(&mut watched)).collect();
        assert_eq!(orders, [Order::GoOn, Order::GoOn, Order::Drop]);
    }

    #[test]
    fn a_request_that_runs_for_long_is_kept() {
        let mut watched = watched();
        watched.activity.bytes_read.store(5, Relaxed);
        let running = Running::start(&watched.activity);
        assert!((0..100).all(|_| look(&mut watched) == Order::GoOn));
        drop(running);
        assert_eq!(look(&mut watched), Order::GoOn);
    }

    #[test]
    fn bytes_between_requests_on_http2_are_no_head_and_do_not_keep_the_connection() {
        let mut watched = watched();
        watched.activity.http2.store(true, Relaxed);
        watched.activity.bytes_read.store(60, Relaxed);
        let orders: Vec<Order> = (0..4).map(|_| look(&mut watched)).collect();
        assert_eq!(orders, [Order::GoOn, Order::GoOn, Order::GoOn, Order::Finish]);
    }

    #[test]
    fn a_connection_without_requests_is_idle_after_its_time() {
        let mut watched = watched();
        let orders: Vec<Order> = (0..4).map(|_| look(&mut watched)).collect();
        assert_eq!(orders, [Order::GoOn, Order::GoOn, Order::GoOn, Order::Finish]);
    }

    #[tokio::test]
    async fn the_stop_reaches_connections_that_come_before_and_after_it() {
        let stop = CancellationToken::new();
        let watch = Watch::new(stop.clone(), Timeouts { header: LOOK, idle: LOOK, write: LOOK });
        let cx = &Context::from_waker(Waker::noop());
        let mut before = watch.take(Arc::default());
        assert_eq!(before.order(cx), Order::GoOn);
        stop.cancel();
        watch.clone().keep().await;
        let mut after = watch.take(Arc::default());
        assert_eq!((before.order(cx), after.order(cx)), (Order::Finish, Order::Finish));
        drop((before, after));
        assert!(watch.connections().is_empty());
    }
}
