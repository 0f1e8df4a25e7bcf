//! The settings, `outbox_relay.*`: names, defaults and units as users see them, and the reason for each default.

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting};
use pgrx::pg_sys::AsPgCStr;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode, PostgresGucEnum, pg_guard, pg_sys};
use relay::delivery::backoff::Backoff;
use relay::event::stream_name::{RESERVED, StreamName};
use relay::event::trace::{fault_of_traceparent, fault_of_tracestate};
use relay::redis::allowed_hosts::AllowedHosts;
use std::ffi::{CStr, CString, c_char, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use wildmatch::WildMatch;

pub(crate) static ENABLED: GucSetting<bool> = GucSetting::<bool>::new(true);
pub(crate) static DATABASES: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"*"));
pub(crate) static DEFAULT_BACKEND: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"default"));
/// Small enough that a batch and its replies stay in the CPU's cache.
pub(crate) static BATCH_SIZE: GucSetting<i32> = GucSetting::<i32>::new(100);
/// A safety net only: commits wake the worker.
pub(crate) static POLL_INTERVAL_MS: GucSetting<i32> = GucSetting::<i32>::new(5_000);
pub(crate) static MAX_RETRIES: GucSetting<i32> = GucSetting::<i32>::new(3);
pub(crate) static RETRY_BACKOFF: GucSetting<bool> = GucSetting::<bool>::new(true);
pub(crate) static RETRY_DELAY_MS: GucSetting<i32> = GucSetting::<i32>::new(1_000);
pub(crate) static RETRY_MAX_DELAY_MS: GucSetting<i32> = GucSetting::<i32>::new(60_000);
pub(crate) static CLEANUP_PUBLISHED: GucSetting<bool> = GucSetting::<bool>::new(true);
pub(crate) static PUBLISHED_RETENTION_MIN: GucSetting<i32> = GucSetting::<i32>::new(7 * 24 * 60);
pub(crate) static FAILED_RETENTION_MIN: GucSetting<i32> = GucSetting::<i32>::new(30 * 24 * 60);
/// At least as long as sent events can be sent again: a consumer that gets one again must still recognise it.
pub(crate) static INBOX_RETENTION_MIN: GucSetting<i32> = GucSetting::<i32>::new(7 * 24 * 60);
/// Redis allows 512 MB, but every process on the way holds an entry in memory.
pub(crate) static MAX_EVENT_SIZE_KB: GucSetting<i32> = GucSetting::<i32>::new(1_024);
/// The application's trace context, for events that are published while it is set.
pub(crate) static TRACEPARENT: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
pub(crate) static TRACESTATE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
/// Whether `outbox_relay.traceparent` is set.
static IS_TRACED: AtomicBool = AtomicBool::new(false);
/// Whether `outbox_relay.redis_stream_name` may be a template, or a name that no stream may have.
static IS_SPECIAL: AtomicBool = AtomicBool::new(false);
pub(crate) static LOG_LEVEL: GucSetting<LogLevel> = GucSetting::<LogLevel>::new(LogLevel::Info);
pub(crate) static REDIS_HOST: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"localhost"));
pub(crate) static REDIS_PORT: GucSetting<i32> = GucSetting::<i32>::new(6_379);
pub(crate) static REDIS_DB: GucSetting<i32> = GucSetting::<i32>::new(0);
pub(crate) static REDIS_USERNAME: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
pub(crate) static REDIS_PASSWORD_FILE: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
pub(crate) static REDIS_STREAM_NAME: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"events"));
pub(crate) static REDIS_MAX_LEN: GucSetting<i32> = GucSetting::<i32>::new(10_000);
pub(crate) static REDIS_CONNECT_TIMEOUT_MS: GucSetting<i32> = GucSetting::<i32>::new(5_000);
pub(crate) static REDIS_SOCKET_TIMEOUT_MS: GucSetting<i32> = GucSetting::<i32>::new(5_000);

/// Without a limit here, a role that may write `outbox.backends` decides where the server connects.
pub(crate) static ALLOWED_HOSTS: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c"*"));

pub(crate) static SEND_AFTER: GucSetting<SendAfter> = GucSetting::<SendAfter>::new(SendAfter::LocalFlush);

/// By default a copy never takes over, because it cannot tell a silent owner from a dead one.
pub(crate) static TAKE_OVER: GucSetting<TakeOver> = GucSetting::<TakeOver>::new(TakeOver::Standby);

/// Which servers take over a backend on their own when its owner is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
pub(crate) enum TakeOver {
    /// A streaming standby that was promoted.
    #[name = c"standby"]
    Standby,
    /// Every server that has the owner's history.
    #[name = c"any"]
    Any,
}

/// When a committed event may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
pub(crate) enum SendAfter {
    /// When the commit is on this server's disk.
    #[name = c"local_flush"]
    LocalFlush,
    /// When it is also on the disks of the synchronous standbys.
    #[name = c"standby_flush"]
    StandbyFlush,
}

/// The levels of Python's logging module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, PostgresGucEnum)]
pub(crate) enum LogLevel {
    #[name = c"debug"]
    Debug,
    #[name = c"info"]
    Info,
    #[name = c"warning"]
    Warning,
    #[name = c"error"]
    Error,
}

const HOUR_MS: i32 = 3_600_000;

/// Defines all settings; called once from `_PG_init`.
#[expect(clippy::too_many_lines, reason = "a table")]
pub(crate) fn define() {
    use GucContext::{Sighup, Suset, Userset};
    let plain = GucFlags::default();

    GucRegistry::define_bool_guc(
        c"outbox_relay.enabled",
        c"Enables the relay.",
        c"If off, all workers stop and events wait.",
        &ENABLED,
        Sighup,
        plain,
    );
    GucRegistry::define_string_guc(
        c"outbox_relay.databases",
        c"Databases that get a worker, where the extension exists.",
        c"A comma-separated list of names and of patterns with * and ?. Those that begin with ! exclude databases: *,!test_*.",
        &DATABASES,
        Sighup,
        plain,
    );
    GucRegistry::define_string_guc(
        c"outbox_relay.default_backend",
        c"Backend for events that name none.",
        c"",
        &DEFAULT_BACKEND,
        Userset,
        plain,
    );
    int(
        c"outbox_relay.batch_size",
        c"Maximum number of events in one batch.",
        &BATCH_SIZE,
        1,
        10_000,
        Sighup,
        plain,
    );
    int(
        c"outbox_relay.poll_interval",
        c"Maximum time between two checks for events; commits wake the worker at once.",
        &POLL_INTERVAL_MS,
        100,
        HOUR_MS,
        Sighup,
        GucFlags::UNIT_MS,
    );
    int(
        c"outbox_relay.max_retries",
        c"Total number of attempts for an event that Redis refuses.",
        &MAX_RETRIES,
        1,
        relay::delivery::refusal::MOST_ATTEMPTS,
        Sighup,
        plain,
    );
    GucRegistry::define_bool_guc(
        c"outbox_relay.retry_backoff",
        c"Doubles the wait after each attempt.",
        c"If off, each wait is retry_delay.",
        &RETRY_BACKOFF,
        Sighup,
        plain,
    );
    int(
        c"outbox_relay.retry_delay",
        c"Wait after the first failed attempt.",
        &RETRY_DELAY_MS,
        1,
        HOUR_MS,
        Sighup,
        GucFlags::UNIT_MS,
    );
    int(
        c"outbox_relay.retry_max_delay",
        c"Maximum wait between two attempts.",
        &RETRY_MAX_DELAY_MS,
        1,
        HOUR_MS,
        Sighup,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_bool_guc(
        c"outbox_relay.cleanup_published",
        c"Deletes published events after their retention.",
        c"",
        &CLEANUP_PUBLISHED,
        Sighup,
        plain,
    );
    int(
        c"outbox_relay.published_retention",
        c"How long published events are kept; -1 keeps them for ever.",
        &PUBLISHED_RETENTION_MIN,
        -1,
        i32::MAX,
        Sighup,
        GucFlags::UNIT_MIN,
    );
    int(
        c"outbox_relay.failed_retention",
        c"How long failed events are kept; -1 keeps them for ever.",
        &FAILED_RETENTION_MIN,
        -1,
        i32::MAX,
        Sighup,
        GucFlags::UNIT_MIN,
    );
    int(
        c"outbox_relay.inbox_retention",
        c"How long the inbox remembers that an event was handled; -1 for ever.",
        &INBOX_RETENTION_MIN,
        -1,
        i32::MAX,
        Sighup,
        GucFlags::UNIT_MIN,
    );
    int(
        c"outbox_relay.max_event_size",
        c"Maximum size of an event, the sum of all its texts.",
        &MAX_EVENT_SIZE_KB,
        1,
        64 * 1_024,
        Suset,
        GucFlags::UNIT_KB,
    );
    GucRegistry::define_enum_guc(
        c"outbox_relay.log_level",
        c"Minimum level of the worker's messages that are logged.",
        c"",
        &LOG_LEVEL,
        Sighup,
        plain,
    );
    GucRegistry::define_enum_guc(
        c"outbox_relay.send_after",
        c"When a committed event may be sent.",
        c"local_flush: when it is on this server's disk; standby_flush: when it is also on the disks of the synchronous standbys.",
        &SEND_AFTER,
        Sighup,
        plain,
    );
    GucRegistry::define_enum_guc(
        c"outbox_relay.take_over",
        c"Which servers take over the backends of a lost server on their own.",
        c"standby: a streaming standby that was promoted. any: every server that has the lost server's history and sees it silent for three of its poll intervals; use it where a failover starts a copy of the data (shared storage, log shipping, snapshots) and clones cannot reach Redis.",
        &TAKE_OVER,
        Sighup,
        plain,
    );
    // SAFETY: the hooks are guarded, or cannot fail.
    unsafe {
        GucRegistry::define_string_guc_with_hooks(
            c"outbox_relay.allowed_hosts",
            c"Hosts that backends may connect to: names (with * and ?), addresses, networks, paths of unix sockets.",
            c"A comma-separated list, or * for all hosts.",
            &ALLOWED_HOSTS,
            Sighup,
            plain,
            Some(check_allowed_hosts),
            None,
            None,
        );
        GucRegistry::define_string_guc_with_hooks(
            c"outbox_relay.traceparent",
            c"Trace context (W3C) of events that are published while it is set; empty: none.",
            c"Set it by SET LOCAL. It goes into the CloudEvent and into a field of the entry.",
            &TRACEPARENT,
            Userset,
            plain,
            Some(check_traceparent),
            Some(assign_traceparent),
            None,
        );
        GucRegistry::define_string_guc_with_hooks(
            c"outbox_relay.tracestate",
            c"Trace state (W3C) that goes with outbox_relay.traceparent; empty: none.",
            c"",
            &TRACESTATE,
            Userset,
            plain,
            Some(check_tracestate),
            None,
            None,
        );
        GucRegistry::define_string_guc_with_hooks(
            c"outbox_relay.redis_stream_name",
            c"Stream for backends that name none, or a template of streams, such as orders.{event_type}.",
            c"",
            &REDIS_STREAM_NAME,
            Sighup,
            plain,
            Some(check_stream_name),
            Some(assign_stream_name),
            None,
        );
    }
    for (name, about, setting) in [
        (
            c"outbox_relay.redis_host",
            c"Host for backends that name none.",
            &REDIS_HOST,
        ),
        (
            c"outbox_relay.redis_username",
            c"User for backends that name none; empty: Redis's default user.",
            &REDIS_USERNAME,
        ),
        (
            c"outbox_relay.redis_password_file",
            c"Password file for backends that have no password of their own; empty: none.",
            &REDIS_PASSWORD_FILE,
        ),
    ] {
        GucRegistry::define_string_guc(name, about, c"", setting, Sighup, plain);
    }
    int(
        c"outbox_relay.redis_port",
        c"Port for backends that name none.",
        &REDIS_PORT,
        1,
        65_535,
        Sighup,
        plain,
    );
    int(
        c"outbox_relay.redis_db",
        c"Database for backends that name none.",
        &REDIS_DB,
        0,
        65_535,
        Sighup,
        plain,
    );
    int(
        c"outbox_relay.redis_max_len",
        c"Approximate length of streams for backends that name none; 0 is unlimited.",
        &REDIS_MAX_LEN,
        0,
        i32::MAX,
        Sighup,
        plain,
    );
    for (name, about, setting) in [
        (
            c"outbox_relay.redis_connect_timeout",
            c"Maximum time to connect.",
            &REDIS_CONNECT_TIMEOUT_MS,
        ),
        (
            c"outbox_relay.redis_socket_timeout",
            c"Maximum time to wait for a write or a reply.",
            &REDIS_SOCKET_TIMEOUT_MS,
        ),
    ] {
        int(name, about, setting, 1, HOUR_MS, Sighup, GucFlags::UNIT_MS);
    }
    // SAFETY: a constant C string; the prefix has just been defined.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"outbox_relay".as_ptr()) };
}

fn int(
    name: &'static std::ffi::CStr,
    about: &'static std::ffi::CStr,
    setting: &'static GucSetting<i32>,
    min: i32,
    max: i32,
    context: GucContext,
    flags: GucFlags,
) {
    GucRegistry::define_int_guc(name, about, c"", setting, min, max, context, flags);
}

/// Refuses a list that cannot be parsed. At the server's start, a refused value would be replaced by the default, which
/// allows all hosts. So an invalid list is accepted there and allows none.
#[pg_guard]
// SAFETY: only Postgres calls this, with the new value.
unsafe extern "C-unwind" fn check_allowed_hosts(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: the value is a zero-terminated text, or null.
    let text = unsafe { (!(*value).is_null()).then(|| CStr::from_ptr(*value).to_string_lossy()) };
    let Err(fault) = text.unwrap_or_default().parse::<AllowedHosts>() else {
        return true;
    };
    // SAFETY: a plain read of the process's own variable.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        let message = "outbox_relay.allowed_hosts is invalid: the relay will not connect to any backend".to_owned();
        ErrorReport::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, "")
            .set_detail(fault)
            .report(PgLogLevel::WARNING);
        return true;
    }
    // SAFETY: a copy that lives as long as the memory context of the caller, as Postgres's own texts here do.
    unsafe { pg_sys::GUC_check_errdetail_string = fault.as_str().as_pg_cstr() };
    false
}

/// Refuses an invalid trace context. An empty text means none.
#[pg_guard]
// SAFETY: only Postgres calls this, with the new value.
unsafe extern "C-unwind" fn check_traceparent(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: the caller's promise.
    unsafe { is_without_fault(*value, fault_of_traceparent) }
}

/// The same check for `outbox_relay.tracestate`.
#[pg_guard]
// SAFETY: only Postgres calls this, with the new value.
unsafe extern "C-unwind" fn check_tracestate(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: the caller's promise.
    unsafe { is_without_fault(*value, fault_of_tracestate) }
}

/// # Safety
/// A zero-terminated text, or null.
unsafe fn is_without_fault(value: *const c_char, fault: fn(&str) -> Option<&'static str>) -> bool {
    // SAFETY: the caller's promise; the detail lives as long as the memory context of the caller.
    unsafe {
        let text = (!value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy());
        let text = text.unwrap_or_default();
        let fault = (!text.is_empty()).then(|| fault(&text)).flatten();
        if let Some(fault) = fault {
            pg_sys::GUC_check_errdetail_string = fault.as_pg_cstr();
        }
        fault.is_none()
    }
}

/// Remembers whether there is a trace context, so that publishing without one costs nothing.
// No pg_guard: nothing in it can fail.
// SAFETY: only Postgres calls this, with the new value.
unsafe extern "C-unwind" fn assign_traceparent(value: *const c_char, _extra: *mut c_void) {
    // SAFETY: a zero-terminated text, or null.
    let is_traced = unsafe { !value.is_null() && *value != 0 };
    IS_TRACED.store(is_traced, Ordering::Relaxed);
}

/// Refuses an invalid template. At the server's start, a refused value would be replaced by the default, which is
/// another stream. So an unusable template is accepted there, and the backends that rely on it are misconfigured.
#[pg_guard]
// SAFETY: only Postgres calls this, with the new value.
unsafe extern "C-unwind" fn check_stream_name(
    value: *mut *mut c_char,
    _extra: *mut *mut c_void,
    _source: pg_sys::GucSource::Type,
) -> bool {
    // SAFETY: the value is a zero-terminated text, or null.
    let text = unsafe { (!(*value).is_null()).then(|| CStr::from_ptr(*value).to_string_lossy()) };
    let Err(fault) = StreamName::parse(&text.unwrap_or_default()) else {
        return true;
    };
    // SAFETY: a plain read of the process's own variable.
    if unsafe { pg_sys::process_shared_preload_libraries_in_progress } {
        let message = format!("outbox_relay.redis_stream_name {fault}: backends without a stream_name send nothing");
        ErrorReport::new(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, message, "")
            .set_detail(fault.detail())
            .set_hint(fault.hint())
            .report(PgLogLevel::WARNING);
        return true;
    }
    // SAFETY: copies that live as long as the memory context of the caller, as Postgres's own texts here do.
    unsafe {
        pg_sys::GUC_check_errdetail_string = format!("It {fault}. {}", fault.detail()).as_str().as_pg_cstr();
        pg_sys::GUC_check_errhint_string = fault.hint().as_pg_cstr();
    }
    false
}

/// Remembers whether the setting may be a template, so that publishing without one costs nothing.
// No pg_guard: nothing in it can fail.
// SAFETY: only Postgres calls this, with the new value.
unsafe extern "C-unwind" fn assign_stream_name(value: *const c_char, _extra: *mut c_void) {
    // SAFETY: a zero-terminated text, or null.
    let text = unsafe { (!value.is_null()).then(|| CStr::from_ptr(value).to_bytes()) };
    let is_special =
        |text: &[u8]| text.iter().any(|byte| b"{}".contains(byte)) || text.starts_with(RESERVED.as_bytes());
    IS_SPECIAL.store(text.is_some_and(is_special), Ordering::Relaxed);
}

/// Whether `outbox_relay.redis_stream_name` has to be parsed.
pub(crate) fn has_special_stream_name() -> bool {
    IS_SPECIAL.load(Ordering::Relaxed)
}

/// Whether the session has a trace context.
pub(crate) fn is_traced() -> bool {
    IS_TRACED.load(Ordering::Relaxed)
}

/// The hosts that the relay may connect to.
pub(crate) fn allowed_hosts() -> AllowedHosts {
    text(&ALLOWED_HOSTS).parse().unwrap_or_default()
}

/// The value of a text setting; empty when unset or not UTF-8.
pub(crate) fn text(setting: &GucSetting<Option<CString>>) -> String {
    setting.get().and_then(|s| s.into_string().ok()).unwrap_or_default()
}

pub(crate) fn millis(setting: &GucSetting<i32>) -> Duration {
    Duration::from_millis(setting.get().max(0) as u64)
}

/// A retention in microseconds; `None` keeps everything.
pub(crate) fn retention_us(setting: &GucSetting<i32>) -> Option<i64> {
    let minutes = i64::from(setting.get());
    (minutes >= 0).then_some(minutes * 60_000_000)
}

pub(crate) fn backoff() -> Backoff {
    Backoff {
        exponential: RETRY_BACKOFF.get(),
        delay: millis(&RETRY_DELAY_MS),
        max_delay: millis(&RETRY_MAX_DELAY_MS),
    }
}

/// Whether `outbox_relay.databases` includes this database and the relay is on.
pub(crate) fn serves(database: &str) -> bool {
    ENABLED.get() && is_listed(&text(&DATABASES), database)
}

/// Whether a list of names and patterns includes a database. Items that begin with `!` exclude databases, wherever they
/// stand in the list. A list of exclusions only includes all other databases.
fn is_listed(list: &str, database: &str) -> bool {
    let entries = || list.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let fits = |pattern: &str| pattern == database || WildMatch::new(pattern).matches(database);
    let mut excluded = entries().filter_map(|entry| entry.strip_prefix('!'));
    if excluded.clone().any(|pattern| fits(pattern.trim())) {
        return false;
    }
    let mut included = entries().filter(|entry| !entry.starts_with('!')).peekable();
    match included.peek() {
        Some(_) => included.any(fits),
        None => excluded.next().is_some(),
    }
}
