//! Starting and stopping: signals, owned tasks, and the order in which things end.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// How long each step of a shutdown may take.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Between readiness going false and the listener closing, in milliseconds: load balancers
    /// need time to notice.
    pub readiness_delay_ms: u64,
    /// For requests and handlers in flight to finish, in milliseconds.
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

/// Whether the process is on its way out, though it still serves. Cheap to clone.
#[derive(Clone, Default)]
pub struct Draining(Arc<AtomicBool>);

impl Draining {
    pub fn begin(&self) {
        self.0.store(true, Relaxed);
    }

    pub fn has_begun(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// How a server ends.
pub struct Ending {
    pub draining: Draining,
    /// No more is accepted from then on.
    pub stop: CancellationToken,
    /// For what is being answered then.
    pub grace: Duration,
}

/// Resolves at the first SIGTERM or SIGINT; from then on a second one ends the process at once.
pub async fn signalled() -> std::io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tokio::spawn(async move {
        let code = tokio::select! {
            _ = terminate.recv() => 143,
            _ = interrupt.recv() => 130,
        };
        std::process::exit(code);
    });
    Ok(name)
}

/// The tasks of a role. When one ends before the stop, its siblings are stopped too.
pub struct Tasks {
    set: JoinSet<(&'static str, Result<(), String>)>,
    stop: CancellationToken,
}

impl Tasks {
    pub fn new(stop: CancellationToken) -> Self {
        Self { set: JoinSet::new(), stop }
    }

    /// A task that runs until the stop and then ends by itself.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = Result<(), String>> + Send + 'static) {
        self.set.spawn(async move { (name, task.await) });
    }

    /// A task that never ends by itself; it is dropped at the stop.
    pub fn spawn_forever(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.spawn(
            name,
            async move { stop.run_until_cancelled(task).await.map_or(Ok(()), |()| Err("ended".to_owned())) },
        );
    }

    /// Waits for all of them. The first that fails, or ends too early, stops the others and is the error.
    pub async fn join(mut self) -> Result<(), String> {
        let mut first_problem = None;
        while let Some(joined) = self.set.join_next().await {
            let early = !self.stop.is_cancelled();
            let problem = match joined {
                Ok((_, Ok(()))) if !early => continue,
                Ok((name, Ok(()))) => format!("{name} ended too early"),
                Ok((name, Err(error))) => format!("{name}: {error}"),
                Err(error) => format!("a task died: {error}"),
            };
            tracing::error!(problem, "a task of this role failed; the role stops");
            first_problem.get_or_insert(problem);
            self.stop.cancel();
        }
        first_problem.map_or(Ok(()), Err)
    }
}

/// Ends when `grace` has passed since the stop.
pub async fn time_over(stop: &CancellationToken, grace: Duration) {
    stop.cancelled().await;
    tokio::time::sleep(grace).await;
}

/// Waits until these tasks have ended by themselves; those that have not within `grace` after the stop are aborted.
/// The error is that of a task that panicked.
pub async fn until_done(mut tasks: JoinSet<()>, stop: CancellationToken, grace: Duration) -> Result<(), String> {
    let all_ended = async {
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(|error| error.to_string())?;
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

    #[tokio::test]
    async fn when_a_task_dies_its_siblings_stop_and_it_is_the_error() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::new(stop.clone());
        let sibling = stop.clone();
        tasks.spawn("patient", async move {
            sibling.cancelled().await;
            Ok(())
        });
        tasks.spawn_forever("forever", std::future::pending());
        tasks.spawn("broken", async { Err("no luck".to_owned()) });
        assert_eq!(tasks.join().await, Err("broken: no luck".to_owned()));
        assert!(stop.is_cancelled());
    }

    #[tokio::test]
    async fn a_stop_ends_all_of_them_without_an_error() {
        let stop = CancellationToken::new();
        let mut tasks = Tasks::new(stop.clone());
        tasks.spawn_forever("forever", std::future::pending());
        stop.cancel();
        assert_eq!(tasks.join().await, Ok(()));
    }
}
