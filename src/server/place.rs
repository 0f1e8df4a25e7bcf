//! Where this server runs, and its identifier; the database of this process.

use pgrx::{pg_extern, pg_sys};
use relay::guard::place::Place;
use std::ffi::{CStr, CString, c_int};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::UNIX_EPOCH;

// SAFETY: the declaration of common/hashfn.h; it raises no ERROR.
unsafe extern "C" {
    fn hash_bytes_extended(bytes: *const u8, count: c_int, seed: u64) -> u64;
}

/// `outbox.here()`: the timeline and the directory. A promoted standby or a copy has others.
#[pg_extern(sql = false)]
pub(crate) fn here() -> String {
    // SAFETY: reads what the server knows of itself; only called on a primary. A zero-terminated path.
    let (timeline, directory) = unsafe {
        pg_sys::PreventCommandDuringRecovery(c"outbox.here()".as_ptr());
        (pg_sys::GetWALInsertionTimeLine(), CStr::from_ptr(pg_sys::DataDir))
    };
    format!("{timeline:08X} {}", directory.to_string_lossy())
}

/// The system identifier. A base backup keeps it; pg_upgrade and pg_createsubscriber generate another one.
pub(crate) fn system() -> String {
    // SAFETY: reads what the server knows of itself.
    unsafe { pg_sys::GetSystemIdentifier() }.to_string()
}

/// Which initdb made the data directory: a digest of a random value that initdb wrote, and that every copy keeps, also
/// one to which pg_createsubscriber gave another system identifier. pg_upgrade moves the data to another initdb's
/// directory.
pub(crate) fn lineage() -> String {
    // SAFETY: the value has MOCK_AUTH_NONCE_LEN bytes in the shared copy of the control file.
    let digest = unsafe {
        hash_bytes_extended(
            pg_sys::GetMockAuthenticationNonce().cast(),
            pg_sys::MOCK_AUTH_NONCE_LEN as c_int,
            0,
        )
    };
    format!("{digest:016x}")
}

/// Where this server runs, see [`Place`].
pub(crate) fn place() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    // SAFETY: a zero-terminated path, set when the server started.
    let directory = unsafe { CStr::from_ptr(pg_sys::DataDir).to_string_lossy().into_owned() };
    let found = fs::metadata(&directory);
    let (device, inode) = found.as_ref().map(|m| (m.dev(), m.ino())).unwrap_or_default();
    let made_at = found.and_then(|m| m.created()).ok();
    let birth_us = made_at.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    // Zero: the file system does not record it.
    let birth_us = birth_us.map(|at| at.as_micros() as u64).filter(|us| *us > 0);
    let boot: String = read("/proc/sys/kernel/random/boot_id").chars().take(18).collect();
    let host = read("/proc/sys/kernel/hostname");
    Place::new(&host, &directory, device, inode, birth_us, &boot).to_string()
}

/// The name of this process's database, in whichever encoding it was given. Needs a transaction. `None`: it is being
/// dropped.
pub(crate) fn database() -> Option<CString> {
    // SAFETY: a catalog look-up within a transaction; the text is copied.
    unsafe {
        let name = pg_sys::get_database_name(pg_sys::MyDatabaseId);
        (!name.is_null()).then(|| CStr::from_ptr(name).to_owned())
    }
}
