//! Runs one Postgres query within a time limit, and classifies its errors.

use std::{future::Future, time::Duration};

use postrider_telemetry::unknown::Unknown;

/// Time limit of one query, including the wait for a connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// Errors of a query.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Postgres: {0}")]
    Database(#[from] sqlx::Error),
    #[error("Postgres did not answer within {} s", .0.as_secs())]
    TimedOut(Duration),
    /// The result contains a value that this version does not know.
    #[error(transparent)]
    Unknown(#[from] Unknown),
}

impl Error {
    /// Returns whether this constraint was violated.
    pub fn breaks(&self, constraint: &str) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.constraint() == Some(constraint))
    }

    /// Returns whether another session holds a lock that the query needs (`lock_not_available`).
    pub fn is_locked(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("55P03"))
    }

    /// Returns whether a table does not exist (`undefined_table`).
    pub fn lacks_a_table(&self) -> bool {
        matches!(self, Self::Database(sqlx::Error::Database(error)) if error.code().as_deref() == Some("42P01"))
    }

    /// Returns whether a row is refused however often it is retried: data exceptions, violated
    /// constraints, and values that are too large for an index. Callers retry after all other
    /// errors.
    pub fn is_a_rows(&self) -> bool {
        let Self::Database(sqlx::Error::Database(error)) = self else { return false };
        matches!(error.code().as_deref().and_then(|code| code.get(..2)), Some("22" | "23" | "54"))
    }
}

/// Waits for the result of a query.
pub async fn within<T>(query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, Error> {
    within_at_most(PATIENCE, query).await
}

/// Waits up to `patience` for the result of a query that may take longer than most.
pub async fn within_at_most<T>(
    patience: Duration,
    query: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(patience, query).await.map_err(|_| Error::TimedOut(patience))?.map_err(Error::Database)
}
