//! One query of Postgres, within its time, and what is wrong when there is no result.

use std::{future::Future, time::Duration};

use super::unknown::Unknown;

/// Time for one query, connection included.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why Postgres did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Postgres: {0}")]
    Database(#[from] sqlx::Error),
    #[error("Postgres did not answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// It gave a value that this version does not know.
    #[error(transparent)]
    Unknown(#[from] Unknown),
}

impl Error {
    /// Whether it is this constraint that is broken.
    pub fn breaks(&self, constraint: &str) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.constraint() == Some(constraint))
    }

    /// Whether it was not done because somebody else holds a lock (`lock_not_available`).
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55P03"))
    }

    /// Whether a table is not there (`undefined_table`).
    pub fn lacks_a_table(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01"))
    }

    /// Whether a row is refused however often it is tried: data exceptions, broken constraints, and
    /// what is too large for an index. Everything else is tried again.
    pub fn is_a_rows(&self) -> bool {
        let Self::Database(sqlx::Error::Database(error)) = self else { return false };
        matches!(error.code().as_deref().and_then(|code| code.get(..2)), Some("22" | "23" | "54"))
    }
}

/// Waits for a query's result.
pub async fn within<T>(query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Error> {
    within_at_most(PATIENCE, query).await
}

/// Waits for the result of a query that may take longer than most.
pub async fn within_at_most<T>(
    patience: Duration,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(patience, query).await.map_err(|_| Error::TimedOut(patience))?.map_err(Error::Database)
}
