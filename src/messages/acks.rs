//! What receivers have got, gathered for a moment and then written together.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    cursor::{Cursor, Lane},
    store::Store,
};
use crate::platform::query::Error;

/// How long they are gathered.
const GATHER: Duration = Duration::from_millis(100);
/// Written by one statement.
const CHUNK: usize = 1_000;

type Places = HashMap<(Arc<str>, Lane), i64>;

/// One per process. Bounded by the receivers that are connected meanwhile.
#[derive(Default)]
pub struct Acks {
    places: Mutex<Places>,
    added: Notify,
}

impl Acks {
    /// The receiver has got everything up to here.
    pub fn add(&self, receiver: &Arc<str>, cursor: &Cursor) {
        self.merge(cursor.lanes().map(|(lane, offset)| ((receiver.clone(), lane), offset)));
        self.added.notify_one();
    }

    fn merge(&self, places: impl Iterator<Item = ((Arc<str>, Lane), i64)>) {
        let mut all = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        for (place, offset) in places {
            let known = all.entry(place).or_insert(offset);
            *known = (*known).max(offset);
        }
    }

    /// Writes what was gathered. What fails is kept for the next time.
    pub async fn write(&self, store: &Store) -> Result<(), Error> {
        let gathered = std::mem::take(&mut *self.places.lock().unwrap_or_else(PoisonError::into_inner));
        let mut places: Vec<_> = gathered.into_iter().collect();
        while !places.is_empty() {
            let chunk = places.split_off(places.len().saturating_sub(CHUNK));
            let rows: Vec<_> = chunk.iter().map(|((receiver, lane), at)| (&**receiver, *lane, *at)).collect();
            if let Err(error) = store.acknowledge(&rows).await {
                self.merge(places.into_iter().chain(chunk));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Writes again and again.
    pub async fn write_forever(&self, store: &Store) {
        loop {
            self.added.notified().await;
            tokio::time::sleep(GATHER).await;
            while let Err(error) = self.write(store).await {
                tracing::debug!(error = %error, "what was delivered is noted later");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
