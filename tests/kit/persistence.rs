//! Redis servers that save data on disk, and lose some of them: acknowledged entries are gone after the next start.

use std::fs::OpenOptions;
use std::path::PathBuf;

use crate::Redis;
use crate::redis::tell;

/// The data of a Redis server at an earlier time (an RDB file).
#[derive(Debug, Clone)]
pub struct Saved(Vec<u8>);

impl Redis {
    /// A server with an append-only file, which it flushes according to `appendfsync` (`always`, `everysec`, `no`), and
    /// which it also loads if its end is missing. It writes to that file before it replies, so SIGKILL alone loses
    /// nothing.
    #[track_caller]
    pub fn persistent(appendfsync: &str) -> Self {
        Redis::with(&[
            "--appendonly",
            "yes",
            "--appendfsync",
            appendfsync,
            "--aof-load-truncated",
            "yes",
            // One file from the start to the end: what is cut off is always the newest.
            "--auto-aof-rewrite-percentage",
            "0",
        ])
    }

    /// Cuts the last `bytes` off a stopped server's append-only file, as a crash of the machine does before they are
    /// flushed; and a little more, back to the start of a transaction that would be cut in two. Returns how many bytes
    /// that were.
    ///
    /// Redis itself (7.0) loads such a file, but keeps half of the transaction in it, and executes that half at the
    /// next start.
    #[track_caller]
    pub fn truncate_aof(&self, bytes: u64) -> u64 {
        assert!(!self.is_running(), "the server still writes its append-only file");
        let path = self.aof();
        let content = std::fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        let bytes = usize::try_from(bytes).expect("a length");
        let kept = whole_transactions(&content[..content.len().saturating_sub(bytes)]);
        let file = OpenOptions::new().write(true).open(&path).expect("it could be read");
        file.set_len(kept as u64).expect("cannot cut the append-only file");
        (content.len() - kept) as u64
    }

    /// The length of its append-only file.
    #[track_caller]
    pub fn aof_length(&self) -> u64 {
        std::fs::metadata(self.aof()).expect("it could be found").len()
    }

    /// SIGKILL, and a restart without the last `bytes` of the append-only file; it runs again when this returns.
    #[track_caller]
    pub fn crash_losing(&mut self, bytes: u64) -> u64 {
        self.kill9();
        let cut = self.truncate_aof(bytes);
        self.start_again();
        cut
    }

    /// The present data, saved now (SAVE).
    #[track_caller]
    pub fn saved(&self) -> Saved {
        tell(&mut self.conn(), &["SAVE"]);
        let path = self.dir().join("dump.rdb");
        Saved(std::fs::read(&path).unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display())))
    }

    /// SIGKILL, and a start with these data: a server without append-only file, restored from its last RDB file.
    #[track_caller]
    pub fn crash_back_to(&mut self, saved: &Saved) {
        self.kill9();
        std::fs::write(self.dir().join("dump.rdb"), &saved.0).expect("cannot write dump.rdb");
        self.start_again();
    }

    /// SIGKILL, and an empty disk; it runs again when this returns.
    #[track_caller]
    pub fn crash_losing_everything(&mut self) {
        self.kill9();
        for name in ["dump.rdb", "appendonlydir", "appendonly.aof"] {
            let path = self.dir().join(name);
            // A missing directory need not be removed.
            let _ = std::fs::remove_file(&path);
            let _ = std::fs::remove_dir_all(&path);
        }
        self.start_again();
    }

    /// The newest of its append-only files; before 7.0 there is one.
    #[track_caller]
    fn aof(&self) -> PathBuf {
        let single = self.dir().join("appendonly.aof");
        if single.is_file() {
            return single;
        }
        let dir = self.dir().join("appendonlydir");
        let files = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("no append-only file here: {error}"));
        // appendonly.aof.3.incr.aof
        let number = |path: &PathBuf| -> Option<u64> {
            let name = path.file_name()?.to_str()?.strip_suffix(".incr.aof")?;
            name.rsplit('.').next()?.parse().ok()
        };
        files
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| number(path).is_some())
            .max_by_key(number)
            .unwrap_or_else(|| panic!("no append-only file in {}", dir.display()))
    }
}

/// Where the last complete command outside a transaction ends.
fn whole_transactions(content: &[u8]) -> usize {
    let (mut end, mut rest, mut in_transaction) = (0, content, false);
    while let Some((command, behind)) = command(rest) {
        rest = behind;
        in_transaction = command != b"EXEC" && (in_transaction || command == b"MULTI");
        if !in_transaction {
            end = content.len() - rest.len();
        }
    }
    end
}

/// The name of the first command, and the bytes after it; `None` if it is not complete.
fn command(content: &[u8]) -> Option<(&[u8], &[u8])> {
    let (words, mut rest) = number(content, b'*')?;
    let mut name = None;
    for _ in 0..words {
        let (length, text) = number(rest, b'$')?;
        let word = text.get(..length)?;
        rest = text.get(length + 2..)?;
        name = name.or(Some(word));
    }
    Some((name?, rest))
}

/// A line with this sign and a number, and the bytes after it.
fn number(content: &[u8], sign: u8) -> Option<(usize, &[u8])> {
    let end = content.iter().position(|byte| *byte == b'\n')?;
    let line = content[..end].strip_prefix(&[sign])?.strip_suffix(b"\r")?;
    Some((std::str::from_utf8(line).ok()?.parse().ok()?, &content[end + 1..]))
}
