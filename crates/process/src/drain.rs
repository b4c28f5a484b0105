//! Start and shutdown of a process: signals, owned tasks, and the order in which they end.

use std::{
    collections::HashMap,
    convert::Infallible,
    error,
    future::Future,
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
    task::{self, JoinError, JoinSet},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

/// Time limits of the steps of a shutdown.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Delay between readiness turning false and the listener closing, in milliseconds, so that
    /// load balancers can notice.
    #[schemars(range(max = 86_400_000))]
    pub readiness_delay_ms: u64,
    /// Time for requests and handlers in flight to finish, in milliseconds.
    #[schemars(range(max = 86_400_000))]
    pub grace_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { readiness_delay_ms: 0, grace_ms: 15_000 }
    }
}

impl Config {
    pub fn readiness_delay(&self) -> Duration {
        Duration::from_millis(self.readiness_delay_ms)
    }

    pub fn grace(&self) -> Duration {
        Duration::from_millis(self.grace_ms)
    }
}

/// Flag that is set while the process drains: it still serves, and is about to stop. Cheap to
/// clone.
#[derive(Clone, Default)]
pub struct Draining(Arc<AtomicBool>);

impl Draining {
    pub fn begin(&self) {
        self.0.store(true, Relaxed);
    }

    /// Clears the flag, as if the drain had never begun.
    pub fn call_off(&self) {
        self.0.store(false, Relaxed);
    }

    pub fn has_begun(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// Shutdown controls of a server.
pub struct Ending {
    pub draining: Draining,
    /// Cancelled by the server when one of its loops ends before the stop.
    pub died: CancellationToken,
    /// Cancelled to make the server stop accepting connections.
    pub stop: CancellationToken,
    /// Time for requests in flight at the stop to finish.
    pub grace: Duration,
}

/// Receiver of SIGTERM and SIGINT. A dedicated thread waits for them until the process ends or is
/// replaced, even when no other task runs. The second signal ends the process at once.
#[derive(Clone)]
pub struct Signals(watch::Receiver<Option<&'static str>>);

impl Signals {
    /// Starts listening. No signal that arrives after this returns is missed.
    pub fn listen() -> io::Result<Self> {
        let (sender, receiver) = watch::channel(None);
        let (installed, installation) = std::sync::mpsc::channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let body = move || {
            runtime.block_on(async {
                let handlers =
                    signal(SignalKind::terminate()).and_then(|one| Ok((one, signal(SignalKind::interrupt())?)));
                match handlers {
                    Ok((terminate, interrupt)) => {
                        let _ = installed.send(Ok(()));
                        handle_signals(terminate, interrupt, &sender).await;
                    }
                    Err(error) => _ = installed.send(Err(error)),
                }
            });
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(body)?;
        installation.recv().map_err(io::Error::other)??;
        Ok(Self(receiver))
    }

    /// Waits for the first signal and returns its name; returns at once if it has already arrived.
    pub async fn first(&mut self) -> &'static str {
        match self.0.wait_for(Option::is_some).await.map(|name| *name) {
            Ok(Some(name)) => name,
            // The thread ends only after the second signal, which exits the process.
            _ => std::future::pending().await,
        }
    }

    /// Returns whether a signal has arrived.
    pub fn has_come(&self) -> bool {
        self.0.borrow().is_some()
    }
}

async fn handle_signals(mut terminate: Signal, mut interrupt: Signal, first: &watch::Sender<Option<&'static str>>) {
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    first.send_replace(Some(name));
    let code = tokio::select! {
        _ = terminate.recv() => 143,
        _ = interrupt.recv() => 130,
    };
    std::process::exit(code);
}

/// Error of any type.
pub type BoxError = Box<dyn error::Error + Send + Sync>;

/// Failure of a role's tasks.
#[derive(Debug, thiserror::Error)]
pub enum TaskFailure {
    #[error("{name} ended too early")]
    EndedEarly { name: &'static str },
    #[error("{name}: {source}")]
    Failed { name: &'static str, source: BoxError },
    /// The task panicked.
    #[error("{name} died: {source}")]
    Died { name: &'static str, source: JoinError },
    #[error("tasks did not end within {} s: {names}", .patience.as_secs())]
    Overdue { names: String, patience: Duration },
}

/// Error of a task that never ends by itself, and did.
#[derive(Debug, thiserror::Error)]
#[error("ended")]
struct Ended;

/// The tasks of a role. When one ends before the stop, the owner must drain and stop the others.
pub struct Tasks {
    set: JoinSet<Result<(), BoxError>>,
    /// Names of the tasks that have not ended.
    names: HashMap<task::Id, &'static str>,
    stop: CancellationToken,
}

impl Tasks {
    pub fn new(stop: CancellationToken) -> Self {
        Self { set: JoinSet::new(), names: HashMap::new(), stop }
    }

    /// Spawns a task that runs until the stop and then ends by itself.
    pub fn spawn<E: Into<BoxError>>(
        &mut self,
        name: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let id = self.set.spawn(async move { task.await.map_err(Into::into) }).id();
        self.names.insert(id, name);
    }

    /// Like [`Self::spawn`], for a task that cannot fail.
    pub fn spawn_infallible(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn(name, async move {
            task.await;
            Ok::<_, Infallible>(())
        });
    }

    /// Spawns a task that never ends by itself; it is dropped at the stop.
    pub fn spawn_forever(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.spawn(name, async move {
            tokio::select! {
                // Check the stop first: at the stop, the task may end at the same moment without
                // being at fault.
                biased;
                () = stop.cancelled() => Ok(()),
                () = task => Err(Ended),
            }
        });
    }

    /// Watches something that runs elsewhere and is needed until the stop; `died` is cancelled when
    /// it ends.
    pub fn watch(&mut self, name: &'static str, died: CancellationToken) {
        self.spawn_forever(name, died.cancelled_owned());
    }

    /// Waits until a task fails, panics, or ends before the stop, and returns the failure. Never
    /// returns if all tasks end as they should. Dropping the future loses nothing.
    pub async fn failure(&mut self) -> TaskFailure {
        match self.next_failure().await {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Stops the tasks and waits up to `patience` for them to end; tasks still running then are
    /// aborted. The error is the first failure, or names the tasks that did not end.
    pub async fn finish(mut self, patience: Duration) -> Result<(), TaskFailure> {
        self.stop.cancel();
        let deadline = Instant::now() + patience;
        let mut first_failure = None;
        loop {
            tokio::select! {
                biased;
                failure = self.next_failure() => match failure {
                    Some(failure) => _ = first_failure.get_or_insert(failure),
                    None => return first_failure.map_or(Ok(()), Err),
                },
                () = tokio::time::sleep_until(deadline) => {
                    let mut names: Vec<&str> = self.names.values().copied().collect();
                    names.sort_unstable();
                    let names = names.join(", ");
                    tracing::error!(tasks = names, "tasks did not end in time");
                    return Err(first_failure.unwrap_or(TaskFailure::Overdue { names, patience }));
                }
            }
        }
    }

    /// Returns the next failure; `None` when all tasks have ended.
    async fn next_failure(&mut self) -> Option<TaskFailure> {
        while let Some(joined) = self.set.join_next_with_id().await {
            let early = !self.stop.is_cancelled();
            let id = joined.as_ref().map_or_else(JoinError::id, |(id, _)| *id);
            let name = self.names.remove(&id).unwrap_or("a task");
            let failure = match joined {
                Ok((_, Ok(()))) if !early => continue,
                Ok((_, Ok(()))) => TaskFailure::EndedEarly { name },
                Ok((_, Err(source))) => TaskFailure::Failed { name, source },
                Err(source) => TaskFailure::Died { name, source },
            };
            tracing::error!(problem = %failure, "task failed, stopping the role");
            return Some(failure);
        }
        None
    }
}

/// Exits the process with code 1 unless it has ended within `limit`. Runs in its own thread,
/// because blocked tasks may occupy all other threads.
pub fn exit_after(limit: Duration) {
    let exit = move || {
        std::thread::sleep(limit);
        tracing::error!(limit.s = limit.as_secs(), "process did not stop in time, exiting");
        std::process::exit(1);
    };
    if let Err(error) = std::thread::Builder::new().name("exit-deadline".to_owned()).spawn(exit) {
        tracing::warn!(error = %error, "cannot start the thread that limits the time of the shutdown");
    }
}

/// Waits for the stop, and then for `grace`.
pub async fn time_over(stop: &CancellationToken, grace: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(grace).await;
}

/// Error of [`until_done`].
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    #[error("a part of it ended too early")]
    EndedEarly,
    #[error(transparent)]
    Died(#[from] JoinError),
}

/// Waits until all tasks have ended by themselves; tasks that still run `grace` after the stop are
/// aborted. A task that panics or ends before the stop is an error.
pub async fn until_done(mut tasks: JoinSet<()>, stop: CancellationToken, grace: Duration) -> Result<(), PartError> {
    let all_ended = async {
        while let Some(ended) = tasks.join_next().await {
            ended?;
            if !stop.is_cancelled() {
                return Err(PartError::EndedEarly);
            }
        }
        Ok(())
    };
    tokio::select! {
        () = time_over(&stop, grace) => Ok(()),
        ended = all_ended => ended,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn a_task_that_dies_is_reported_while_its_siblings_go_on_until_they_are_stopped() {
        for broken in ["returns", "fails", "panics", "dies elsewhere"] {
            let stop = CancellationToken::new();
            let mut tasks = Tasks::new(stop.clone());
            let sibling = stop.clone();
            tasks.spawn_infallible("patient", async move { sibling.cancelled().await });
            tasks.spawn_forever("forever", std::future::pending());
            let elsewhere = CancellationToken::new();
            tasks.watch("thread", elsewhere.clone());
            match broken {
                "returns" => tasks.spawn_infallible("broken", async {}),
                "fails" => tasks.spawn("broken", async { Err("no luck") }),
                "panics" => tasks.spawn_infallible("broken", async { panic!("expected") }),
                _ => drop(std::thread::spawn(move || drop(elsewhere.drop_guard()))),
            }
            let failure = tasks.failure().await.to_string();
            let expected = match broken {
                "returns" => "broken ended too early",
                "fails" => "broken: no luck",
                "panics" => "broken died: ",
                _ => "thread: ended",
            };
            assert!(failure.starts_with(expected), "{failure}");
            assert!(!stop.is_cancelled() && tasks.set.len() >= 2, "the siblings go on");
            tasks.finish(60 * SECOND).await.unwrap();
            assert!(stop.is_cancelled());
        }
    }

    #[tokio::test]
    async fn a_sibling_that_never_ends_is_aborted_after_a_while_and_is_an_error() {
        let mut tasks = Tasks::new(CancellationToken::new());
        let (dropped, aborted) = tokio::sync::oneshot::channel::<()>();
        tasks.spawn_infallible("hanging", async {
            let _dropped = dropped;
            std::future::pending().await
        });
        tasks.spawn_forever("forever", std::future::pending());
        let begun = Instant::now();
        let overdue = tasks.finish(SECOND).await.unwrap_err();
        assert_eq!(overdue.to_string(), "tasks did not end within 1 s: hanging");
        assert!(begun.elapsed() >= SECOND);
        assert!(aborted.await.is_err());
    }

    #[tokio::test]
    async fn a_stop_ends_all_of_them_without_an_error() {
        let mut tasks = Tasks::new(CancellationToken::new());
        tasks.spawn_forever("forever", std::future::pending());
        tasks.finish(60 * SECOND).await.unwrap();
    }

    #[tokio::test]
    async fn a_part_that_ends_before_the_stop_is_an_error() {
        let (stop, mut parts) = (CancellationToken::new(), JoinSet::new());
        parts.spawn(std::future::pending());
        parts.spawn(async {});
        assert!(matches!(until_done(parts, stop.clone(), SECOND).await, Err(PartError::EndedEarly)));
        stop.cancel();
        let mut parts = JoinSet::new();
        parts.spawn(async {});
        until_done(parts, stop, 60 * SECOND).await.unwrap();
    }

    /// Runs itself as a child process that blocks its only thread.
    #[test]
    fn a_process_that_does_not_stop_is_ended_with_exit_code_1() {
        const BLOCKS: &str = "DRAIN_TEST_BLOCKS";
        if std::env::var_os(BLOCKS).is_some() {
            exit_after(Duration::from_millis(100));
            std::thread::sleep(60 * SECOND);
            return;
        }
        let name = "drain::tests::a_process_that_does_not_stop_is_ended_with_exit_code_1";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        let ended = child.args(["--exact", name]).env(BLOCKS, "yes").output().unwrap();
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(!String::from_utf8_lossy(&ended.stdout).contains("test result"), "{ended:?}");
    }
}
