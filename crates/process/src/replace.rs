//! Replaces the process with a new one of the same program, with the same process id, arguments and
//! environment.
//!
//! For a supervisor, the process continues: there is no restart to count, and no back-off.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use super::drain::Signals;

/// Flag of a descriptor in /proc: the descriptor is closed when the program is replaced.
const CLOSE_ON_EXEC: u32 = 0o2_000_000;
/// Last of the three standard descriptors: input, output, errors.
const STANDARD_ERROR: u32 = 2;
/// Time for remaining descriptors to close. The Kafka library has some that a new program would
/// inherit until its clients have ended.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// Open descriptors that a new program would inherit, except the three standard ones.
#[derive(Debug, Clone, Default)]
pub struct Inherited(BTreeSet<u32>);

impl Inherited {
    /// Returns the descriptors that are open now; empty if there is no /proc.
    pub fn now() -> Self {
        let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        Self(numbers.filter(|&number| number > STANDARD_ERROR && is_inherited(number)).collect())
    }
}

/// Error of [`replace`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot replace the process: {left} of its file descriptors would stay open")]
    OpenDescriptors { left: usize },
    #[error("cannot replace the process: {0}")]
    Exec(#[source] io::Error),
}

fn is_inherited(number: u32) -> bool {
    // A descriptor that was closed meanwhile has no entry.
    let Ok(text) = fs::read_to_string(format!("/proc/self/fdinfo/{number}")) else { return false };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).is_some_and(|flags| flags & CLOSE_ON_EXEC == 0)
}

/// Replaces the process, unless a signal has arrived. Returns `Ok` after a signal, and an error if
/// the process cannot be replaced. `at_start` holds the descriptors that this process inherited
/// itself: any others would accumulate with each replacement.
pub fn replace(at_start: &Inherited, signals: &Signals) -> Result<(), Error> {
    let begun = Instant::now();
    loop {
        let left = Inherited::now().0.difference(&at_start.0).count();
        if signals.has_come() {
            return Ok(());
        }
        if left == 0 {
            break;
        }
        if begun.elapsed() > PATIENCE {
            return Err(Error::OpenDescriptors { left });
        }
        std::thread::sleep(PAUSE);
    }
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_else(|| OsString::from("postrider"));
    Err(Error::Exec(Command::new(program()).arg0(name).args(words).exec()))
}

/// Returns the path of this program. If its file was replaced, the link in /proc still leads to the
/// running program.
fn program() -> PathBuf {
    let link = Path::new("/proc/self/exe");
    match std::env::current_exe() {
        Ok(file) if file.exists() || !link.exists() => file,
        _ => link.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, process::Stdio};

    use super::*;

    #[test]
    fn only_descriptors_that_a_new_program_would_inherit_count() {
        let file = fs::File::open("/dev/null").unwrap();
        let ours = u32::try_from(file.as_raw_fd()).unwrap();
        assert!(!Inherited::now().0.contains(&ours), "the standard library closes its files");
        // A descriptor that is inherited, opened by a shell: `exec 9</dev/null`.
        let script = "exec 9</dev/null; grep flags /proc/self/fdinfo/9";
        let output = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).output().unwrap();
        let flags = String::from_utf8(output.stdout).unwrap();
        let flags = u32::from_str_radix(flags.trim().strip_prefix("flags:").unwrap().trim(), 8).unwrap();
        assert_eq!(flags & CLOSE_ON_EXEC, 0);
        let flags = fs::read_to_string(format!("/proc/self/fdinfo/{ours}")).unwrap();
        assert!(flags.contains("flags:") && !is_inherited(ours));
    }
}
