//! Runs the real binary as a child process.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use reqwest::{Body, Method};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{
    Answer,
    wait::{seconds, until, until_now},
};

/// The binary under test. `TEST_BINARY=…/target/debug/postrider` selects another one, such as that
/// of an earlier commit.
static BINARY: LazyLock<PathBuf> = LazyLock::new(|| {
    let other = std::env::var_os("TEST_BINARY");
    other.map_or_else(|| env!("CARGO_BIN_EXE_postrider").into(), PathBuf::from)
});

/// Returns the build folder, which also holds the logs and stacks of tests.
pub fn target_folder() -> PathBuf {
    BINARY.ancestors().nth(2).expect("the binary is in target/PROFILE").to_owned()
}

pub fn log_folder() -> PathBuf {
    let folder = target_folder().join("test-logs");
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Returns a command that runs the binary with these variables and no other `POSTRIDER_*`, in a
/// folder without a `postrider.yaml`.
pub fn command(env: &BTreeMap<String, String>) -> Command {
    without_own_variables(Command::new(&*BINARY), env)
}

/// Like [`command`], in the network namespace of another process.
fn command_in_network_of(pid: u32, env: &BTreeMap<String, String>) -> Command {
    let mut enter = Command::new("nsenter");
    enter.arg(format!("--net=/proc/{pid}/ns/net")).arg(&*BINARY);
    without_own_variables(enter, env)
}

fn without_own_variables(mut command: Command, env: &BTreeMap<String, String>) -> Command {
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("POSTRIDER_")) {
        command.env_remove(name);
    }
    command.envs(env).current_dir(log_folder()).stdin(Stdio::null());
    command
}

pub fn migrate(env: &BTreeMap<String, String>) {
    let output = command(env).arg("migrate").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Options to start a process with.
#[must_use]
pub struct Builder {
    name: String,
    role: &'static str,
    env: BTreeMap<String, String>,
    words: Vec<String>,
    ready: bool,
    network_of: Option<u32>,
}

impl Builder {
    pub fn new(name: &str, env: BTreeMap<String, String>) -> Self {
        Self { name: name.to_owned(), role: "all", env, words: Vec::new(), ready: true, network_of: None }
    }

    pub fn role(mut self, role: &'static str) -> Self {
        self.role = role;
        self
    }

    /// Runs the command `relay` with these arguments, instead of a role.
    pub fn relay(mut self, words: impl IntoIterator<Item = impl Into<String>>) -> Self {
        (self.role, self.words) = ("relay", vec!["relay".to_owned()]);
        self.words.extend(words.into_iter().map(Into::into));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    pub fn unset(mut self, name: &str) -> Self {
        self.env.remove(name);
        self
    }

    /// Runs the process in the network namespace of another process.
    pub fn in_network_of(mut self, pid: Option<u32>) -> Self {
        self.network_of = pid;
        self
    }

    /// Makes [`Builder::start`] return as soon as the process listens, ready or not.
    pub fn even_if_not_ready(mut self) -> Self {
        self.ready = false;
        self
    }

    /// Spawns the process without waiting, and discards its output.
    pub fn spawn(self) -> Child {
        let mut command = command(&self.env);
        command.args(["run", "--role", self.role]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// Spawns the process and waits until it is ready.
    pub async fn start(self) -> App {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = log_folder().join(format!("{}{}-{number}.log", self.name, self.role));
        let words =
            if self.words.is_empty() { ["run", "--role", self.role].map(str::to_owned).into() } else { self.words };
        let mut command =
            self.network_of.map_or_else(|| command(&self.env), |pid| command_in_network_of(pid, &self.env));
        let child = command.args(words).stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap();
        let client = reqwest::Client::builder().timeout(seconds(60)).build().unwrap();
        let mut app = App { child, log, client, api: String::new(), management: String::new() };
        app.management = app.address("serving probes and metrics").await;
        if matches!(self.role, "all" | "api") {
            app.api = app.address("serving HTTP").await;
        }
        if self.ready {
            app.await_ready(seconds(30)).await;
        }
        app
    }
}

/// A running process. Drop kills it, and fails the test if a handler has panicked.
pub struct App {
    child: Child,
    log: PathBuf,
    pub client: reqwest::Client,
    /// `http://127.0.0.1:PORT`; empty if the role serves no API.
    pub api: String,
    pub management: String,
}

impl App {
    async fn address(&mut self, message: &str) -> String {
        until_now(&format!("`{message}` in {}", self.log.display()), seconds(20), || {
            let exited = self.child.try_wait().unwrap();
            let found = self.log_lines().into_iter().find(|line| line["message"] == message);
            assert!(found.is_some() || exited.is_none(), "it ended: {exited:?}\n{}", self.log());
            Some(format!("http://{}", found?["address"].as_str()?))
        })
        .await
    }

    pub fn log_path(&self) -> &Path {
        &self.log
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn log_lines(&self) -> Vec<Value> {
        self.log().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a log line with this message.
    pub async fn await_log(&self, message: &str, within: Duration) -> Value {
        let what = format!("`{message}` in {}", self.log.display());
        until_now(&what, within, || self.log_lines().into_iter().find(|line| line["message"] == message)).await
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn is_ready(&self) -> bool {
        matches!(self.client.get(format!("{}/readyz", self.management)).send().await, Ok(answer) if answer.status() == 200)
    }

    pub async fn await_ready(&self, within: Duration) {
        let what = format!("{} is ready ({})", self.management, self.log.display());
        until(&what, within, || async { self.is_ready().await.then_some(()) }).await;
    }

    /// Returns the detail of a failing readiness check; `None` while it passes.
    pub async fn failing(&self, check: &str) -> Option<String> {
        // A process that has just started may not have registered all checks yet.
        let what = format!("there is a check `{check}`");
        let check = until(&what, seconds(10), || async {
            let report = self.manage("/readyz?verbose").await.json();
            Some(report["checks"][check].clone()).filter(Value::is_object)
        })
        .await;
        (check["status"] == "failing").then(|| check["detail"].as_str().unwrap_or("?").to_owned())
    }

    pub async fn await_failing(&self, check: &str, within: Duration) -> String {
        until(&format!("readiness fails for {check}"), within, || self.failing(check)).await
    }

    /// Sends a GET request to the management port.
    pub async fn manage(&self, path: &str) -> Answer {
        let answer = self.client.get(format!("{}{path}", self.management)).send().await.unwrap();
        Answer::read(answer).await.unwrap()
    }

    /// Sends a request to the API. Returns an error if the connection breaks.
    pub async fn try_request(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Body>,
    ) -> Result<Answer, reqwest::Error> {
        let mut request = self.client.request(method, format!("{}{path}", self.api)).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Answer::read(request.send().await?).await
    }

    pub async fn request(&self, method: Method, path: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Answer {
        self.try_request(method, path, headers, body).await.unwrap_or_else(|error| panic!("{path}: {error:?}"))
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.request(Method::GET, path, &[], "").await
    }

    /// Posts the text unchanged, with the content type of JSON.
    pub async fn post(&self, path: &str, body: impl Into<Body>) -> Answer {
        self.request(Method::POST, path, &[("content-type", "application/json")], body).await
    }

    pub async fn post_with(&self, path: &str, headers: &[(&str, &str)], body: &Value) -> Answer {
        let headers = [&[("content-type", "application/json")], headers].concat();
        self.request(Method::POST, path, &headers, body.to_string()).await
    }

    pub async fn post_json(&self, path: &str, body: &Value) -> Answer {
        self.post_with(path, &[], body).await
    }

    /// Returns the value of the first metric line that begins with `beginning`.
    pub async fn metric(&self, beginning: &str) -> Option<f64> {
        let text = self.manage("/metrics").await.text();
        let line = text.lines().find(|line| line.starts_with(beginning))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    /// Returns the resident memory in KiB.
    pub fn rss_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub fn sigterm(&self) {
        self.signal(Signal::TERM);
    }

    /// Returns the exit status, if the process has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the process ends.
    pub async fn exit(&mut self, within: Duration) -> ExitStatus {
        until_now(&format!("it ends ({})", self.log.display()), within, || self.child.try_wait().unwrap()).await
    }

    /// Sends SIGTERM and fails unless the process exits with success.
    pub async fn stop(mut self) {
        self.sigterm();
        let status = self.exit(seconds(30)).await;
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// Kills the process with SIGKILL.
    pub async fn kill(mut self) {
        self.child.kill().unwrap();
        self.exit(seconds(5)).await;
    }
}

impl Drop for App {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let log = self.log();
        if std::thread::panicking() {
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("--- {}\n{}", self.log.display(), lines[lines.len().saturating_sub(25)..].join("\n"));
        } else {
            assert!(!log.contains("panicked"), "{} says that something panicked", self.log.display());
        }
    }
}
