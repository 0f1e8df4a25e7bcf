//! How long events take: counts by duration, and quantiles.

/// Upper bounds of the buckets, in microseconds. A last bucket counts longer durations.
pub const BOUNDS_US: [u64; 20] = [
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    300_000_000,
    900_000_000,
    3_600_000_000,
];
pub const BUCKETS: usize = BOUNDS_US.len() + 1;

/// How many events took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Latencies {
    pub counts: [u64; BUCKETS],
    pub sum_us: u64,
}

impl Latencies {
    #[inline]
    pub fn add(&mut self, us: u64) {
        self.counts[bucket_of(us)] += 1;
        self.sum_us += us;
    }

    /// The duration, in seconds, that this share of the events did not exceed. Interpolated within a bucket; above the
    /// highest bound it is that bound. `None`: there were no events.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let all: u64 = self.counts.iter().sum();
        let rank = share * all as f64;
        let (mut below, mut lower_us) = (0, 0);
        for (count, upper_us) in self.counts.iter().zip(BOUNDS_US) {
            if *count > 0 && (below + count) as f64 >= rank {
                let part = (rank - below as f64) / *count as f64;
                return Some((lower_us as f64 + part * (upper_us - lower_us) as f64) / 1e6);
            }
            below += count;
            lower_us = upper_us;
        }
        (all > 0).then_some(lower_us as f64 / 1e6)
    }
}

/// The bucket of a duration: the first one whose bound it does not exceed.
#[inline]
fn bucket_of(us: u64) -> usize {
    BOUNDS_US.partition_point(|bound| *bound < us)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_the_bucket_below_it() {
        let mut latencies = Latencies::default();
        for us in [0, 250, 251, 3_600_000_000, 3_600_000_001] {
            latencies.add(us);
        }
        let mut expected = [0; BUCKETS];
        (expected[0], expected[1], expected[BUCKETS - 2], expected[BUCKETS - 1]) = (2, 1, 1, 1);
        assert_eq!(latencies.counts, expected);
        assert_eq!(latencies.sum_us, 7_200_000_502);
        assert!(BOUNDS_US.is_sorted());
    }

    #[test]
    fn quantiles_lie_within_the_bucket_of_their_event() {
        assert_eq!(Latencies::default().quantile(0.5), None);
        let mut latencies = Latencies::default();
        (0..99).for_each(|_| latencies.add(300));
        latencies.add(2_000_000);
        let half = latencies.quantile(0.5).expect("there are events");
        assert!((0.000_25..=0.000_5).contains(&half), "{half}");
        let slowest = latencies.quantile(0.995).expect("there are events");
        assert!((1.0..=2.5).contains(&slowest), "{slowest}");
        (0..1_000).for_each(|_| latencies.add(u64::MAX / 10_000));
        assert_eq!(latencies.quantile(0.99), Some(3_600.0));
    }
}
