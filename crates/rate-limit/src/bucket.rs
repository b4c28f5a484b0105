//! Token buckets as points in time: when a bucket would be full again. A request moves its point
//! on, and is refused if the point would be further ahead than the burst.

use super::Config;

/// Costs of requests and bytes, in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    pub per_request: f64,
    pub per_byte: f64,
    pub burst: f64,
}

impl Rates {
    pub fn new(config: &Config) -> Self {
        let cost = |rate: f64| if rate > 0.0 { 1e6 / rate } else { 0.0 };
        Self {
            per_request: cost(f64::from(config.requests_per_second)),
            per_byte: cost(config.bytes_per_second as f64),
            burst: f64::from(config.burst_seconds) * 1e6,
        }
    }
}

/// State of a caller's buckets after a request, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Time until such a request is accepted; 0: this one was.
    pub wait: f64,
    /// Time until the bucket of requests is full.
    pub requests_full: f64,
    /// Time until the bucket of bytes is full.
    pub bytes_full: f64,
}

/// The buckets of one caller in this process.
#[derive(Debug, Default, Clone, Copy)]
pub struct Bucket {
    requests: f64,
    bytes: f64,
}

impl Bucket {
    /// Takes a request with this many bytes. A body may be larger than the burst: it is accepted
    /// while there is something left, and later ones wait until its debt is paid.
    pub fn take(&mut self, rates: &Rates, bytes: f64, now: f64) -> Decision {
        let (requests, owed) = (self.requests.max(now), self.bytes.max(now));
        let mut wait: f64 = 0.0;
        if rates.per_request > 0.0 {
            wait = wait.max(requests + rates.per_request - now - rates.burst);
        }
        if rates.per_byte > 0.0 && owed - now >= rates.burst {
            wait = wait.max(owed - now - rates.burst + 1.0);
        }
        let accepted = wait <= 0.0;
        self.requests = requests + if accepted { rates.per_request } else { 0.0 };
        self.bytes = owed + if accepted { rates.per_byte * bytes } else { 0.0 };
        Decision { wait: wait.max(0.0), requests_full: self.requests - now, bytes_full: self.bytes - now }
    }

    /// Takes bytes that an accepted request has sent.
    pub fn charge(&mut self, rates: &Rates, bytes: f64, now: f64) {
        self.bytes = self.bytes.max(now) + rates.per_byte * bytes;
    }

    pub fn is_full(&self, now: f64) -> bool {
        self.requests <= now && self.bytes <= now
    }
}

/// The same in Redis. Its clock counts, so that processes agree on the time.
pub const TAKE: &str = r"
    local time = redis.call('TIME')
    local now = time[1] * 1000000 + time[2]
    local state = redis.call('HMGET', KEYS[1], 'r', 'b')
    local per_request, per_byte, burst = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
    local bytes, only_charge = tonumber(ARGV[4]), ARGV[5] == '1'
    local requests = math.max(tonumber(state[1] or 0) or 0, now)
    local owed = math.max(tonumber(state[2] or 0) or 0, now)
    local wait = 0
    if not only_charge then
        if per_request > 0 then wait = math.max(wait, requests + per_request - now - burst) end
        if per_byte > 0 and owed - now >= burst then wait = math.max(wait, owed - now - burst + 1) end
    end
    if wait <= 0 then
        if not only_charge then requests = requests + per_request end
        owed = owed + per_byte * bytes
        redis.call('HSET', KEYS[1], 'r', string.format('%.3f', requests), 'b', string.format('%.3f', owed))
        redis.call('PEXPIRE', KEYS[1], math.ceil((math.max(requests, owed) - now) / 1000) + 1000)
    end
    return {math.ceil(wait), math.ceil(requests - now), math.ceil(owed - now)}
";

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(requests: u32, bytes: u64) -> Rates {
        Rates::new(&Config { requests_per_second: requests, bytes_per_second: bytes, burst_seconds: 2 })
    }

    #[test]
    fn a_burst_is_accepted_and_then_the_rate() {
        let (rates, mut bucket) = (rates(10, 0), Bucket::default());
        let accepted =
            |bucket: &mut Bucket, now| (0..100).filter(|_| bucket.take(&rates, 0.0, now).wait == 0.0).count();
        assert_eq!(accepted(&mut bucket, 1e9), 20);
        assert_eq!(bucket.take(&rates, 0.0, 1e9).wait, 100_000.0);
        assert_eq!(accepted(&mut bucket, 1e9 + 500_000.0), 5);
        assert_eq!(accepted(&mut bucket, 1e9 + 60_000_000.0), 20, "more than the burst was saved up");
    }

    #[test]
    fn a_body_larger_than_the_burst_is_accepted_once_and_paid_for() {
        let (rates, mut bucket) = (rates(0, 1_000), Bucket::default());
        assert_eq!(bucket.take(&rates, 10_000.0, 1e9).wait, 0.0);
        assert_eq!(bucket.take(&rates, 1.0, 1e9).wait, 8_000_001.0);
        assert_eq!(bucket.take(&rates, 1.0, 1e9 + 8_000_001.0).wait, 0.0);
        bucket.charge(&rates, 5_000.0, 1e9 + 8_000_001.0);
        assert!(bucket.take(&rates, 0.0, 1e9 + 9_000_000.0).wait > 0.0);
        assert!(!bucket.is_full(1e9 + 9_000_000.0) && bucket.is_full(1e9 + 60_000_000.0));
    }
}
