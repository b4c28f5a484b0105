//! Every program of `examples/`, in the languages that are installed.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;

use crate::harness::{
    App, World,
    app::{log_folder, target_folder},
    stack::off_runtime,
};

/// Runs a command to its end and returns its output. `None` if its program is not installed.
async fn run(app: &App, topic: &str, folder: &str, words: &[String]) -> Option<String> {
    let mut command = Command::new(program(&words[0]));
    command.args(&words[1..]).current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(folder));
    command.env("API_URL", &app.api).env("TOPIC", topic).env("GOFLAGS", "-mod=mod").env("GOTOOLCHAIN", "local");
    let what = format!("{command:?}");
    let output = match off_runtime(move || command.output()).await {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("{} is not installed: skipped", words[0]);
            return None;
        }
        output => output.unwrap(),
    };
    assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// Returns where a program is: Node.js may be one that `dev/setup --test` has installed.
fn program(name: &str) -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let installed = cache.map(|cache| cache.join("postrider/clients").join(name));
    installed.filter(|program| program.exists()).unwrap_or_else(|| name.into())
}

async fn started() -> (World, App, String) {
    let world = World::new().await.with_postgres().await;
    let topic = world.make_topic("example", 2).await;
    let app = world.app().start().await;
    (world, app, topic)
}

/// Runs the four programs of one language, which `command` starts by name.
async fn check(folder: &str, command: impl Fn(&str) -> Vec<String>) {
    let (world, app, topic) = started().await;
    let Some(value) = run(&app, &topic, folder, &command("kv")).await else { return app.stop().await };
    assert!(value.replace(['"', '\'', ' '], "").contains("{visits:2}"), "{value}");
    let positions = run(&app, &topic, folder, &command("produce")).await.unwrap();
    let mut written: Vec<_> =
        world.kafka.read(&topic).await.iter().map(|record| (record.key().to_owned(), record.json())).collect();
    written.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(written, [("a".to_owned(), json!(1)), ("b".to_owned(), json!([2]))]);
    assert_eq!(positions.lines().filter(|line| line.split(' ').count() == 2).count(), 2, "{positions}");
    let message = run(&app, &topic, folder, &command("messages")).await.unwrap();
    assert!(message.contains("hello"), "{message}");
    let comments = run(&app, &topic, folder, &command("streams")).await.unwrap();
    let comments: Vec<&str> = comments.lines().collect();
    assert!(comments.len() == 2 && comments[0].contains("one") && comments[1].contains("two"), "{comments:?}");
    app.stop().await;
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[tokio::test]
async fn the_examples_in_python_run() {
    check("python", |name| words(&["python3", &format!("{name}.py")])).await;
}

#[tokio::test]
async fn the_examples_for_node_run() {
    check("javascript", |name| words(&["node", &format!("{name}.mjs")])).await;
}

#[tokio::test]
async fn the_examples_in_go_run() {
    check("go", |name| words(&["go", "run", &format!("./{name}")])).await;
}

#[tokio::test]
async fn the_examples_in_rust_run() {
    let built = target_folder().join("examples");
    check("rust", |name| words(&[built.join(name).to_str().unwrap()])).await;
}

/// Serves the page, opens it in Chromium, and ends when the console has shown a value, a message
/// and a comment. Ends with 77 if there is no Chromium.
const BROWSE: &str = r#"
    import { spawn } from "node:child_process";
    import { createInterface } from "node:readline";
    process.env.PORT = "0";
    const wanted = new Set(["value: ", "message: hello", "comment: nice"]);
    console.log = (url) => {
        const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"];
        const command = [...flags, `--user-data-dir=${process.argv[1]}`, "--remote-debugging-port=0", url];
        const browser = spawn("chromium", command, { stdio: ["ignore", "ignore", "pipe"] });
        browser.on("error", () => process.exit(77));
        browser.on("exit", () => process.exit(wanted.size));
        createInterface({ input: browser.stderr }).on("line", (line) => {
            process.stdout.write(line + "\n");
            wanted.forEach((text) => line.includes(`"${text}`) && wanted.delete(text));
            if (!wanted.size) browser.kill();
        });
    };
    await import(process.cwd() + "/serve.mjs");
"#;

#[tokio::test]
async fn the_example_for_browsers_runs() {
    let (_world, app, _) = started().await;
    let profile = log_folder().join(format!("chromium-{}", std::process::id()));
    let mut command = Command::new(program("node"));
    command.args(["--input-type=module", "-e", BROWSE, profile.to_str().unwrap()]).env("API_URL", &app.api);
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/javascript"));
    let output = off_runtime(move || command.output()).await;
    let _ = std::fs::remove_dir_all(&profile);
    match output {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => eprintln!("node is not installed: skipped"),
        Ok(output) if output.status.code() == Some(77) => eprintln!("chromium is not installed: skipped"),
        output => {
            let output = output.unwrap();
            let console = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{console}{}", String::from_utf8_lossy(&output.stderr));
            assert!(
                console.contains(r#"value: {\"visits\":2}"#) || console.contains(r#"value: {"visits":2}"#),
                "{console}"
            );
        }
    }
    app.stop().await;
}
