//! Tools of other ecosystems that the tests use: clients, checkers, and a browser.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use super::{World, app::target_folder};

const BROWSERS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// Returns a Chromium, if one is installed.
pub fn chromium() -> Option<&'static str> {
    let is_there =
        |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    BROWSERS.into_iter().find(is_there)
}

/// The tools that `dev/setup --test` installs, and a folder for the files of one test.
pub struct Tools {
    installed: PathBuf,
    folder: PathBuf,
}

impl Tools {
    pub fn new(world: &World) -> Self {
        let home = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache");
        let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
        let installed = cache.join("postrider/clients");
        assert!(installed.join("node_modules").exists(), "run dev/setup --test; it installs {}", installed.display());
        let folder = target_folder().join("test-clients").join(&world.prefix);
        fs::create_dir_all(&folder).unwrap();
        symlink(installed.join("node_modules"), folder.join("node_modules")).unwrap();
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
        for file in fs::read_dir(sources).unwrap().map(|entry| entry.unwrap().path()) {
            fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
        }
        Self { installed, folder }
    }

    pub fn write(&self, name: &str, document: &Value) {
        fs::write(self.folder.join(name), serde_json::to_vec_pretty(document).unwrap()).unwrap();
    }

    /// Runs a program of the virtual environment.
    pub fn python(&self, program: &str, words: &[&str], env: &[(&str, &str)]) -> (bool, String) {
        self.run(Command::new(self.installed.join("venv/bin").join(program)).args(words), env)
    }

    /// Runs a script of an npm package, or one of the folder.
    pub fn node(&self, script: &str, words: &[&str], env: &[(&str, &str)]) -> (bool, String) {
        self.run(Command::new(self.installed.join("node")).arg(script).args(words), env)
    }

    /// Returns whether the command succeeded, and its output.
    fn run(&self, command: &mut Command, env: &[(&str, &str)]) -> (bool, String) {
        let quiet = [("REDOCLY_TELEMETRY", "off"), ("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true")];
        let output = command.current_dir(&self.folder).envs(quiet).envs(env.iter().copied()).output().unwrap();
        let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        (output.status.success(), text)
    }

    /// Returns what Redocly's recommended rules find, warnings included.
    pub fn problems(&self, file: &str) -> Vec<Value> {
        let lint = "node_modules/@redocly/cli/bin/cli.js";
        let (_, text) = self.node(lint, &["lint", "--extends", "recommended", "--format", "json", file], &[]);
        let report = text.find('{').and_then(|at| serde_json::Deserializer::from_str(&text[at..]).into_iter().next());
        let report: Value = report.and_then(Result::ok).unwrap_or_else(|| panic!("no report: {text}"));
        report["problems"].as_array().unwrap_or_else(|| panic!("{report}")).clone()
    }

    pub fn expect((success, text): (bool, String)) -> String {
        assert!(success, "{text}");
        text
    }
}

impl Drop for Tools {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
