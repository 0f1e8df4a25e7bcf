//! Numbers of batches. The upper bits are the epoch of the claim under which a batch was sent, so that no number is
//! given twice.

/// Each early claim has 2^40 batch numbers, more than any connection uses.
const EARLY_BITS: u32 = 40;
/// How many claims are early ones. A backend that keeps losing its connection reaches this number in some months.
pub(crate) const EARLY_EPOCHS: u64 = 1 << 22;
/// Each later claim has 2^32 batch numbers. (See [`Delivery::has_used_up_numbers`].)
const LATE_BITS: u32 = 32;
/// Numbers must fit into a bigint, which allows 2^30 further claims.
pub(crate) const LAST_NUMBER: u64 = i64::MAX as u64;

/// A guard with a higher epoch is not believed, because the numbers would soon be used up.
pub const MOST_EPOCHS: u64 = 1 << 30;

const LATE: u64 = EARLY_EPOCHS << EARLY_BITS;

/// The epoch of the claim under which a batch was numbered.
pub fn epoch_of(number: u64) -> u64 {
    match number.checked_sub(LATE) {
        None => number >> EARLY_BITS,
        Some(late) => EARLY_EPOCHS + (late >> LATE_BITS),
    }
}

/// Batches of the `epoch`th claim have numbers above this; those of later claims are higher.
pub(crate) fn floor_of(epoch: u64) -> u64 {
    match epoch.checked_sub(EARLY_EPOCHS) {
        None => epoch << EARLY_BITS,
        Some(late) => {
            let most = (LAST_NUMBER - LATE) >> LATE_BITS;
            LATE + (late.min(most) << LATE_BITS)
        }
    }
}
