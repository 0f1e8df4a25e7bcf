//! TCP ports for servers that are stopped and started again.

use std::fs::File;
use std::net::TcpListener;
use std::path::PathBuf;

use crate::env;

/// Below the range from which the kernel takes the ports of outgoing connections (32768 and up on Linux), so that
/// none of those takes a server's port while it is down.
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// A port that no other test of this run uses, recorded in a file until the value is dropped.
#[derive(Debug)]
pub struct TakenPort {
    pub number: u16,
    note: PathBuf,
}

impl TakenPort {
    pub fn any() -> Self {
        let dir = env::port_dir();
        let span = u64::from(PORTS.end - PORTS.start);
        for _ in 0..1_000 {
            let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
            let offset = u16::try_from((high ^ low) % span).expect("below the span");
            let number = PORTS.start + offset;
            let note = dir.join(number.to_string());
            if TcpListener::bind(("127.0.0.1", number)).is_ok() && File::create_new(&note).is_ok() {
                return TakenPort { number, note };
            }
        }
        panic!("found no free port in {PORTS:?}");
    }
}

impl Drop for TakenPort {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.note);
    }
}
