//! Fingerprints of mounted files, which change with the content.

use std::{
    fs::File,
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    path::{Path, PathBuf},
};

/// Maximum number of bytes that are read of a file; secrets in clusters are no larger.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Hash of the content of some files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(u64);

impl Fingerprint {
    /// Reads these files, and the files in these directories. Blocks.
    pub fn read(files: &[String]) -> io::Result<Self> {
        let mut hasher = DefaultHasher::new();
        files.iter().try_for_each(|file| add(Path::new(file), &mut hasher))?;
        Ok(Self(hasher.finish()))
    }

    /// Like [`Self::read`], on a thread that may block.
    pub async fn of(files: Vec<String>) -> io::Result<Self> {
        let joined = tokio::task::spawn_blocking(move || Self::read(&files));
        joined.await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

fn add(path: &Path, hasher: &mut DefaultHasher) -> io::Result<()> {
    if !path.is_dir() {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes));
        read.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        (path, bytes).hash(hasher);
        return Ok(());
    }
    let mut entries: Vec<PathBuf> =
        path.read_dir()?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
    // A kubelet keeps the versions of a mount in directories whose names begin with two dots.
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

    /// Lays a secret out as a kubelet does: `password` → `..data/password`, `..data` → a version.
    fn mount(root: &Path, version: &str, password: &str) {
        fs::create_dir_all(root.join(version)).unwrap();
        fs::write(root.join(version).join("password"), password).unwrap();
        symlink(version, root.join("..new")).unwrap();
        fs::rename(root.join("..new"), root.join("..data")).unwrap();
    }

    #[test]
    fn a_secret_that_a_kubelet_swaps_is_a_change_and_the_same_content_again_is_none() {
        let root = std::env::temp_dir().join(format!("postrider-rotation-swap-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        let read = || Fingerprint::read(&[root.display().to_string()]).unwrap();
        mount(&root, "..1", "old");
        symlink("..data/password", root.join("password")).unwrap();
        let same = read();
        mount(&root, "..2", "old");
        assert_eq!(read(), same);

        mount(&root, "..3", "new");
        assert_ne!(read(), same);
        fs::remove_dir_all(&root).unwrap();
    }
}
