//! What `scripts/test` has prepared: programs, a data directory to copy, and the directory for temporary files.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nix::unistd::{User, geteuid};
use tempfile::TempDir;

/// Programs of a private Postgres installation which has the extension.
pub fn postgres_bin() -> PathBuf {
    required("OUTBOX_TEST_PGBIN")
}

/// The same with the library built with the feature `faults`, which can be made to crash and to misbehave.
pub fn faults_bin() -> PathBuf {
    required("OUTBOX_TEST_FAULTS_PGBIN")
}

/// Whether there is such a build.
pub fn has_faults() -> bool {
    std::env::var_os("OUTBOX_TEST_FAULTS_PGBIN").is_some()
}

/// A data directory fresh from initdb, that each test copies.
pub fn template() -> PathBuf {
    required("OUTBOX_TEST_TEMPLATE")
}

/// The Redis, or Valkey, that tests run against: `OUTBOX_TEST_REDIS`, else the one in PATH (see
/// `scripts/redis-versions`).
pub fn redis_server() -> PathBuf {
    std::env::var_os("OUTBOX_TEST_REDIS").map_or_else(|| "redis-server".into(), PathBuf::from)
}

/// Reports why a test, or a part of it, is skipped: also at the end of `scripts/test`, because runners show no output
/// of tests that pass.
pub fn not_run(why: &str) {
    use std::io::Write;
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    eprintln!("not run: {why}");
    let path = temp_root().join("not-run");
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    file.and_then(|mut file| file.write_all(format!("{test}: {why}\n").as_bytes()))
        .expect("cannot write what was not run");
}

/// The line that says why a program has failed. Python says on its standard output that it has no venv.
pub fn why_failed(ran: &Output) -> String {
    let (errors, output) = (
        String::from_utf8_lossy(&ran.stderr),
        String::from_utf8_lossy(&ran.stdout),
    );
    let is_said = |line: &&str| !line.trim().is_empty();
    let line = errors.lines().rfind(is_said).or_else(|| output.lines().find(is_said));
    line.unwrap_or("it does not say why").trim().to_owned()
}

/// Whether this Postgres lacks a module (it was installed without contrib); then the test is skipped, with a message.
pub fn lacks(modules: &[&str]) -> bool {
    let directory = pg_config("--pkglibdir");
    let lacking = modules
        .iter()
        .find(|module| !directory.join(format!("{module}.so")).exists());
    if let Some(module) = lacking {
        not_run(&format!("this Postgres comes without {module}"));
    }
    lacking.is_some()
}

/// The directory of extension scripts.
pub fn extension_dir() -> PathBuf {
    pg_config("--sharedir").join("extension")
}

fn pg_config(directory: &str) -> PathBuf {
    let said = Command::new(postgres_bin().join("pg_config")).arg(directory).output();
    let said = String::from_utf8(said.expect("pg_config runs").stdout).expect("a path");
    PathBuf::from(said.trim())
}

/// The programs of several majors, each with the extension: `OUTBOX_TEST_MAJORS`, separated by colons, from old to new.
pub fn majors() -> Vec<PathBuf> {
    let named = std::env::var("OUTBOX_TEST_MAJORS").unwrap_or_default();
    let bins = named.split(':').filter(|bin| !bin.is_empty());
    bins.map(PathBuf::from).collect()
}

/// The major version of the Postgres that is tested.
pub fn postgres_major() -> u32 {
    major_of(&postgres_bin())
}

/// The major version of the Postgres whose programs are there.
pub fn major_of(bin: &Path) -> u32 {
    let said = Command::new(bin.join("postgres")).arg("--version").output();
    let said = String::from_utf8(said.expect("postgres runs").stdout).expect("a version");
    let digits = |word: &str| word.split('.').next().and_then(|major| major.parse().ok());
    said.split_whitespace().find_map(digits).expect("a version")
}

fn temp_root() -> PathBuf {
    required("OUTBOX_TEST_TMP")
}

fn required(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(value) => value.into(),
        None => panic!("{name} is not set: run the tests with `make test` or scripts/test"),
    }
}

/// The user who runs Postgres, which refuses to run as root: for root `postgres`, or `nobody` if that does not exist.
/// `None`: the current user.
pub fn server_user() -> Option<User> {
    if !geteuid().is_root() {
        return None;
    }
    let found = ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| User::from_name(name).expect("cannot read the user database"));
    Some(found.expect("running as root, and there is neither a user postgres nor nobody"))
}

/// A command that runs as [`server_user`], outside the checkout, which that user may not be able to read.
pub fn server_command(program: impl AsRef<Path>) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(program.as_ref());
    command.current_dir("/");
    if let Some(user) = server_user() {
        command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    }
    command
}

/// A new directory below the temporary root that servers of [`server_user`] can write to. Its name is short: the path
/// of a Unix socket has at most 107 bytes.
pub fn server_dir(prefix: &str) -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(temp_root())
        .expect("cannot make a temporary directory");
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).expect("chmod");
    if let Some(user) = server_user() {
        chown(dir.path(), Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("chown");
    }
    dir
}

/// Writes a file with this mode, owned by [`server_user`].
pub fn server_file(path: &Path, bytes: &[u8], mode: u32) {
    std::fs::write(path, bytes).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).expect("chmod");
    if let Some(user) = server_user() {
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("chown");
    }
}

/// A file that everybody can read and this test rewrites, in a directory that is removed with its value.
pub fn shared_file(name: &str, text: &str) -> (TempDir, PathBuf) {
    let dir = server_dir("etc");
    let path = dir.path().join(name);
    std::fs::write(&path, text).expect("cannot write a file");
    (dir, path)
}

/// Whether a server can have another file at this path on this machine (see [`mounted_command`]); if not, reports that.
pub fn can_mount(path: &str) -> bool {
    let tried = r#"mount --bind "$0" "$0" && command -v setpriv"#;
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--", "sh", "-c", tried, path]);
    let can = geteuid().is_root() && unshare.output().is_ok_and(|ran| ran.status.success());
    if !can {
        not_run(&format!(
            "it takes root, and a namespace of mounts, to give a server a {path} of its own"
        ));
    }
    can
}

/// As [`server_command`], with these files mounted over others (needs root), in a separate mount namespace.
pub fn mounted_command(program: &Path, mounts: &[(PathBuf, String)]) -> Command {
    if mounts.is_empty() {
        return server_command(program);
    }
    let user = server_user().expect("it takes root to mount a file");
    let mut script = String::from("set -e\n");
    for (source, target) in mounts {
        script += &format!("mount --bind '{}' '{target}'\n", source.display());
    }
    script += &format!(
        "exec setpriv --reuid={} --regid={} --clear-groups -- \"$0\" \"$@\"",
        user.uid, user.gid
    );
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--", "sh", "-c", &script])
        .arg(program)
        .current_dir("/");
    command
}

/// Where tests that run at the same time record the TCP ports that they use.
pub(crate) fn port_dir() -> PathBuf {
    let dir = temp_root().join("ports");
    std::fs::create_dir_all(&dir).expect("cannot make the directory of taken ports");
    dir
}
