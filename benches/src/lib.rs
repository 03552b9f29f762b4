//! What the benchmarks share: medians of ratios, and how much memory a process holds.

pub mod docker;
pub mod nothing;
pub mod runs;

use std::error::Error;
use std::fs::File;
use std::io::Write as _;
use std::time::{Duration, Instant};

/// Answers whatever a benchmark does; a failure ends it.
pub type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

/// Appends a line again and again, each time durable before the next: what a program without any
/// journal would do.
///
/// # Errors
/// The file cannot be written.
pub fn append_raw(mut file: &File, line: &[u8], count: usize) -> Outcome<Duration> {
    let start = Instant::now();
    for _ in 0..count {
        file.write_all(line)?;
        file.sync_data()?;
    }
    Ok(start.elapsed())
}

/// Writes the median of some values and, in brackets, the least and the greatest.
pub fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let at = |place: usize| values.get(place).copied().unwrap_or(f64::NAN);
    format!("{:6.2}  [{:.2} – {:.2}]", median(values.clone()), at(0), at(values.len().saturating_sub(1)))
}

/// Returns the value in the middle; not a number if there is none.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Reads a figure of this process from the kernel, in MiB: `VmRSS:` or `VmHWM:`.
///
/// # Errors
/// The kernel does not tell.
pub fn status_mib(key: &str) -> Outcome<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)).ok_or("the kernel does not tell")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
