//! Determines the address of a request's client, through trusted proxies.
//!
//! Anybody can send `X-Forwarded-For`, but what a trusted proxy appended to it is true. So it is
//! read from its end, and the first address that is not a trusted proxy is the client's. Entries
//! before that one are the client's own claims.

use std::{
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use axum::http::{HeaderMap, HeaderName, header};
use ipnet::IpNet;

use super::config::{Config, ForwardedHeader};

static X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Address of the client, attached to each request by its connection.
#[derive(Debug, Clone, Copy)]
pub struct ClientAddress(pub IpAddr);

/// Entry of `http.trusted_proxies` that is not a network.
#[derive(Debug, thiserror::Error)]
#[error("`http.trusted_proxies`: `{0}` is neither a network such as `10.0.0.0/8` nor an address")]
pub struct NoNetwork(pub String);

/// The trusted proxies, and the header that they write. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Proxies {
    trusted: Arc<[IpNet]>,
    header: ForwardedHeader,
}

impl Proxies {
    pub fn new(config: &Config) -> Result<Self, NoNetwork> {
        let parse = |text: &String| {
            let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
            net.map_err(|_| NoNetwork(text.clone()))
        };
        let trusted = config.trusted_proxies.iter().map(parse).collect::<Result<_, _>>()?;
        Ok(Self { trusted, header: config.forwarded_header })
    }

    /// Returns the client's address of a request that came from this peer.
    pub fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        let mut client = peer.to_canonical();
        if !self.trusts(client) {
            return client;
        }
        let name = match self.header {
            ForwardedHeader::XForwardedFor => &X_FORWARDED_FOR,
            ForwardedHeader::Forwarded => &header::FORWARDED,
        };
        let lines: Vec<&str> = headers.get_all(name).iter().map(|line| line.to_str().unwrap_or("?")).collect();
        let entries = lines.iter().rev().flat_map(|line| line.rsplit(','));
        for entry in entries {
            let node = match self.header {
                ForwardedHeader::XForwardedFor => entry.trim(),
                ForwardedHeader::Forwarded => forwarded_for(entry),
            };
            // Entries before an unreadable one were not written by a trusted proxy.
            let Some(before) = address(node) else { break };
            client = before;
            if !self.trusts(client) {
                break;
            }
        }
        client
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted.iter().any(|net| net.contains(&address))
    }
}

/// Returns the `for` of one element of `Forwarded`; empty if there is none.
fn forwarded_for(element: &str) -> &str {
    let pairs = element.split(';').filter_map(|pair| pair.split_once('='));
    let node = pairs.filter(|(name, _)| name.trim().eq_ignore_ascii_case("for")).map(|(_, node)| node.trim()).next();
    node.unwrap_or_default().trim_matches('"')
}

/// Parses an address with or without a port.
fn address(node: &str) -> Option<IpAddr> {
    let bare = || node.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::from);
    let parsed = node.parse().ok().or_else(|| node.parse().ok().map(|with_port: SocketAddr| with_port.ip()));
    parsed.or_else(bare).map(|address| address.to_canonical())
}

/// Returns the network of one client: its address for IPv4, and for IPv6 the /64 that a provider
/// gives to a customer.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn proxies(header: ForwardedHeader) -> Proxies {
        let trusted_proxies = ["10.0.0.0/8", "fd00::/8", "192.0.2.7"].map(str::to_owned).into();
        Proxies::new(&Config { trusted_proxies, forwarded_header: header, ..Config::default() }).unwrap()
    }

    fn client(header: ForwardedHeader, peer: &str, lines: &[(&'static str, &str)]) -> String {
        let lines = lines.iter().map(|(name, line)| (HeaderName::from_static(name), line.parse().unwrap()));
        let mut headers = HeaderMap::new();
        lines.for_each(|(name, line)| {
            headers.append(name, line);
        });
        proxies(header).client(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn the_rightmost_address_that_is_no_trusted_proxy_is_the_client() {
        let name = "x-forwarded-for";
        for (peer, lines, wanted) in [
            ("198.51.100.1", &["203.0.113.9"][..], "198.51.100.1"),
            ("10.1.1.1", &[], "10.1.1.1"),
            ("10.1.1.1", &["203.0.113.9"], "203.0.113.9"),
            ("::ffff:10.1.1.1", &["203.0.113.9"], "203.0.113.9"),
            // The client's own entries come before those that the proxy appended.
            ("10.1.1.1", &["1.2.3.4, 203.0.113.9"], "203.0.113.9"),
            ("10.1.1.1", &["1.2.3.4", "203.0.113.9, 192.0.2.7", "10.2.2.2"], "203.0.113.9"),
            ("10.1.1.1", &["1.2.3.4, nonsense"], "10.1.1.1"),
            ("10.1.1.1", &["1.2.3.4, , 10.9.9.9"], "10.9.9.9"),
            ("10.1.1.1", &["10.3.3.3, 10.2.2.2"], "10.3.3.3"),
            ("fd00::1", &["[2001:db8::5]:4711"], "2001:db8::5"),
            ("10.1.1.1", &["203.0.113.9:80"], "203.0.113.9"),
            ("10.1.1.1", &["\u{e9}"], "10.1.1.1"),
        ] {
            let lines: Vec<_> = lines.iter().map(|line| (name, *line)).collect();
            assert_eq!(client(ForwardedHeader::XForwardedFor, peer, &lines), wanted, "{peer} {lines:?}");
        }
    }

    #[test]
    fn only_the_header_that_proxies_write_is_read() {
        let both = [("x-forwarded-for", "1.2.3.4"), ("forwarded", "for=203.0.113.9")];
        assert_eq!(client(ForwardedHeader::Forwarded, "10.1.1.1", &both), "203.0.113.9");
        assert_eq!(client(ForwardedHeader::XForwardedFor, "10.1.1.1", &both), "1.2.3.4");
        for (line, wanted) in [
            (r#"for=1.2.3.4, For="[2001:db8::5]:4711";proto=https;by=10.0.0.1"#, "2001:db8::5"),
            ("for=1.2.3.4, for=unknown", "10.1.1.1"),
            ("for=1.2.3.4, proto=https", "10.1.1.1"),
            (r#"for="[2001:db8::5]""#, "2001:db8::5"),
            // A quoted separator does not hide an address: the part that is cut off is unreadable.
            (r#"for="1.2.3.4, for=x""#, "10.1.1.1"),
        ] {
            assert_eq!(client(ForwardedHeader::Forwarded, "10.1.1.1", &[("forwarded", line)]), wanted, "{line}");
        }
    }

    #[test]
    fn an_ipv6_client_is_its_64_network() {
        let text = |address: &str| network(address.parse().unwrap()).to_string();
        assert_eq!(text("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!((text("1.2.3.4"), text("::ffff:1.2.3.4")), ("1.2.3.4".to_owned(), "1.2.3.4".to_owned()));
        let config = Config { trusted_proxies: vec!["10.0.0.0/33".to_owned()], ..Config::default() };
        assert!(Proxies::new(&config).is_err());
    }

    proptest! {
        /// However much a client writes before it, the address that a trusted proxy appended is the
        /// client's.
        #[test]
        fn nothing_that_a_client_writes_changes_its_address(forged in "[ -~]{0,60}") {
            let line = format!("{forged},203.0.113.9");
            prop_assert_eq!(client(ForwardedHeader::XForwardedFor, "10.1.1.1", &[("x-forwarded-for", &line)]), "203.0.113.9");
            let line = format!("{forged},for=203.0.113.9");
            prop_assert_eq!(client(ForwardedHeader::Forwarded, "10.1.1.1", &[("forwarded", &line)]), "203.0.113.9");
        }
    }
}
