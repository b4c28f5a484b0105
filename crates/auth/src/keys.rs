//! The API keys that a process knows, as they are in Postgres.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwapOption;
use metrics::{counter, gauge};
use postrider_identity::{Denied, Identity, Principal};
use postrider_postgres::query::Error;
use sqlx::PgPool;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::{
    config::Config,
    key::{self, Hash},
    store::{LiveKey, Store, time_of},
};

/// Interval at which a process looks for changes.
const LOOK: Duration = Duration::from_secs(1);
/// Shortest time between two looks, however many unknown keys are tried.
const LEAST_LOOK: Duration = Duration::from_millis(100);
/// Interval at which all keys are read whatever the count says, as after a restored backup.
const READ_ALL: Duration = Duration::from_secs(60);
/// Maximum wait of a request with an unknown key for a look.
const UNKNOWN_WAIT: Duration = Duration::from_secs(2);

/// The API keys that this process knows.
pub struct Keys {
    store: Store,
    stale: Duration,
    known: ArcSwapOption<Known>,
    started: Instant,
    /// Milliseconds after the start when Postgres last answered.
    reached_ms: AtomicU64,
    wanted: Notify,
    /// Numbers of looks that have ended, and of those that succeeded.
    looks: watch::Sender<Looks>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Looks {
    ended: u64,
    succeeded: u64,
}

struct Known {
    changes: i64,
    by_id: HashMap<String, Key>,
}

#[derive(Clone)]
struct Key {
    secret_hash: Hash,
    principal: Arc<Principal>,
}

impl Keys {
    pub fn new(pool: PgPool, config: &Config) -> Self {
        Self {
            store: Store(pool),
            stale: config.keys_stale(),
            known: ArcSwapOption::empty(),
            started: Instant::now(),
            reached_ms: AtomicU64::new(0),
            wanted: Notify::new(),
            looks: watch::Sender::new(Looks::default()),
        }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Looks for changed keys, again and again.
    pub async fn follow(&self) {
        let mut read_all = Instant::now();
        loop {
            let anew = read_all.elapsed() >= READ_ALL;
            let looked = self.look(anew).await;
            match &looked {
                Ok(()) if anew => read_all = Instant::now(),
                Ok(()) => {}
                Err(error) => {
                    counter!("postrider_auth_key_reads_failed_total").increment(1);
                    tracing::debug!(%error, "API keys not read, retrying");
                }
            }
            self.looks.send_modify(|looks| {
                looks.ended += 1;
                looks.succeeded += u64::from(looked.is_ok());
            });
            tokio::time::sleep(LEAST_LOOK).await;
            let _ = tokio::time::timeout(LOOK - LEAST_LOOK, self.wanted.notified()).await;
        }
    }

    /// Reads the keys if they have changed, or `anew`.
    async fn look(&self, anew: bool) -> Result<(), Error> {
        let asked = self.started.elapsed();
        let changes = self.store.changes().await?;
        let known = self.known.load_full();
        if anew || known.as_ref().is_none_or(|known| known.changes != changes) {
            // Read after the count: they have all changes that are counted, and maybe more.
            let live = self.store.live().await?;
            self.replace(known.as_deref(), changes, live);
        }
        self.reached_ms.store(u64::try_from(asked.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        Ok(())
    }

    fn replace(&self, known: Option<&Known>, changes: i64, live: Vec<LiveKey>) {
        let mut before = known.map(|known| known.by_id.clone()).unwrap_or_default();
        let mut by_id = HashMap::with_capacity(live.len());
        for LiveKey { row, secret_hash } in live {
            let id = row.id.clone();
            let same = before.remove(&id).filter(|key| key.secret_hash == secret_hash);
            let key = same.unwrap_or_else(|| Key { secret_hash, principal: Arc::new(principal(row)) });
            by_id.insert(id, key);
        }
        gauge!("postrider_auth_keys").set(by_id.len() as f64);
        self.known.store(Some(Arc::new(Known { changes, by_id })));
        for gone in before.into_values().filter_map(|key| key.principal.identity().map(|one| one.revoked.clone())) {
            gone.cancel();
        }
    }

    /// Returns the principal of a key; `None` if the key may have been made since the last look.
    pub fn known(&self, id: &str, secret: &str) -> Option<Result<Arc<Principal>, Denied>> {
        let known = self.known.load();
        let key = known.as_ref()?.by_id.get(id)?;
        if !key::equal(&key::hash(secret), &key.secret_hash) {
            return Some(Err(Denied::UnknownKey));
        }
        if key.principal.has_ended(SystemTime::now()) {
            return Some(Err(Denied::Expired));
        }
        Some(if self.is_stale() { Err(unavailable()) } else { Ok(key.principal.clone()) })
    }

    /// Like [`Self::known`], after another look for changes.
    pub async fn verify(&self, id: &str, secret: &str) -> Result<Arc<Principal>, Denied> {
        let looked = self.look_again().await;
        match self.known(id, secret) {
            Some(found) => found,
            // The key may be newer than what this process knows.
            None if !looked => Err(unavailable()),
            None => Err(Denied::UnknownKey),
        }
    }

    /// Returns the principal of a key by its id alone, for what was made with the key.
    pub async fn of_id(&self, id: &str) -> Result<Arc<Principal>, Denied> {
        let find = || self.known.load().as_ref()?.by_id.get(id).map(|key| key.principal.clone());
        if let Some(found) = find() {
            return if self.is_stale() { Err(unavailable()) } else { Ok(found) };
        }
        // The key may be newer than the last look.
        let looked = self.look_again().await;
        find().ok_or_else(|| if looked { Denied::UnknownKey } else { unavailable() })
    }

    /// Waits until a look that begins after this call has ended. Returns whether one succeeded.
    pub async fn look_again(&self) -> bool {
        let mut looks = self.looks.subscribe();
        let before = *looks.borrow_and_update();
        // The next look may have begun before this call.
        let (ended, succeeded) = (before.ended + 2, before.succeeded + 2);
        let waiting = async {
            loop {
                self.wanted.notify_one();
                let wait = looks.wait_for(|looks| looks.ended >= ended);
                if tokio::time::timeout(LEAST_LOOK * 2, wait).await.is_ok() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(UNKNOWN_WAIT, waiting).await;
        self.looks.borrow().succeeded >= succeeded
    }

    fn is_stale(&self) -> bool {
        let reached = Duration::from_millis(self.reached_ms.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(reached) > self.stale
    }
}

fn unavailable() -> Denied {
    Denied::Unavailable("Postgres, which has the API keys, cannot be reached".to_owned())
}

/// Returns the principal of a key. Scopes that this version does not know allow nothing.
fn principal(row: super::store::KeyRow) -> Principal {
    Principal::new(Identity {
        subject: row.subject,
        tenant: row.tenant,
        scopes: row.scopes.iter().filter_map(|scope| scope.parse().ok()).collect(),
        expires_at: row.expires_ms.map(time_of),
        closes_at: row.expires_ms.map(time_of),
        key_id: Some(row.id),
        revoked: CancellationToken::new(),
    })
}
