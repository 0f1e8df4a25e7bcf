//! A test of a backend that is running. `testing.rs` starts it and reports its result.

use crate::server::questions::Heard;
use relay::redis::probe::Probe;

pub(super) struct BackendTest {
    pub(super) question: Heard,
    pub(super) probe: Probe,
}
