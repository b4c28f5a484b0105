//! Limits the connections per client address.

use std::{collections::HashMap, net::IpAddr, sync::Arc};

use parking_lot::{Mutex, MutexGuard};
use postrider_http::{Problem, client_address};

use crate::codes;

/// Connection counts of a process.
pub struct Addresses {
    /// Maximum per address; 0 means unlimited.
    limit: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

impl Addresses {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, open: Mutex::default() })
    }

    /// Takes a permit for a client of this address.
    pub fn enter(self: &Arc<Self>, client: Option<IpAddr>) -> Result<Option<AddressPermit>, Problem> {
        let Some(client) = client.filter(|_| self.limit > 0) else { return Ok(None) };
        let network = client_address::network(client);
        let mut open = self.open();
        let count = open.entry(network).or_insert(0);
        if *count >= self.limit {
            let detail = format!("your address has {count} connections to this process, which is the limit");
            return Err(Problem::new(codes::TOO_MANY_CONNECTIONS, detail));
        }
        *count += 1;
        Ok(Some(AddressPermit { addresses: self.clone(), network }))
    }

    fn open(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.open.lock()
    }
}

/// Permit of one connection; returned when dropped.
pub struct AddressPermit {
    addresses: Arc<Addresses>,
    network: IpAddr,
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        let mut open = self.addresses.open();
        let Some(count) = open.get_mut(&self.network) else { return };
        *count -= 1;
        if *count == 0 {
            open.remove(&self.network);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permit_is_returned_when_its_connection_ends() {
        let addresses = Addresses::new(2);
        let enter = |address: &str| addresses.enter(Some(address.parse().unwrap())).map_err(|problem| problem.code);
        let (first, _second) = (enter("2001:db8::1"), enter("2001:db8::2"));
        assert_eq!(enter("2001:db8::3").err(), Some(codes::TOO_MANY_CONNECTIONS));
        let _other = enter("2001:db8:0:1::1").unwrap();
        drop(first);
        let _third = enter("2001:db8::3").unwrap();
        assert_eq!(enter("2001:db8::4").err(), Some(codes::TOO_MANY_CONNECTIONS));
        assert!(Addresses::new(0).enter(Some(IpAddr::from([1, 2, 3, 4]))).unwrap().is_none());
        drop((_second, _other, _third));
        assert!(addresses.open().is_empty());
    }
}
