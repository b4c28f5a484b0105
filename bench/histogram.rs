//! A histogram of durations, for percentiles.

/// Buckets per doubling. A percentile is at most 3 % too high.
const FINE: u64 = 32;

/// Counts of durations in microseconds, by bucket.
pub struct Histogram(Vec<u64>);

impl Default for Histogram {
    fn default() -> Self {
        Self(vec![0; 40 * FINE as usize])
    }
}

impl Histogram {
    pub fn add(&mut self, value: u64) {
        let doublings = (value / FINE).checked_ilog2().map_or(0, |log| u64::from(log) + 1);
        let bucket = if doublings == 0 { value } else { doublings * FINE + (value >> (doublings - 1)) - FINE };
        let last = self.0.len() - 1;
        self.0[(bucket as usize).min(last)] += 1;
    }

    /// Returns the upper end of the bucket that contains the quantile.
    pub fn quantile(&self, quantile: f64) -> u64 {
        let wanted = (self.0.iter().sum::<u64>() as f64 * quantile).ceil().max(1.0) as u64;
        let mut seen = 0;
        let found = self.0.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        let bucket = found.unwrap_or(0) as u64;
        let doublings = bucket / FINE;
        if doublings == 0 { bucket } else { (bucket % FINE + FINE + 1) << (doublings - 1) }
    }
}
