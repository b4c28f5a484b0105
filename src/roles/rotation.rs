//! Tries rotated settings before a restart: loads the configuration and connects to every server
//! that the role uses.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use ::redis::RedisError;
use postrider_config::{Loaded, trial::Fault};
use postrider_http::client_address::Proxies;
use postrider_kafka as kafka;
use postrider_postgres as postgres;
use postrider_process::drain::BoxError;
use postrider_redis as redis;
use postrider_rotation::{Lease, Order, Trial, Verdict};
use postrider_telemetry as telemetry;

use super::{
    platform::{Mission, Platform},
    relay,
    settings::{Role, Settings, TopicPlan},
};

/// Loads the configuration as at start, with the sources of its values.
pub type Load = Arc<dyn Fn() -> Result<Loaded<Settings>, LoadError> + Send + Sync>;

/// Error of [`Load`]. The text is a sentence for the operator.
pub type LoadError = BoxError;

/// Interval between readiness checks.
const READINESS_PAUSE: Duration = Duration::from_millis(100);

/// Error of settings that would switch off what the process does now.
#[derive(Debug, thiserror::Error)]
#[error("`postgres.url` is empty but was set at start")]
struct PostgresUnset;

#[derive(Clone, Copy)]
pub(super) struct RoleTrial<'a> {
    pub platform: &'a Platform,
    pub mission: &'a Mission,
    pub load: &'a Load,
}

impl Trial for RoleTrial<'_> {
    async fn attempt(&self) -> Verdict {
        let settings = match self.load().await {
            Ok(settings) => settings,
            Err(error) => return Verdict::Refused(BTreeMap::from([("settings", error.to_string())])),
        };
        let (kafka, redis, postgres) =
            tokio::join!(self.try_kafka(&settings), self.try_redis(&settings), self.try_postgres(&settings));
        let mut faults = vec![("kafka", kafka.err()), ("postgres", postgres.err())];
        let redis = match redis {
            Ok(redis) => {
                faults.push(("redis", None));
                redis
            }
            Err(fault) => {
                faults.push(("redis", Some(fault)));
                None
            }
        };
        match self.combine(faults) {
            Some(verdict) => verdict,
            None => Verdict::Works(self.order(&settings, redis).await),
        }
    }

    fn is_ready(&self) -> bool {
        self.platform.health.readiness().0
    }

    async fn noticed(&self) {
        while !self.is_ready() {
            tokio::time::sleep(READINESS_PAUSE).await;
        }
        tokio::time::sleep(self.platform.settings.drain.readiness_delay()).await;
    }

    async fn give_back(&self) -> Result<bool, RedisError> {
        if matches!(self.mission, Mission::Relay(_)) {
            return Ok(false);
        }
        let settings = &self.platform.settings;
        let mut redis = redis::Redis::connect(&settings.redis).await?;
        lease(settings).give_back(&mut redis).await
    }
}

impl RoleTrial<'_> {
    async fn load(&self) -> Result<Settings, LoadError> {
        let (load, in_use) = (self.load.clone(), self.platform.settings.clone());
        let is_role = matches!(self.mission, Mission::Role);
        let loaded = tokio::task::spawn_blocking(move || {
            let settings = load()?.settings;
            if is_role {
                check(&settings, &in_use)?;
            }
            Ok(settings)
        });
        loaded.await?
    }

    async fn try_kafka(&self, settings: &Settings) -> Result<(), Fault> {
        // If the topics already fail for the current account, they say nothing about the new one.
        let topics = match (self.platform.topics_ready.get(), self.mission) {
            (false, _) => Vec::new(),
            (true, Mission::Role) => TopicPlan::specs(settings),
            (true, Mission::Relay(_)) => TopicPlan::deliveries(settings),
        };
        kafka::try_out(&settings.kafka, topics.into_iter().map(|spec| spec.name).collect()).await
    }

    async fn try_redis(&self, settings: &Settings) -> Result<Option<redis::Redis>, Fault> {
        if !self.uses_redis(settings.role) {
            return Ok(None);
        }
        redis::try_out(&settings.redis).await.map(Some)
    }

    fn uses_redis(&self, role: Role) -> bool {
        matches!(self.mission, Mission::Role) && (role.serves_api() || role.processes())
    }

    async fn try_postgres(&self, settings: &Settings) -> Result<(), Fault> {
        if matches!(self.mission, Mission::Relay(_)) || settings.postgres.url.is_empty() {
            return Ok(());
        }
        postgres::try_out(&settings.postgres, !self.platform.health.fails("postgres")).await
    }

    /// Combines the results. A server that is also unreachable with the current settings does not
    /// count against the new ones. It is not waited for if another server accepts the new settings
    /// and rejects the current ones.
    fn combine(&self, faults: Vec<(&'static str, Option<Fault>)>) -> Option<Verdict> {
        let mut refused = BTreeMap::new();
        let (mut unreachable, mut repairs_server) = (Vec::new(), false);
        for (what, fault) in faults {
            match fault {
                None => repairs_server |= self.platform.health.fails(what),
                Some(Fault::Unreachable(problem)) if self.platform.health.fails(what) => {
                    unreachable.push(format!("{what}: {problem}"));
                }
                Some(fault) => _ = refused.insert(what, fault.to_string()),
            }
        }
        match (refused.is_empty(), unreachable.is_empty()) {
            (false, _) => Some(Verdict::Refused(refused)),
            (true, false) if !repairs_server => Some(Verdict::Unreachable(unreachable.join("; "))),
            (true, _) => None,
        }
    }

    /// Returns the lease that orders restarts. A role that does not use Redis takes the lease there
    /// as well, if it can connect.
    async fn order(&self, settings: &Settings, redis: Option<redis::Redis>) -> Option<Order> {
        if matches!(self.mission, Mission::Relay(_)) {
            return None;
        }
        let redis = match redis {
            Some(redis) => redis,
            None => redis::try_out(&settings.redis).await.ok()?,
        };
        Some(Order { lease: lease(settings), redis })
    }
}

/// Returns the problem that would keep the role from starting with these settings, or from doing
/// what it does now.
fn check(settings: &Settings, in_use: &Settings) -> Result<(), BoxError> {
    telemetry::check(&settings.telemetry)?;
    Proxies::new(&settings.http)?;
    if settings.role.relays() {
        relay::check(&settings.gateway.relays)?;
    }
    if settings.postgres.url.is_empty() && !in_use.postgres.url.is_empty() {
        return Err(PostgresUnset.into());
    }
    Ok(())
}

fn lease(settings: &Settings) -> Lease {
    let length = Duration::from_millis(settings.rotation.lease_ms);
    Lease::new(&settings.redis, &settings.role.to_string(), length)
}
