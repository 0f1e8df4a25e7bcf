//! Controls a server whose library was built with the feature `faults`: where its worker dies or waits, and which
//! mutation it has.
//!
//! A file `outbox_relay.crash_at` in the data directory names a point in the worker's code. When the worker reaches it,
//! it removes the file and kills itself; with the word `hold` after the name it waits there until the file is removed.

use std::os::unix::fs::chown;
use std::path::PathBuf;

use crate::wait::{LIMIT, eventually};
use crate::{Postgres, env};
use relay::fault::{Mutation, Point};

const CRASH_AT: &str = "outbox_relay.crash_at";
/// Written by a worker that waits at a point, with the point's name; removed when it continues.
const HELD: &str = "outbox_relay.held";
const MUTATION: &str = "outbox_relay.mutation";

/// Every point, in the order in which a worker passes them, except `at_rehearsal`, which only an idle worker reaches,
/// and the points before a lock or in a commit, at which tests only hold a process.
pub const POINTS: &[&str] = &[
    "before_claim",
    "after_claim",
    "before_tick",
    "before_snapshot",
    "after_flush",
    "after_read",
    "after_write",
    "after_exec",
    "before_refused_saved",
    "before_save",
    "after_save",
];

/// No worker would ever reach another name, and a test would pass without testing anything.
#[track_caller]
fn known(point: &str) -> Point {
    point.parse().unwrap_or_else(|error| panic!("{error}"))
}

impl Postgres {
    /// The next worker that reaches this point kills itself there (SIGKILL), so the server restarts.
    #[track_caller]
    pub fn crash_at(&self, point: &str) {
        self.put(CRASH_AT, known(point).name());
    }

    /// The next worker that reaches this point waits there until [`release`](Self::release).
    #[track_caller]
    pub fn hold_at(&self, point: &str) {
        // A worker that was killed while it waited has left this.
        let _ = std::fs::remove_file(self.data_dir().join(HELD));
        self.put(CRASH_AT, &format!("{} hold", known(point).name()));
    }

    /// The next thread of a worker that reaches this point gets no more memory.
    #[track_caller]
    pub fn starve_at(&self, point: &str) {
        self.put(CRASH_AT, &format!("{} starve", known(point).name()));
    }

    /// Lets a waiting worker continue, and removes a point that none has reached.
    #[track_caller]
    pub fn release(&self) {
        let path = self.data_dir().join(CRASH_AT);
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("cannot remove {}: {error}", path.display()),
        }
    }

    /// Waits until a worker has reached the point of [`crash_at`](Self::crash_at) or [`hold_at`](Self::hold_at).
    #[track_caller]
    pub fn wait_reached(&self) {
        let (crash, held) = (self.data_dir().join(CRASH_AT), self.data_dir().join(HELD));
        let point = std::fs::read_to_string(&crash).unwrap_or_else(|_| "(reached already)".to_string());
        eventually(&format!("a worker to come to {point}"), LIMIT, || {
            (!crash.exists() || held.exists()).then_some(())
        });
    }

    /// In a copied data directory: removes the point at which the original's worker was to die or to wait.
    pub fn forget_points(&self) {
        for name in [CRASH_AT, HELD] {
            let _ = std::fs::remove_file(self.data_dir().join(name));
        }
    }

    /// From its next start on the server has this mutation; an empty name ends that.
    #[track_caller]
    pub fn mutation(&self, name: &str) {
        let known = || {
            name.parse::<Mutation>()
                .unwrap_or_else(|error| panic!("{error}"))
                .name()
        };
        self.put(MUTATION, if name.is_empty() { "" } else { known() });
    }

    /// Writes a file of the server atomically: nobody sees it half written.
    #[track_caller]
    fn put(&self, name: &str, text: &str) {
        assert_eq!(
            self.bin(),
            env::faults_bin(),
            "its library has no crash points: start it with faults()"
        );
        let path = self.data_dir().join(name);
        let written = PathBuf::from(format!("{}.new", path.display()));
        std::fs::write(&written, text).unwrap_or_else(|error| panic!("cannot write {}: {error}", written.display()));
        if let Some(user) = env::server_user() {
            chown(&written, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("chown");
        }
        std::fs::rename(&written, &path).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }
}
