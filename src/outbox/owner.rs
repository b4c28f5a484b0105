//! Which shards this process owns: as many as it holds advisory locks for, on one connection. Postgres lets them
//! go when the connection ends, however that comes.

use std::collections::BTreeSet;

use sqlx::PgConnection;

use super::SHARDS;
use crate::platform::query::{Error, within};

/// The second key of the lock that all relays share, to be counted.
const MEMBERSHIP: i32 = -1;

/// The shards of one process.
#[derive(Debug, Default)]
pub struct Owner {
    /// The first key of all locks: these are of the whole database, and tables of a schema.
    class: i32,
    owned: BTreeSet<i16>,
}

impl Owner {
    /// Joins the relays of this schema. Nothing is owned yet.
    pub async fn join(connection: &mut PgConnection) -> Result<Self, Error> {
        let class: i32 = within(
            sqlx::query_scalar("SELECT hashtext(current_schema() || '.outbox') & 2147483647")
                .fetch_one(&mut *connection),
        )
        .await?;
        let join = sqlx::query("SELECT pg_advisory_lock_shared($1, $2)").bind(class).bind(MEMBERSHIP);
        within(join.execute(connection)).await?;
        Ok(Self { class, owned: BTreeSet::new() })
    }

    pub fn shards(&self) -> Vec<i16> {
        self.owned.iter().copied().collect()
    }

    /// Takes its share of the shards, and lets go what is above it. Nothing may be in flight meanwhile.
    pub async fn balance(&mut self, connection: &mut PgConnection) -> Result<(), Error> {
        let members = self.members(connection).await?;
        let share = usize::try_from((i64::from(SHARDS) + members - 1) / members.max(1)).unwrap_or(1);
        while self.owned.len() > share {
            let Some(shard) = self.owned.pop_last() else { break };
            let free = sqlx::query("SELECT pg_advisory_unlock($1, $2)").bind(self.class).bind(i32::from(shard));
            within(free.execute(&mut *connection)).await?;
            tracing::info!(shard, members, "let a shard of the outbox go");
        }
        // From a random one on, so that two that come at once don't fight for the same.
        let first = fastrand::i16(0..SHARDS);
        for shard in (0..SHARDS).map(|step| (first + step) % SHARDS) {
            if self.owned.len() >= share {
                break;
            }
            if self.owned.contains(&shard) {
                continue;
            }
            let take =
                sqlx::query_scalar("SELECT pg_try_advisory_lock($1, $2)").bind(self.class).bind(i32::from(shard));
            if within(take.fetch_one(&mut *connection)).await? {
                self.owned.insert(shard);
                tracing::info!(shard, members, "took a shard of the outbox");
            }
        }
        Ok(())
    }

    async fn members(&self, connection: &mut PgConnection) -> Result<i64, Error> {
        // Keys are shown as unsigned numbers there.
        let count = sqlx::query_scalar(
            "SELECT count(DISTINCT pid) FROM pg_locks
             WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND classid = $1::bigint::oid AND objid = $2::bigint::oid
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        );
        let count = count.bind(i64::from(self.class)).bind(i64::from(MEMBERSHIP.cast_unsigned()));
        within(count.fetch_one(connection)).await
    }
}
