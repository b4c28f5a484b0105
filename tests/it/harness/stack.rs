//! Real servers, started by `dev/stack`: one stack that all tests share, and own stacks for tests
//! that break servers.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
    time::Duration,
};

use tokio::sync::{Semaphore, SemaphorePermit};

/// Brokers need much memory and CPU: only one test at a time has its own stack with Kafka.
static OWN_KAFKA: Semaphore = Semaphore::const_new(1);

/// A running stack, with the variables of `dev/stack env`.
pub struct Stack {
    state: PathBuf,
    env: BTreeMap<String, String>,
    /// Whether the stack belongs to one test and is deleted at its end. The shared one stays up for
    /// the next run.
    own: bool,
    _turn: Option<SemaphorePermit<'static>>,
}

impl Stack {
    /// Returns the shared stack. The first call starts it.
    pub fn shared() -> &'static Stack {
        static SHARED: OnceLock<Stack> = OnceLock::new();
        SHARED.get_or_init(|| {
            let state = state_folder("test-stack");
            // `dev/test` starts the stack once for all processes, and sets this variable.
            let is_up = std::env::var_os("TEST_STACK_IS_UP").is_some();
            if !is_up {
                run(&state, &["up"]);
            }
            let stack = Stack { env: environment(&state), state, own: false, _turn: None };
            if !is_up {
                super::kafka::remove_leftovers(stack.get("KAFKA_BROKERS"));
            }
            stack
        })
    }

    /// Starts a stack for one test with these options of `dev/stack up`. It is deleted on drop.
    pub async fn own(name: &str, options: &[&str]) -> Stack {
        let without_kafka = options.windows(2).any(|pair| pair[0] == "--only" && !pair[1].contains("kafka"));
        let turn = if without_kafka { None } else { Some(OWN_KAFKA.acquire().await.unwrap()) };
        let state = state_folder(&format!("test-stack-{name}"));
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let env = off_runtime(move || {
            let words: Vec<&str> = std::iter::once("up").chain(options.iter().map(String::as_str)).collect();
            run(&state, &["wipe"]);
            run(&state, &words);
            (environment(&state), state)
        });
        let (env, state) = env.await;
        Stack { env, state, own: true, _turn: turn }
    }

    /// Like [`Stack::own`], with a broker that advertises the address of a proxy (the option
    /// `advertised.listeners`). The startup probe goes through the proxy as well, so the proxy gets
    /// the broker's address while the broker starts.
    pub async fn behind(name: &str, options: &[&str], lead_to: impl Fn(&str)) -> Stack {
        let ports = state_folder(&format!("test-stack-{name}")).join("ports");
        let follow = async {
            loop {
                let text = std::fs::read_to_string(&ports).unwrap_or_default();
                if let Some(port) = text.lines().find_map(|line| line.strip_prefix("kafka-1=")) {
                    lead_to(&format!("127.0.0.1:{port}"));
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::select! {
            stack = Stack::own(name, options) => stack,
            () = follow => unreachable!("it goes on for ever"),
        }
    }

    /// Returns a variable of `dev/stack env`.
    pub fn get(&self, name: &str) -> &str {
        self.find(name).unwrap_or_else(|| panic!("the stack in {} has no {name}", self.state.display()))
    }

    pub fn find(&self, name: &str) -> Option<&str> {
        self.env.get(name).map(String::as_str)
    }

    /// Runs `dev/stack COMMAND SERVICE…` on this stack. Fails if a server comes back on another
    /// address: a test that waits for it would wait for ever.
    pub async fn ctl(&self, words: &[&str]) {
        self.messages_of(words).await;
    }

    /// Like [`Self::ctl`], and returns what the command writes to stderr.
    pub async fn messages_of(&self, words: &[&str]) -> String {
        let state = self.state.clone();
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let env = off_runtime(move || {
            let (_, messages) = run(&state, &words.iter().map(String::as_str).collect::<Vec<_>>());
            (environment(&state), messages)
        });
        let (env, messages) = env.await;
        assert_eq!(env, self.env, "another port than before");
        messages
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if self.own {
            let _ = command(&self.state, &["wipe"]).output();
        }
    }
}

/// Runs a blocking call outside of the async runtime.
pub async fn off_runtime<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(call).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn state_folder(name: &str) -> PathBuf {
    super::app::target_folder().join(name)
}

fn command(state: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/stack"));
    command.args(words).arg("--state").arg(state).env("KAFKA_HEAP", "384m").stdin(std::process::Stdio::null());
    command
}

/// Returns stdout and stderr.
fn run(state: &Path, words: &[&str]) -> (String, String) {
    let output = command(state, words).output().expect("dev/stack cannot be run");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "dev/stack {words:?} failed:\n{out}{err}");
    (out.into_owned(), err.into_owned())
}

/// Parses lines such as `export KAFKA_BROKERS=127.0.0.1:9092`.
fn environment(state: &Path) -> BTreeMap<String, String> {
    let (text, _) = run(state, &["env"]);
    let pairs = text.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}
