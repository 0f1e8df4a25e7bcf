//! A test of a backend that is running: what `testing.rs` begins, and tells of.

use crate::server::questions::Heard;
use relay::redis::probe::Probe;

pub(super) struct BackendTest {
    pub(super) question: Heard,
    pub(super) probe: Probe,
}
