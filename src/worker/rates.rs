//! The token buckets of backends that have a pace. They are shared out in `pacing.rs`.

use relay::delivery::max_rate::Bucket;
use std::collections::BTreeMap;

/// By the backends' numbers; of most there is none.
#[derive(Default)]
pub(super) struct Rates(pub(super) BTreeMap<i32, Bucket>);
