//! Transactions that never outlive their use.
//!
//! sqlx's own transaction puts its connection back into the pool while `BEGIN` is still on its way,
//! if the caller stops waiting. The next statement on that connection is then part of a transaction
//! that nobody commits, although its caller sees it succeed. Here the connection is closed unless
//! the transaction has ended.

use std::ops::{Deref, DerefMut};

use sqlx::{Executor, PgConnection, PgPool, Postgres, pool::PoolConnection};

/// A transaction. Dropping it without [`commit`](Self::commit) or [`rollback`](Self::rollback)
/// closes its connection, which ends the transaction without effect.
pub struct Transaction {
    connection: PoolConnection<Postgres>,
    has_ended: bool,
}

impl Transaction {
    pub async fn begin(pool: &PgPool) -> Result<Self, sqlx::Error> {
        let mut transaction = Self { connection: pool.acquire().await?, has_ended: false };
        transaction.connection.execute(sqlx::raw_sql("BEGIN")).await?;
        Ok(transaction)
    }

    pub async fn commit(self) -> Result<(), sqlx::Error> {
        self.end("COMMIT").await
    }

    /// Undoes the transaction and keeps the connection.
    pub async fn rollback(self) -> Result<(), sqlx::Error> {
        self.end("ROLLBACK").await
    }

    async fn end(mut self, statement: &'static str) -> Result<(), sqlx::Error> {
        self.connection.execute(sqlx::raw_sql(statement)).await?;
        self.has_ended = true;
        Ok(())
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        if !self.has_ended {
            self.connection.close_on_drop();
        }
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}
