//! The key that passwords of backends are sealed with. It is in a catalog, as an option of a user mapping: catalogs are
//! copied to standbys, into base backups and by pg_upgrade, but not by logical decoding or dumps. Roles that may read
//! all data see the key there, but no row of `outbox.backend_passwords`.

use crate::server::datum::bytes_of;
use crate::server::encoding;
use crate::server::error;
use crate::server::error::{internal, raise};
use crate::server::random;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgSqlErrorCode, pg_extern, pg_sys};
use relay::seal::{self, NONCE_BYTES, SealKey};
use std::ffi::{CStr, CString};

const SERVER: &CStr = c"outbox_relay";
const OPTION: &CStr = c"key";
/// Shown in place of a statement that may contain a password.
const HIDDEN: &CStr = c"(hidden by outbox.set_backend_password)";

/// The key; `None` if there is none yet. It is made when the first password is set. Within a transaction.
pub(crate) fn key() -> Option<SealKey> {
    // SAFETY: look-ups within a transaction; the option's text lies in the transaction's memory.
    unsafe {
        let server = pg_sys::GetForeignServerByName(SERVER.as_ptr(), true);
        if server.is_null() {
            return None;
        }
        let exists = pg_sys::SearchSysCacheExists(
            pg_sys::SysCacheIdentifier::USERMAPPINGUSERSERVER as i32,
            pg_sys::Datum::from(pg_sys::InvalidOid),
            pg_sys::Datum::from((*server).serverid),
            pg_sys::Datum::from(0),
            pg_sys::Datum::from(0),
        );
        if !exists {
            return None;
        }
        // The mapping belongs to PUBLIC, which is not a role.
        let mapping = pg_sys::GetUserMapping(pg_sys::InvalidOid, (*server).serverid);
        let options = pgrx::PgList::<pg_sys::DefElem>::from_pg((*mapping).options);
        options
            .iter_ptr()
            .find(|option| CStr::from_ptr((**option).defname) == OPTION)
            .and_then(|option| CStr::from_ptr(pg_sys::defGetString(option)).to_str().ok())
            .and_then(seal::key_of_text)
    }
}

/// Makes the key with the catalog's own function, so that it is not in the text of a statement that could be logged.
fn make_key() -> SealKey {
    let key: SealKey = random::bytes();
    let text = CString::new(seal::key_text(&key)).unwrap_or_default();
    // SAFETY: within a transaction, as the server's owner; all nodes are of the current memory context.
    unsafe {
        let role = pgrx::PgBox::<pg_sys::RoleSpec>::alloc_node(pg_sys::NodeTag::T_RoleSpec).into_pg();
        (*role).roletype = pg_sys::RoleSpecType::ROLESPEC_PUBLIC;
        let statement =
            pgrx::PgBox::<pg_sys::CreateUserMappingStmt>::alloc_node(pg_sys::NodeTag::T_CreateUserMappingStmt)
                .into_pg();
        let value = pg_sys::makeString(pg_sys::pstrdup(text.as_ptr()));
        let option = pg_sys::makeDefElem(pg_sys::pstrdup(OPTION.as_ptr()), value.cast(), -1);
        (*statement).user = role;
        (*statement).servername = pg_sys::pstrdup(SERVER.as_ptr());
        (*statement).options = pg_sys::lappend(std::ptr::null_mut(), option.cast());
        let mapping = pg_sys::CreateUserMapping(statement);
        // The mapping depends on the extension, because a user mapping cannot be a member of one.
        let extension = pg_sys::ObjectAddress {
            classId: pg_sys::ExtensionRelationId,
            objectId: pg_sys::get_extension_oid(c"outbox_relay".as_ptr(), false),
            objectSubId: 0,
        };
        pg_sys::recordDependencyOn(&mapping, &extension, pg_sys::DependencyType::DEPENDENCY_EXTENSION);
        pg_sys::CommandCounterIncrement();
    }
    key
}

/// `outbox.hide_statement()`: the running statement may contain a password, and pg_stat_activity shows a session's
/// statement to monitors, also after its end.
#[pg_extern(sql = false)]
fn hide_statement() {
    // SAFETY: a constant text, which is copied.
    unsafe { pg_sys::pgstat_report_activity(pg_sys::BackendState::STATE_RUNNING, HIDDEN.as_ptr()) };
}

crate::sql_function!(seal_password, pg_finfo_seal_password);

/// `outbox.seal_password(backend_number, password)`, strict. `set_backend_password` calls it with the rights of the
/// key's owner.
fn seal_password(fcinfo: pg_sys::FunctionCallInfo) -> pg_sys::Datum {
    error::expect_arguments(fcinfo, 2);
    // SAFETY: an integer and a text. Neither is null, unless a user has declared the function otherwise.
    let (number, password) = unsafe {
        let arguments = (*fcinfo).args.as_slice(2);
        if arguments.iter().any(|argument| argument.isnull) {
            internal("a password and its backend must not be null");
        }
        (*fcinfo).isnull = false;
        (arguments[0].value.value() as i32, bytes_of(arguments[1].value))
    };
    if let Err(why) = encoding::has_utf8_form(password) {
        raise(ErrorReport::new(why.code(), "the password has no UTF-8 form", "").set_detail(why.detail()));
    }
    // SAFETY: the text was checked above.
    let password = unsafe { encoding::utf8(password) };
    let key = key().unwrap_or_else(make_key);
    match seal::seal(&key, random::bytes::<NONCE_BYTES>(), number, &password) {
        // A bytea has the same form as text.
        Some(sealed) => crate::server::datum::text_datum(&sealed),
        None => raise(ErrorReport::new(
            PgSqlErrorCode::ERRCODE_PROGRAM_LIMIT_EXCEEDED,
            "the password is too long",
            "",
        )),
    }
}
