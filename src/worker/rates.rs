//! The token buckets of backends with a pace. `pacing.rs` shares the tokens.

use relay::delivery::max_rate::Bucket;
use std::collections::BTreeMap;

/// By the backends' numbers. Most backends have none.
#[derive(Default)]
pub(super) struct Rates(pub(super) BTreeMap<i32, Bucket>);
