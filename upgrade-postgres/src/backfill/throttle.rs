//! How large a batch is and how long the pause after it: pure, so that it can be held to simulations.
//!
//! Two loops, one in the other. The inner one sizes batches so that each takes the time it should.
//! The outer one chooses the share of time in which batches run: it grows while all measurements
//! are within their limits, fast at first and slowly near the share at which they last were not,
//! and shrinks by the excess as soon as one is beyond.

use std::collections::VecDeque;
use std::time::Duration;

/// The least share of time that is worked: a backfill that is throttled still ends.
const LEAST_SHARE: f64 = 0.005;
/// The share to begin with where a budget is to be held.
const FIRST_SHARE: f64 = 0.05;
/// What is added near the share that was too much.
const STEP: f64 = 0.01;
/// What one measurement of the probe beyond its limit takes away, of the share.
const TAKEN: f64 = 0.06;
/// The part of the measurements that may be beyond: of a 95th percentile, a twentieth.
const BEYOND: f64 = 0.05;
/// After so many calm observations, what was too much once may be tried again.
const FORGET: u32 = 40;

/// Chooses the share of time in which batches run.
#[derive(Debug, Clone)]
pub struct Governor {
    share: f64,
    /// The share at which a limit was last exceeded.
    ceiling: Option<f64>,
    calm: u32,
}

impl Governor {
    /// Lets batches follow each other without a pause.
    pub fn unlimited() -> Self {
        Self { share: 1.0, ceiling: None, calm: 0 }
    }

    /// Begins carefully, as there are limits to hold.
    pub fn careful() -> Self {
        Self { share: FIRST_SHARE, ceiling: None, calm: 0 }
    }

    /// Takes one observation: the largest of all measurements, each divided by its limit.
    pub fn observe(&mut self, pressure: f64) {
        if !pressure.is_finite() || pressure > 1.0 {
            let excess = if pressure.is_finite() { pressure } else { 2.0 };
            self.ceiling = Some(self.share);
            self.calm = 0;
            self.share = (self.share * (1.0 / excess).clamp(0.5, 0.9)).max(LEAST_SHARE);
            return;
        }
        self.calm += 1;
        if self.calm >= FORGET {
            self.ceiling = None;
        }
        let far = self.ceiling.is_none_or(|ceiling| self.share < 0.7 * ceiling);
        let step =
            if far { (self.share * (1.5 - pressure).clamp(0.1, 1.0)).max(STEP) } else { STEP.min(self.share * 0.1) };
        self.share = (self.share + step).min(1.0);
    }

    /// Takes one measurement of what has a 95th percentile to keep: whether it was beyond it.
    ///
    /// A measurement beyond takes away as much as nineteen within give back: the share comes to
    /// rest where one in twenty is beyond, which is the budget itself. A percentile over a window
    /// would need hundreds of measurements to tell a rise by a tenth from chance.
    pub fn sample(&mut self, beyond: bool) {
        let change = if beyond { 1.0 - TAKEN } else { 1.0 + TAKEN * BEYOND / (1.0 - BEYOND) };
        self.share = (self.share * change).clamp(LEAST_SHARE, 1.0);
    }

    /// Returns the share of time in which batches run.
    pub fn share(&self) -> f64 {
        self.share
    }

    /// Returns how long to pause after a batch that took `work`.
    pub fn pause_after(&self, work: Duration) -> Duration {
        work.mul_f64((1.0 / self.share - 1.0).max(0.0)).min(Duration::from_secs(10))
    }

    /// Returns how long the next batch should take: shorter ones where little time may be used, so
    /// that what others feel is spread.
    pub fn aim(&self, batch_time: Duration) -> Duration {
        batch_time.mul_f64(self.share.clamp(0.1, 1.0)).max(Duration::from_millis(2))
    }
}

/// Sizes batches by the time that they take.
#[derive(Debug, Clone)]
pub struct BatchSize {
    rows: f64,
    most: f64,
}

impl BatchSize {
    /// Begins with `rows`, never more than `most`.
    pub fn new(rows: u32, most: u32) -> Self {
        let most = f64::from(most.max(1));
        Self { rows: f64::from(rows).clamp(1.0, most), most }
    }

    /// Returns how many rows the next batch has.
    pub fn rows(&self) -> u32 {
        // Between one and `most`, which is a u32.
        self.rows.round() as u32
    }

    /// Learns from a batch of that many rows: at most doubled or halved at once, as one batch may
    /// have met a checkpoint.
    pub fn learn(&mut self, rows: u32, took: Duration, aim: Duration) {
        let fitting = f64::from(rows.max(1)) * aim.as_secs_f64() / took.as_secs_f64().max(1e-6);
        self.rows = fitting.clamp(self.rows / 2.0, self.rows * 2.0).clamp(1.0, self.most);
    }

    /// Makes it smaller after a batch that could not be done: it waited for a lock, or was too large.
    pub fn shrink(&mut self) {
        self.rows = (self.rows / 2.0).max(1.0);
    }
}

/// Keeps the last measurements and answers their 95th percentile.
#[derive(Debug, Clone)]
pub struct Window {
    samples: VecDeque<f64>,
    most: usize,
}

impl Window {
    /// Keeps the last `most` measurements.
    pub fn new(most: usize) -> Self {
        Self { samples: VecDeque::new(), most: most.max(1) }
    }

    /// Adds a measurement.
    pub fn push(&mut self, sample: f64) {
        if self.samples.len() == self.most {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.samples.clear();
    }

    /// Tells how many there are.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Tells whether there is none.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Returns the 95th percentile, if there is any measurement.
    pub fn p95(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.samples.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let place = (sorted.len() * 95).div_ceil(100);
        sorted.get(place.checked_sub(1)?).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server whose latency rises with the share of time that the backfill takes, with noise that
    /// repeats itself.
    struct Plant {
        base: f64,
        slope: f64,
        noise: u32,
    }

    impl Plant {
        fn p95(&mut self, share: f64) -> f64 {
            self.noise = self.noise.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            let noise = f64::from(self.noise >> 16 & 0x3ff) / 1023.0 - 0.5;
            (self.base + self.slope * share) * (1.0 + 0.04 * noise)
        }
    }

    fn settle(governor: &mut Governor, plant: &mut Plant, limit: f64, rounds: usize) -> (f64, usize) {
        let (mut shares, mut over) = (0.0, 0);
        for _ in 0..rounds {
            let p95 = plant.p95(governor.share());
            // To find the limit it must touch it; how far beyond counts.
            over += usize::from(p95 > 1.03 * limit);
            governor.observe(p95 / limit);
            shares += governor.share();
        }
        (shares / rounds as f64, over)
    }

    #[test]
    fn it_settles_near_the_share_that_the_budget_allows() {
        for (slope, best) in [(10.0, 0.2), (40.0, 0.05), (4.0, 0.5)] {
            let (mut governor, mut plant) = (Governor::careful(), Plant { base: 20.0, slope, noise: 1 });
            settle(&mut governor, &mut plant, 22.0, 100);
            let (share, over) = settle(&mut governor, &mut plant, 22.0, 200);
            assert!(share > 0.55 * best && share < 1.1 * best, "slope {slope}: {share} of {best}");
            assert!(over <= 4, "slope {slope}: far over the limit {over} times of 200");
        }
    }

    #[test]
    fn a_probe_s_percentile_comes_to_rest_at_its_limit() {
        // Exponential latencies with a mean that rises with the share: 1.0 ms, and as much again.
        let (mut governor, mut state) = (Governor::careful(), 9_u64);
        let mut latency = |share: f64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let uniform = ((state >> 33) as f64 + 1.0) / (f64::from(1_u32 << 31) + 2.0);
            (1.0 + share) * -uniform.ln()
        };
        // The percentile is three times the mean; a tenth more is allowed, so a tenth of the time.
        let limit = 1.1 * 20.0_f64.ln();
        let (mut shares, mut beyond) = (0.0, 0);
        for round in 0..22_000 {
            let over = latency(governor.share()) > limit;
            governor.sample(over);
            if round >= 2_000 {
                shares += governor.share() / 20_000.0;
                beyond += u32::from(over);
            }
        }
        assert!((0.05..0.16).contains(&shares), "{shares}");
        assert!((900..1_100).contains(&beyond), "{beyond} of 20000 beyond the limit");
    }

    #[test]
    fn it_takes_all_of_a_server_that_does_not_mind_and_gives_it_back_at_once() {
        let mut governor = Governor::careful();
        let mut rounds = 0;
        while governor.share() < 1.0 {
            governor.observe(0.3);
            rounds += 1;
        }
        assert!(rounds <= 8, "{rounds}");
        for _ in 0..6 {
            governor.observe(3.0);
        }
        assert!(governor.share() < 0.02, "{}", governor.share());
        assert!(governor.share() >= LEAST_SHARE);
        for _ in 0..100 {
            governor.observe(f64::NAN);
        }
        assert!((governor.share() - LEAST_SHARE).abs() < 1e-9, "an unknown measurement slows down, and it still ends");
    }

    #[test]
    fn it_comes_back_when_the_load_is_gone() {
        let (mut governor, mut plant) = (Governor::careful(), Plant { base: 20.0, slope: 40.0, noise: 7 });
        settle(&mut governor, &mut plant, 22.0, 100);
        plant.slope = 0.5;
        settle(&mut governor, &mut plant, 22.0, 70);
        assert!(governor.share() > 0.9, "{}", governor.share());
    }

    #[test]
    fn pauses_give_the_share() {
        let governor = Governor { share: 0.2, ceiling: None, calm: 0 };
        let work = Duration::from_millis(50);
        assert_eq!(governor.pause_after(work), Duration::from_millis(200));
        assert_eq!(governor.aim(Duration::from_millis(100)), Duration::from_millis(20));
        assert_eq!(Governor::unlimited().pause_after(work), Duration::ZERO);
    }

    #[test]
    fn batches_come_to_take_the_time_they_should() {
        let mut size = BatchSize::new(500, 100_000);
        let took = |rows: u32| Duration::from_micros(2_000 + 10 * u64::from(rows));
        for _ in 0..20 {
            let rows = size.rows();
            size.learn(rows, took(rows), Duration::from_millis(100));
        }
        assert!((9_000..=10_500).contains(&size.rows()), "{}", size.rows());
        size.learn(size.rows(), Duration::from_secs(60), Duration::from_millis(100));
        assert!(size.rows() >= 4_500, "one slow batch is not taken for all: {}", size.rows());
        for _ in 0..40 {
            size.shrink();
        }
        assert_eq!(size.rows(), 1);
    }

    #[test]
    fn a_window_forgets_the_oldest() {
        let mut window = Window::new(100);
        assert_eq!(window.p95(), None);
        (0..300).for_each(|n| window.push(f64::from(n)));
        assert_eq!((window.len(), window.p95()), (100, Some(294.0)));
    }
}
