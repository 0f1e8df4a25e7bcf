//! Files on the server that a backend names: its password, its certificates and keys. They are read again for each
//! connection, and no message shows their content.

use crate::failure::{Failure, Trouble};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A longer file is none of these: a bundle of all public authorities has 200 kB.
const MAX_LENGTH: u64 = 4 << 20;

/// Reads a file that anybody may read. `what` is for messages.
pub(super) fn read(what: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    open(what, path).and_then(|(file, _)| contents(what, path, file))
}

/// Reads a file that nobody else may read, with Postgres's rules for its own key: it must belong to the server's user
/// with u=rw (0600) or less, or to root with u=rw,g=r (0640) or less.
pub(super) fn read_secret(what: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    let (file, about) = open(what, path)?;
    let user = rustix::process::geteuid().as_raw();
    let others = match about.uid() {
        owner if owner == user => 0o077,
        0 => 0o037,
        _ => {
            let message = format!(
                "{what} \"{}\" must be owned by the server's user or root",
                path.display()
            );
            return Err(Failure::configuration(message));
        }
    };
    if about.mode() & others != 0 {
        let message = format!("{what} \"{}\" has group or world access", path.display());
        return Err(Failure::of(Trouble::ExposedFile, message));
    }
    contents(what, path, file)
}

fn open(what: &str, path: &Path) -> Result<(File, Metadata), Failure> {
    // The type is checked first, because opening a pipe would wait for its writer.
    let opened = fs::metadata(path).and_then(|about| match about.is_file() {
        true => File::open(path).and_then(|file| file.metadata().map(|about| (file, about))),
        false => Err(io::Error::other("not a regular file")),
    });
    opened.map_err(|error| unreadable(what, path, &error))
}

fn contents(what: &str, path: &Path, file: File) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    file.take(MAX_LENGTH + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(what, path, &error))?;
    if bytes.len() as u64 > MAX_LENGTH {
        return Err(unreadable(what, path, &io::Error::other("too long")));
    }
    Ok(bytes)
}

fn unreadable(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::configuration(format!("could not read {what} \"{}\": {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn secret(mode: u32) -> Result<Vec<u8>, Failure> {
        let path = std::env::temp_dir().join(format!("outbox-secret-{}-{mode:o}", std::process::id()));
        fs::write(&path, "secret").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        let read = read_secret("password file", &path);
        fs::remove_file(&path).expect("remove");
        read
    }

    #[test]
    fn a_secret_that_others_may_read_is_refused() {
        for mode in [0o600, 0o400] {
            assert_eq!(secret(mode).expect("only its owner reads it"), b"secret");
        }
        for mode in [0o644, 0o640, 0o604, 0o620, 0o601, 0o610] {
            let refused = secret(mode).expect_err("others may read or write it").message;
            assert!(refused.ends_with("has group or world access"), "{mode:o}: {refused}");
        }
    }

    #[test]
    fn only_regular_files_are_opened() {
        for path in ["/dev/zero", "/tmp", "/nowhere"] {
            let refused = read("TLS key file", Path::new(path)).expect_err("no file").message;
            assert!(
                refused.starts_with(&format!("could not read TLS key file \"{path}\": ")),
                "{refused}"
            );
        }
    }
}
