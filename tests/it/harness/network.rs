//! Two network namespaces with links between them on which packets can be dropped. Needs root and
//! iproute2.
//!
//! A test runs itself again in its own network namespace ([`within_own`]), so that it does not
//! affect the machine and leaves nothing behind.

use std::process::{Child, Command, Stdio};

/// The addresses of a link's two ends.
pub struct Link {
    pub here: &'static str,
    pub there: &'static str,
    device: &'static str,
}

/// The link between the product and its servers.
pub const SERVERS: Link = Link { here: "10.77.1.1", there: "10.77.1.2", device: "servers" };
/// The link between the product and its clients.
pub const CALLERS: Link = Link { here: "10.77.2.1", there: "10.77.2.2", device: "callers" };

/// A hardware address that no device has: packets to it are dropped silently.
const NOBODY: &str = "02:00:00:00:00:99";

/// A second network namespace, in addition to the test's own.
pub struct Network {
    /// A process that keeps the namespace alive.
    keeper: Child,
}

/// Runs an ignored test of this binary in its own network namespace. Returns `false` if this
/// machine does not allow it.
pub fn within_own(test: &str) -> bool {
    let allowed = ["ip", "nsenter"].iter().all(|tool| try_run(&[tool, "--version"]) || try_run(&[tool, "-V"]))
        && try_run(&["unshare", "--net", "ip", "link", "add", "name", "here", "type", "veth", "peer", "name", "there"]);
    if !allowed {
        return false;
    }
    let status = Command::new("unshare")
        .args(["--net", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
        .status()
        .unwrap();
    assert!(status.success(), "{test}: {status}");
    true
}

fn try_run(words: &[&str]) -> bool {
    let command = Command::new(words[0]).args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    command.is_ok_and(|status| status.success())
}

impl Network {
    pub fn new() -> Self {
        let keeper = Command::new("unshare").args(["--net", "sleep", "infinity"]).spawn().unwrap();
        let network = Self { keeper };
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        let other = || std::fs::read_link(format!("/proc/{}/ns/net", network.keeper.id())).ok();
        while other().is_none_or(|other| other == own) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        run("ip link set lo up");
        network.run("ip link set lo up");
        for Link { here, there, device } in [SERVERS, CALLERS] {
            run(&format!("ip link add name {device} type veth peer name {device} netns {}", network.keeper.id()));
            run(&format!("ip address add {here}/24 dev {device}"));
            run(&format!("ip link set {device} up"));
            network.run(&format!("ip address add {there}/24 dev {device}"));
            network.run(&format!("ip link set {device} up"));
        }
        network
    }

    /// Returns the id of a process in the namespace, for programs that are to run there.
    pub fn pid(&self) -> u32 {
        self.keeper.id()
    }

    /// Drops all packets of a link in both directions.
    pub fn cut(&self, link: &Link) {
        let Link { here, there, device } = link;
        run(&format!("ip neighbour replace {there} lladdr {NOBODY} dev {device} nud permanent"));
        self.run(&format!("ip neighbour replace {here} lladdr {NOBODY} dev {device} nud permanent"));
    }

    pub fn mend(&self, link: &Link) {
        let Link { here, there, device } = link;
        run(&format!("ip neighbour del {there} dev {device}"));
        self.run(&format!("ip neighbour del {here} dev {device}"));
    }

    fn run(&self, words: &str) {
        run(&format!("nsenter --net=/proc/{}/ns/net {words}", self.keeper.id()));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn run(words: &str) {
    let mut words = words.split(' ');
    let output = Command::new(words.next().unwrap()).args(words.clone()).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}
