//! Micro-batching: requests that arrive while a batch is being answered wait in a queue and form
//! the next batch. A request that arrives alone is answered at once.

use tokio::{
    sync::{mpsc, oneshot},
    task::yield_now,
};

/// Creates a queue with room for `capacity` requests, and the receiver of its batches.
pub fn queue<Q, A>(capacity: usize) -> (Queue<Q, A>, Batches<Q, A>) {
    let (sender, receiver) = mpsc::channel(capacity);
    (Queue(sender), Batches(receiver))
}

/// A question that waits for its answer.
#[derive(Debug)]
pub struct Request<Q, A> {
    pub question: Q,
    answer: oneshot::Sender<A>,
}

impl<Q, A> Request<Q, A> {
    /// Answers the request. Whoever asked may have stopped waiting.
    pub fn answer(self, answer: A) {
        let _ = self.answer.send(answer);
    }

    /// Returns the question, and the sender of its answer.
    pub fn into_parts(self) -> (Q, oneshot::Sender<A>) {
        (self.question, self.answer)
    }

    /// Returns whether nobody waits for the answer any more.
    pub fn is_abandoned(&self) -> bool {
        self.answer.is_closed()
    }
}

/// Reasons why a question gets no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unanswered {
    /// The question was not accepted.
    #[error("too many requests wait")]
    Full,
    /// The task that answers has ended, perhaps after it accepted the question.
    #[error("the task that answers requests has ended")]
    Stopped,
}

/// Accepts questions. Cheap to clone.
#[derive(Debug)]
pub struct Queue<Q, A>(mpsc::Sender<Request<Q, A>>);

impl<Q, A> Clone for Queue<Q, A> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<Q, A> Queue<Q, A> {
    /// Waits for room in the queue, and then for the answer.
    pub async fn ask(&self, question: Q) -> Result<A, Unanswered> {
        let (answer, answered) = oneshot::channel();
        self.0.send(Request { question, answer }).await.map_err(|_| Unanswered::Stopped)?;
        answered.await.map_err(|_| Unanswered::Stopped)
    }

    /// Asks without waiting for room. The answer arrives in the receiver, unless the task that
    /// answers ends.
    pub fn try_ask(&self, question: Q) -> Result<oneshot::Receiver<A>, Unanswered> {
        let (answer, answered) = oneshot::channel();
        self.0.try_send(Request { question, answer }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Unanswered::Full,
            mpsc::error::TrySendError::Closed(_) => Unanswered::Stopped,
        })?;
        Ok(answered)
    }
}

/// Hands out queued requests in batches.
#[derive(Debug)]
pub struct Batches<Q, A>(mpsc::Receiver<Request<Q, A>>);

impl<Q, A> Batches<Q, A> {
    /// Waits for a request, and appends up to `limit` requests that wait together with it. Returns
    /// false when no more will come.
    pub async fn next(&mut self, batch: &mut Vec<Request<Q, A>>, limit: usize) -> bool {
        self.next_weighed(batch, limit, |_| 1).await
    }

    /// As [`Self::next`]; takes requests until their weights together reach `limit`, which the last
    /// one may exceed.
    pub async fn next_weighed(
        &mut self,
        batch: &mut Vec<Request<Q, A>>,
        limit: usize,
        weight: impl Fn(&Q) -> usize,
    ) -> bool {
        let Some(first) = self.0.recv().await else { return false };
        let mut sum = weight(&first.question);
        batch.push(first);
        // Let requests that are being read right now join.
        yield_now().await;
        while sum < limit
            && let Ok(next) = self.0.try_recv()
        {
            sum += weight(&next.question);
            batch.push(next);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_that_wait_together_share_a_batch_up_to_its_limit() {
        let (queue, mut batches) = queue::<u32, u32>(8);
        let answers: Vec<_> = (0..5).map(|question| queue.try_ask(question).unwrap()).collect();
        let mut sizes = Vec::new();
        drop(queue);
        let mut batch = Vec::new();
        while batches.next(&mut batch, 2).await {
            sizes.push(batch.len());
            for request in batch.drain(..) {
                let doubled = 2 * request.question;
                request.answer(doubled);
            }
        }
        assert_eq!(sizes, [2, 2, 1]);
        for (question, answer) in (0..).zip(answers) {
            assert_eq!(answer.await, Ok(2 * question));
        }
    }

    #[tokio::test]
    async fn a_batch_ends_when_its_weight_reaches_the_limit() {
        let (queue, mut batches) = queue::<usize, ()>(8);
        let _answers: Vec<_> = [3, 3, 3, 9].map(|question| queue.try_ask(question).unwrap()).into();
        let mut batch = Vec::new();
        assert!(batches.next_weighed(&mut batch, 5, |weight| *weight).await);
        assert_eq!(batch.len(), 2);
        batch.clear();
        assert!(batches.next_weighed(&mut batch, 5, |weight| *weight).await);
        assert_eq!(batch.len(), 2, "one that is too large for any batch is taken nevertheless");
    }

    #[tokio::test]
    async fn a_full_queue_and_one_that_nobody_serves_refuse_questions() {
        let (queue, batches) = queue::<u32, u32>(1);
        let _waiting = queue.try_ask(1).unwrap();
        assert_eq!(queue.try_ask(2).err(), Some(Unanswered::Full));
        drop(batches);
        assert_eq!(queue.try_ask(3).err(), Some(Unanswered::Stopped));
        assert_eq!(queue.ask(4).await, Err(Unanswered::Stopped));
    }
}
