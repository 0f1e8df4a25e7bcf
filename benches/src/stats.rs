//! One number for several measurements.

/// The median of some measurements.
pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below or at which a share (0 to 1) of the measurements lies.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Median of the ratios of measurements that were made in turn.
pub(crate) fn median_ratio(ours: &[f64], floor: &[f64]) -> f64 {
    median(&ours.iter().zip(floor).map(|(a, b)| a / b).collect::<Vec<_>>())
}

/// The median of their differences.
pub(crate) fn median_difference(ours: &[f64], floor: &[f64]) -> f64 {
    median(&ours.iter().zip(floor).map(|(a, b)| a - b).collect::<Vec<_>>())
}
