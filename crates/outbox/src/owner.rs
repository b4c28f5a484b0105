//! Ownership of shards. A process owns the shards for which it holds advisory locks on one
//! connection. Postgres releases the locks when the connection ends for any reason.

use std::collections::BTreeSet;

use postrider_postgres::query::{Error, within};
use sqlx::PgConnection;

use super::SHARDS;

/// Second key of the lock that all drains share; its holders are counted.
const MEMBERSHIP: i32 = -1;

/// The shards that a process owns.
#[derive(Debug, Default)]
pub struct Owner {
    /// First key of all locks. Advisory locks are per database, and the outbox is per schema, so
    /// the key is derived from the schema.
    class: i32,
    owned: BTreeSet<i16>,
}

impl Owner {
    /// Joins the drains of this schema. No shard is owned yet.
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

    /// Acquires this process's share of the shards and releases those above it. No rows may be in
    /// flight during the call.
    pub async fn balance(&mut self, connection: &mut PgConnection) -> Result<(), Error> {
        let members = self.members(connection).await?;
        let share = usize::try_from((i64::from(SHARDS) + members - 1) / members.max(1)).unwrap_or(1);
        while self.owned.len() > share {
            let Some(shard) = self.owned.pop_last() else { break };
            let free = sqlx::query("SELECT pg_advisory_unlock($1, $2)").bind(self.class).bind(i32::from(shard));
            within(free.execute(&mut *connection)).await?;
            tracing::info!(shard, members, "outbox shard released");
        }
        // Starts at a random shard, so that two processes that start at once do not compete for the
        // same one.
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
                tracing::info!(shard, members, "outbox shard acquired");
            }
        }
        Ok(())
    }

    async fn members(&self, connection: &mut PgConnection) -> Result<i64, Error> {
        // `pg_locks` shows the keys as unsigned numbers.
        let count = sqlx::query_scalar(
            "SELECT count(DISTINCT pid) FROM pg_locks
             WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND classid = $1::bigint::oid AND objid = $2::bigint::oid
               AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
        );
        let count = count.bind(i64::from(self.class)).bind(i64::from(MEMBERSHIP.cast_unsigned()));
        within(count.fetch_one(connection)).await
    }
}
