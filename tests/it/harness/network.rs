//! Two networks with links between them on which packets can be dropped. Needs root and iproute2.
//!
//! A test that wants one calls itself again in a network of its own ([`within_own`]), so that nothing of it is seen by
//! the machine or stays behind.

use std::process::{Child, Command, Stdio};

/// A link's addresses: here and there.
pub struct Link {
    pub here: &'static str,
    pub there: &'static str,
    device: &'static str,
}

/// Between the product and the servers that it needs.
pub const SERVERS: Link = Link { here: "10.77.1.1", there: "10.77.1.2", device: "servers" };
/// Between the product and those who call it.
pub const CALLERS: Link = Link { here: "10.77.2.1", there: "10.77.2.2", device: "callers" };

/// Of nobody: packets to it are dropped without a word.
const NOBODY: &str = "02:00:00:00:00:99";

/// Another network, beside that of the test.
pub struct Network {
    /// A process that keeps it.
    keeper: Child,
}

/// Runs an ignored test of this binary in a network of its own. `false` where this machine does not let us.
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

    /// For a program that is to run there.
    pub fn pid(&self) -> u32 {
        self.keeper.id()
    }

    /// Drops all packets of a link, in both directions.
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
