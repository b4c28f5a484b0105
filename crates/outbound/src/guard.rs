//! Decides which addresses may be dialled. It checks the address itself, after DNS: a name proves
//! nothing, because its owner can point it at postrider's own network.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Permits public addresses only, or public addresses and those on its list, or all addresses.
#[derive(Debug, Clone)]
pub struct Guard {
    allow: Vec<IpNet>,
    open: bool,
}

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(segments: [u16; 4], length: u8) -> Ipv6Net {
    let [a, b, c, d] = segments;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0), length)
}

/// Addresses that are not hosts on the public internet: IANA's special-purpose registry for IPv4
/// (RFC 6890 and its updates), with multicast and the reserved rest. Metadata services of clouds
/// are in the link-local block.
const SPECIAL_V4: [(Ipv4Net, &str); 15] = [
    (v4(0, 0, 0, 0, 8), "an address of this network"),
    (v4(10, 0, 0, 0, 8), "a private address"),
    (v4(100, 64, 0, 0, 10), "an address of carrier-grade NAT"),
    (v4(127, 0, 0, 0, 8), "a loopback address"),
    (v4(169, 254, 0, 0, 16), "a link-local address"),
    (v4(172, 16, 0, 0, 12), "a private address"),
    (v4(192, 0, 0, 0, 24), "an address for protocol assignments"),
    (v4(192, 0, 2, 0, 24), "an address for documentation"),
    (v4(192, 88, 99, 0, 24), "an address of 6to4 relays"),
    (v4(192, 168, 0, 0, 16), "a private address"),
    (v4(198, 18, 0, 0, 15), "an address for benchmarks"),
    (v4(198, 51, 100, 0, 24), "an address for documentation"),
    (v4(203, 0, 113, 0, 24), "an address for documentation"),
    (v4(224, 0, 0, 0, 4), "a multicast address"),
    (v4(240, 0, 0, 0, 4), "a reserved address"),
];

/// The only block assigned to hosts; unique-local, link-local and multicast addresses are outside
/// of it.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0, 0], 3);

/// Special-purpose blocks within `GLOBAL_V6`.
const SPECIAL_V6: [Ipv6Net; 3] = [
    v6([0x2001, 0, 0, 0], 23),     // protocol assignments, Teredo among them
    v6([0x2001, 0xdb8, 0, 0], 32), // documentation
    v6([0x3fff, 0, 0, 0], 20),     // documentation
];

const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0, 0], 96);
const SIX_TO_FOUR: Ipv6Net = v6([0x2002, 0, 0, 0], 16);

impl Guard {
    /// Creates a guard that permits public addresses and these networks.
    pub fn new(allow: Vec<IpNet>) -> Self {
        Self { allow, open: false }
    }

    /// Creates a guard that permits all addresses, for targets that the operator has chosen.
    pub fn open() -> Self {
        Self { allow: Vec::new(), open: true }
    }

    /// Returns whether this address may be dialled.
    pub fn permits(&self, address: IpAddr) -> bool {
        self.refuses(address).is_none()
    }

    /// Returns the reason why this address may not be dialled, such as `a loopback address`.
    pub fn refuses(&self, address: IpAddr) -> Option<&'static str> {
        let listed = |address: IpAddr| self.allow.iter().any(|net| net.contains(&address));
        let embedded = match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => embedded_v4(address).map(IpAddr::V4),
        };
        if self.open || listed(address) || embedded.is_some_and(listed) { None } else { special(address) }
    }

    /// Returns whether every address may be dialled.
    pub fn is_open(&self) -> bool {
        self.open
    }
}

/// Returns whether an address is a host on the public internet. An address that embeds an IPv4
/// address is judged by the latter, because packets go there.
pub fn is_public(address: IpAddr) -> bool {
    special(address).is_none()
}

/// Returns what an address is that is not a host on the public internet.
fn special(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => special_v4(address),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Some("a loopback address"),
        IpAddr::V6(address) => match embedded_v4(address) {
            Some(address) => special_v4(address),
            None if GLOBAL_V6.contains(&address) && !SPECIAL_V6.iter().any(|net| net.contains(&address)) => None,
            None => Some("not a public address"),
        },
    }
}

fn special_v4(address: Ipv4Addr) -> Option<&'static str> {
    SPECIAL_V4.iter().find(|(net, _)| net.contains(&address)).map(|(_, kind)| *kind)
}

/// Returns the IPv4 address inside a mapped, compatible, NAT64 or 6to4 address.
fn embedded_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let octets = address.octets();
    let at = |start: usize| Ipv4Addr::new(octets[start], octets[start + 1], octets[start + 2], octets[start + 3]);
    match address.segments() {
        [0, 0, 0, 0, 0, 0 | 0xffff, _, _] => Some(at(12)),
        _ if NAT64.contains(&address) => Some(at(12)),
        _ if SIX_TO_FOUR.contains(&address) => Some(at(2)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn strict() -> Guard {
        Guard::new(Vec::new())
    }

    fn nets(list: &[&str]) -> Guard {
        Guard::new(list.iter().map(|net| net.parse().unwrap()).collect())
    }

    #[test]
    fn no_internal_address_is_dialled() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:a9fe:a9fe",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
            "100::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
            "2001:db8::1",
            "2001::1",
            "3fff::1",
            "5f00::1",
            "4000::1",
        ] {
            assert!(!strict().permits(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn public_addresses_are_dialled() {
        for address in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.167.255.255",
            "192.169.0.0",
            "223.255.255.255",
            "2606:4700:4700::1111",
            "2001:4860:4860::8888",
            "2a00:1450:4001:81b::200e",
            "::ffff:1.1.1.1",
            "64:ff9b::101:101",
            "2002:101:101::1",
        ] {
            assert!(strict().permits(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn listed_networks_are_dialled_and_their_neighbours_are_not() {
        let guard = nets(&["10.1.0.0/16", "fd00:1::/32", "127.0.0.1/32"]);
        for address in ["10.1.2.3", "::ffff:10.1.2.3", "fd00:1::7", "127.0.0.1", "64:ff9b::a01:203"] {
            assert!(guard.permits(address.parse().unwrap()), "{address}");
        }
        for address in ["10.2.0.1", "fd00:2::7", "127.0.0.2", "::1"] {
            assert!(!guard.permits(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn a_refusal_says_what_the_address_is() {
        for (address, kind) in [
            ("127.0.0.1", "a loopback address"),
            ("::1", "a loopback address"),
            ("::ffff:10.0.0.1", "a private address"),
            ("169.254.169.254", "a link-local address"),
            ("fd00::1", "not a public address"),
        ] {
            assert_eq!(strict().refuses(address.parse().unwrap()), Some(kind), "{address}");
        }
    }

    fn inside(address: Ipv4Addr) -> [Ipv6Addr; 4] {
        let bits = u128::from(u32::from(address));
        [0xffff_u128 << 32 | bits, bits, 0x0064_ff9b_u128 << 96 | bits, 0x2002_u128 << 112 | bits << 80 | 1]
            .map(Ipv6Addr::from)
    }

    fn any_v4() -> impl Strategy<Value = Ipv4Addr> {
        // Half of them from the first octets where the special blocks are.
        let octet = prop_oneof![any::<u8>(), prop::sample::select(vec![0, 10, 100, 127, 169, 172, 192, 198, 203, 255])];
        (octet, any::<[u8; 3]>()).prop_map(|(a, [b, c, d])| Ipv4Addr::new(a, b, c, d))
    }

    proptest! {
        #[test]
        fn nothing_that_the_standard_library_calls_special_is_public(address in any_v4()) {
            let special = address.is_private() || address.is_loopback() || address.is_link_local()
                || address.is_broadcast() || address.is_documentation() || address.is_multicast()
                || address.is_unspecified() || address.octets()[0] == 0;
            prop_assert!(!(special && strict().permits(address.into())));
        }

        #[test]
        fn an_embedded_address_is_judged_as_itself(address in any_v4()) {
            let alone = strict().permits(address.into());
            for wrapped in inside(address) {
                prop_assert_eq!(strict().permits(wrapped.into()), alone, "{} in {}", address, wrapped);
            }
        }

        #[test]
        fn the_list_opens_exactly_its_networks(address in any_v4(), base in any_v4(), length in 8_u8..=32) {
            let net = Ipv4Net::new(base, length).unwrap();
            let guard = Guard::new(vec![net.into()]);
            let expected = is_public(address.into()) || net.contains(&address);
            prop_assert_eq!(guard.permits(address.into()), expected);
            prop_assert!(guard.permits(net.addr().into()));
        }

        #[test]
        fn only_global_unicast_can_be_public(bits: u128) {
            let address = Ipv6Addr::from(bits);
            let global = address.segments()[0] & 0xe000 == 0x2000;
            let carries = embedded_v4(address).is_some();
            prop_assert!(!is_public(address.into()) || global || carries);
        }

        #[test]
        fn an_open_guard_permits_everything(bits: u128, address in any_v4()) {
            prop_assert!(Guard::open().permits(Ipv6Addr::from(bits).into()) && Guard::open().permits(address.into()));
        }
    }
}
