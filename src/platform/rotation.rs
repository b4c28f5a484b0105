//! Notices that mounted files changed, such as rotated certificates and passwords, so that the
//! process can drain and be started with the new ones.

use std::{
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is read of a file at most, in bytes: secrets in clusters are no larger.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Files that are only read at start, and what to do when they change.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Files, and directories with files. When one changes, the process drains and ends with exit
    /// code 0, for its supervisor to start it again.
    pub files: Vec<String>,
    /// Time between looks at them, in milliseconds.
    pub interval_ms: u64,
    /// The process waits for a random part of this before it drains, in milliseconds, so that
    /// processes with the same files do not all restart at once.
    pub spread_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { files: Vec::new(), interval_ms: 10_000, spread_ms: 60_000 }
    }
}

/// Resolves some time after a file has changed; never where there is none to watch.
pub async fn changed(config: &Config) {
    if config.files.is_empty() {
        return std::future::pending().await;
    }
    let mut before = None;
    loop {
        match look(config.files.clone()).await {
            Ok(now) if *before.get_or_insert(now) == now => {}
            Ok(_) => break,
            // A mount is replaced in steps; what is missing in between is there at the next look.
            Err(error) => tracing::debug!(%error, "cannot read the files to watch"),
        }
        tokio::time::sleep(Duration::from_millis(config.interval_ms.max(10))).await;
    }
    let wait_ms = fastrand::u64(..=config.spread_ms);
    tracing::info!(wait.ms = wait_ms, "mounted files changed; restarting with them");
    tokio::time::sleep(Duration::from_millis(wait_ms)).await;
}

async fn look(files: Vec<String>) -> io::Result<u64> {
    let joined = tokio::task::spawn_blocking(move || {
        let mut hasher = DefaultHasher::new();
        files.iter().try_for_each(|file| add(Path::new(file), &mut hasher))?;
        Ok(hasher.finish())
    });
    joined.await.unwrap_or_else(|error| Err(io::Error::other(error)))
}

fn add(path: &Path, hasher: &mut DefaultHasher) -> io::Result<()> {
    if !path.is_dir() {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
        (path, bytes).hash(hasher);
        return Ok(());
    }
    let mut entries: Vec<PathBuf> =
        path.read_dir()?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    // A kubelet keeps the versions of a mount in directories that begin with two dots.
    entries.retain(|entry| {
        entry.is_file() && !entry.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".."))
    });
    entries.sort();
    entries.iter().try_for_each(|entry| add(entry, hasher))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn watching(path: &Path) -> Config {
        Config { files: vec![path.display().to_string()], interval_ms: 10, spread_ms: 5 }
    }

    fn fresh_directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("postrider-rotation-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// As a kubelet lays a secret out: `password` → `..data/password`, `..data` → a version.
    fn mount(root: &Path, version: &str, password: &str) {
        fs::create_dir_all(root.join(version)).unwrap();
        fs::write(root.join(version).join("password"), password).unwrap();
        symlink(version, root.join("..new")).unwrap();
        fs::rename(root.join("..new"), root.join("..data")).unwrap();
    }

    #[tokio::test]
    async fn a_secret_that_a_kubelet_swaps_is_a_change_and_the_same_content_again_is_none() {
        let root = fresh_directory("swap");
        mount(&root, "..1", "old");
        symlink("..data/password", root.join("password")).unwrap();
        let same = look(watching(&root).files).await.unwrap();
        mount(&root, "..2", "old");
        assert_eq!(look(watching(&root).files).await.unwrap(), same);

        mount(&root, "..3", "new");
        assert_ne!(look(watching(&root).files).await.unwrap(), same);
        fs::remove_dir_all(&root).unwrap();
    }

    #[tokio::test]
    async fn the_wait_ends_when_a_file_that_was_missing_at_first_changes() {
        let root = fresh_directory("missing");
        let file = root.join("ca.crt");
        let config = watching(&file);
        let waiting = tokio::spawn(async move { changed(&config).await });
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        for version in 0.. {
            if waiting.is_finished() {
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "nobody noticed");
            fs::write(&file, format!("version {version}")).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        fs::remove_dir_all(&root).unwrap();
    }
}
