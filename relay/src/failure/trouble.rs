//! Kinds of trouble. One exhaustive match ([`Trouble::judged`]) decides who is to blame for each and what helps;
//! docs/FAILURES.md is the same table for users. [`Trouble::of_reply`] classifies error replies.

/// What helps if a process of the server gets no memory.
pub const MORE_MEMORY: &str =
    "Let the server's processes have more memory: look at ulimit -v and at vm.overcommit_memory.";

/// Whether the backend, its configuration or an event has failed. This decides what happens next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Redis, or the connection to it: wait with backoff, without limit; no event fails.
    Backend,
    /// A setting must be corrected: wait as above, but longer, and show what to correct.
    Configuration,
    /// This event (or its stream) is refused because of its content; others may go on.
    Event,
    /// Another server owns the guard.
    Fenced,
    /// This database is a copy and must not send.
    Copy,
    /// Another server owned the guard, and may still run.
    Watching,
    /// A stream has no room, because consumers have not acknowledged its entries.
    Full,
}

/// What is wrong, as far as it matters for what happens next or for what helps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    // The connection to Redis.
    /// There are too few file descriptors for all connections.
    NoDescriptor,
    NoMemory,
    NotAllowed,
    Refused,
    /// The connection was closed by the other side, or by something in between.
    Closed,
    TimedOut,
    Unreachable,
    NoSuchHost,
    /// The name server does not answer.
    Unresolved,
    NoSocketFile,
    Forbidden,
    NotRedis,
    TooLongReply,
    /// A TLS handshake was refused,
    Tls,
    /// or did not finish.
    TlsBroken,
    // Login.
    /// Other users may read a file with secrets.
    ExposedFile,
    /// A role that may not set the backend's password has changed its destination.
    Withheld,
    /// Its password cannot be decrypted.
    Unreadable,
    /// Its row holds a value that the constraints of the table would have refused.
    UnusableOption,
    MaxClients,
    /// Protected mode.
    Denied,
    NoAuth,
    WrongPass,
    NoPasswordSet,
    NoSuchDb,
    // States of Redis that end.
    Loading,
    ReadOnly,
    MasterDown,
    NoReplicas,
    Misconf,
    OutOfMemory,
    Busy,
    Unkillable,
    /// Redis could not parse a command. The connection must not be used again.
    Desynchronised,
    // Sentinel.
    NoSentinel,
    SentinelRefuses,
    NoSuchMaster,
    /// The sentinels named a replica as the primary.
    IsReplica,
    // Cluster.
    /// A node refuses a command that every cluster node must know.
    NodeRefuses,
    /// More hash slots are in use than there may be lanes.
    TooManySlots,
    /// The hash slot is on another node, or is being moved to one. That node is looked up.
    SlotMoves,
    ClusterDown,
    TryAgain,
    Moved,
    Ask,
    CrossSlot,
    // What Redis does not allow.
    UnknownCommand,
    NoStreams,
    NoPermCommand,
    NoPermKey,
    WrongType,
    StreamExhausted,
    TooLarge,
    /// Any other error reply.
    UnknownReply,
    // Entries that consumers have not read (`trim = 'read'`).
    /// A stream has `max_len` entries, and a group has not acknowledged them,
    Full,
    /// or there is no group that could acknowledge them.
    NoGroup,
    /// Redis does not allow asking what groups have acknowledged, or trimming.
    TrimDenied,
    /// It does not know a command that this needs: it is older than 6.2, or a proxy.
    TrimUnknown,
    // Results of reading the guard.
    Fenced,
    /// This server is a copy, and no administrator has allowed it to send.
    Copied,
    GuardMissing,
    NoGuard,
    /// Anything else. There is no hint besides the server's text.
    Other,
}

impl Trouble {
    /// What has failed, and what an administrator can do about it, if that is known.
    #[expect(clippy::too_many_lines, reason = "a table")]
    pub(super) fn judged(self) -> (Class, Option<&'static str>) {
        use Class::{Backend, Configuration, Copy, Event, Fenced, Full};
        let (class, hint) = match self {
            Self::NoDescriptor => (
                Backend,
                "Raise max_files_per_process and the server's limit of open files (ulimit -n), then restart the server.",
            ),
            Self::NoMemory => (Backend, MORE_MEMORY),
            Self::NotAllowed => (
                Configuration,
                "Add its name, address or network to outbox_relay.allowed_hosts in postgresql.conf, or change the backend's host.",
            ),
            Self::Refused => (Backend, "Start Redis there, or correct the backend's host and port."),
            Self::Closed => (
                Backend,
                "If this continues, look in Redis's log for the reason, such as client-query-buffer-limit, client-output-buffer-limit or maxmemory-clients. A port that expects TLS closes connections too.",
            ),
            Self::TimedOut => (
                Backend,
                "Redis hangs or is overloaded, or a firewall drops packets. Check host and port. If Redis is only slow, raise socket_timeout or connect_timeout.",
            ),
            Self::Unreachable => (Backend, "Check the network and the backend's host."),
            Self::NoSuchHost => (Configuration, "Correct the backend's host, or check its DNS record."),
            Self::Unresolved => (
                Backend,
                "The name server does not answer. Check /etc/resolv.conf on the database server.",
            ),
            // Redis removes it when it stops.
            Self::NoSocketFile => (Backend, "Start Redis, or correct the backend's unix_socket."),
            Self::Forbidden => (
                Configuration,
                "Allow the operating system user of the database server to open the socket: set Redis's unixsocketperm, or the socket's group.",
            ),
            Self::NotRedis => (
                Backend,
                "The server there is not Redis. Check the backend's host, port and tls.",
            ),
            Self::TooLongReply => (
                Backend,
                "Redis does not send such replies. Check the backend's host and port.",
            ),
            Self::Tls | Self::TlsBroken => (
                if self == Self::Tls { Configuration } else { Backend },
                "Check the port, the server's certificate and the names in it, and the backend's tls_ca_file, tls_cert_file and tls_key_file.",
            ),
            Self::ExposedFile => (
                Configuration,
                "The file must have permissions u=rw (0600) or less if it is owned by the server's user, or u=rw,g=r (0640) or less if it is owned by root.",
            ),
            Self::Withheld => (
                Configuration,
                "A role that may not set its password has created the backend or changed its destination. Undo that, or set the password for this destination: with outbox.set_backend_password(), or by setting password_file to NULL and then to the file.",
            ),
            Self::Unreadable => (
                Configuration,
                "The key is an option of a user mapping for server outbox_relay, which may have been dropped. Set the password again with outbox.set_backend_password().",
            ),
            Self::UnusableOption => (
                Configuration,
                "Correct that column of outbox.backends; its COMMENT lists the allowed values. The backend's events wait until then.",
            ),
            Self::MaxClients => (
                Backend,
                "Raise Redis's maxclients, or find out with CLIENT LIST who holds its connections.",
            ),
            Self::Denied => (
                Configuration,
                "Redis is in protected mode. Give its user a password and set it with outbox.set_backend_password(), or set protected-mode to no in Redis.",
            ),
            Self::NoAuth => (
                Configuration,
                "Set a password with outbox.set_backend_password(), or password_file. outbox_relay.redis_password_file applies only to backends at redis_host and redis_port.",
            ),
            Self::WrongPass => (Configuration, "Check the backend's username and password."),
            Self::NoPasswordSet => (
                Configuration,
                "This Redis requires no password. Remove it with outbox.set_backend_password(name, null), or check host and port.",
            ),
            Self::NoSuchDb => (
                Configuration,
                "Lower the backend's db, or raise \"databases\" in redis.conf; Redis Cluster has only database 0.",
            ),
            Self::Loading => (
                Backend,
                "Redis is loading its data after a start. Events will be sent when it has finished.",
            ),
            Self::ReadOnly => (
                Backend,
                "The backend's host is a replica. Point the backend to the primary.",
            ),
            Self::MasterDown => (
                Backend,
                "The backend's host is a replica that has lost its primary. Point the backend to the primary.",
            ),
            Self::NoReplicas => (
                Backend,
                "Bring Redis's replicas back, or require fewer: lower min-replicas-to-write in Redis, or wait_replicas of the backend.",
            ),
            Self::Misconf => (
                Backend,
                "Redis cannot save to disk. See its log. BGSAVE in Redis tries again; CONFIG SET stop-writes-on-bgsave-error no lets it accept writes all the same.",
            ),
            Self::OutOfMemory => (Backend, "Raise Redis's maxmemory, or lower the streams' max_len."),
            Self::Busy => (
                Backend,
                "A script keeps Redis busy. End it with SCRIPT KILL or FUNCTION KILL. If it has written data, only SHUTDOWN NOSAVE ends it.",
            ),
            Self::Unkillable => (
                Backend,
                "A script that has written data keeps Redis busy. Only SHUTDOWN NOSAVE ends it.",
            ),
            Self::Desynchronised => (
                Backend,
                "Something between the database server and Redis changes the data.",
            ),
            Self::NoSentinel => (Backend, "Start the sentinels, or correct the backend's nodes."),
            Self::SentinelRefuses => (
                Configuration,
                "Check the backend's nodes. A sentinel that requires a password gets the backend's password.",
            ),
            Self::NoSuchMaster => (Configuration, "Check the backend's nodes and sentinel_master."),
            Self::IsReplica => (
                Backend,
                "A failover is in progress. The relay will ask the sentinels again.",
            ),
            Self::NodeRefuses => (
                Configuration,
                "The backend's nodes must belong to a cluster, and its Redis user needs +cluster|slots.",
            ),
            Self::TooManySlots => (
                Configuration,
                "Use fewer streams in this backend, or give their names a common hash tag in braces, or delete those events from outbox.events.",
            ),
            Self::SlotMoves => (
                Backend,
                "The hash slot is moving, or has moved, to another node. The relay will look up that node.",
            ),
            Self::ClusterDown => (
                Backend,
                "The cluster does not serve all of its hash slots. See redis-cli --cluster check.",
            ),
            Self::TryAgain => (Backend, "The cluster is moving that hash slot. This ends by itself."),
            Self::Moved | Self::Ask | Self::CrossSlot => (
                Configuration,
                "This Redis is a node of a cluster. Set the backend's mode to cluster, and its nodes.",
            ),
            Self::UnknownCommand => (
                Configuration,
                "exactly_once needs transactions (WATCH, MULTI, EXEC). Enable them in the server or proxy, or set delivery to at_least_once.",
            ),
            Self::NoStreams => (
                Configuration,
                "This server has no streams. Use Redis 6.2 or later, and do not rename its command XADD.",
            ),
            Self::NoPermCommand | Self::NoPermKey => (
                if self == Self::NoPermKey { Event } else { Configuration },
                "Allow the backend's Redis user XADD on its streams, and for exactly_once what docs/guarantees.md lists on keys outbox_relay:*.",
            ),
            Self::WrongType => (
                Event,
                "The stream's key holds a value of another type. Rename or delete the key, or publish to another stream.",
            ),
            Self::StreamExhausted => (
                Event,
                "The stream has an entry with the last possible id. Delete the stream, or publish to another.",
            ),
            Self::TooLarge => (
                Event,
                "Raise Redis's proto-max-bulk-len, or lower outbox_relay.max_event_size.",
            ),
            // An unknown reply never counts as success, and never stops other events.
            Self::UnknownReply => return (Event, None),
            Self::Full => (
                Full,
                "Let the group read and acknowledge. If nobody needs it, delete it with XGROUP DESTROY, or set trim_ignore_idle. Or raise the backend's max_len. outbox.consumers shows how far each group is.",
            ),
            Self::NoGroup => (
                Full,
                "Create the group with XGROUP CREATE, or raise the backend's max_len, or set its trim to 'length'.",
            ),
            Self::TrimDenied => (
                Configuration,
                "With trim = 'read', the backend's Redis user needs +xlen +xinfo|groups +xinfo|consumers +xpending +xtrim +eval on its streams. Allow that, or set trim to 'length'.",
            ),
            Self::TrimUnknown => (
                Configuration,
                "trim = 'read' needs Redis 6.2 or later (XTRIM MINID, XINFO, XPENDING, EVAL). Upgrade it, or set the backend's trim to 'length'.",
            ),
            Self::Fenced => (
                Fenced,
                "To replace that server, stop it and run outbox.take_over() here.",
            ),
            Self::Copied => (
                Copy,
                "To send the backend's events from this copy from now on, run outbox.take_over(backend) here.",
            ),
            Self::GuardMissing => (Configuration, "Run outbox.take_over() to continue without it."),
            Self::NoGuard => (
                Configuration,
                "Something else has written to that key of Redis. Delete the key; then on_missing_guard decides.",
            ),
            Self::Other => return (Backend, None),
        };
        (class, Some(hint))
    }

    pub fn class(self) -> Class {
        self.judged().0
    }

    /// What an error reply means, given its first word and the rest.
    pub(super) fn of_reply(code: &str, details: &str) -> Self {
        match code {
            "LOADING" => Self::Loading,
            "READONLY" => Self::ReadOnly,
            "OOM" => Self::OutOfMemory,
            "MISCONF" => Self::Misconf,
            "BUSY" => Self::Busy,
            "UNKILLABLE" => Self::Unkillable,
            "MASTERDOWN" => Self::MasterDown,
            "NOREPLICAS" => Self::NoReplicas,
            "CLUSTERDOWN" => Self::ClusterDown,
            "TRYAGAIN" => Self::TryAgain,
            "MOVED" => Self::Moved,
            "ASK" => Self::Ask,
            "CROSSSLOT" => Self::CrossSlot,
            "NOAUTH" => Self::NoAuth,
            "WRONGPASS" => Self::WrongPass,
            "DENIED" => Self::Denied,
            // NOPERM for a key concerns only that stream; for a command it concerns the whole backend.
            "NOPERM" if names_a_key(details) => Self::NoPermKey,
            "NOPERM" => Self::NoPermCommand,
            "WRONGTYPE" => Self::WrongType,
            "ERR" => Self::of_plain_error(details),
            _ => Self::UnknownReply,
        }
    }

    /// What an error reply that begins with ERR means.
    fn of_plain_error(details: &str) -> Self {
        let says = |text| details.contains(text);
        match details {
            _ if says("max number of clients") => Self::MaxClients,
            _ if details.starts_with("unknown command") && names_xadd(details) => Self::NoStreams,
            _ if details.starts_with("unknown command") => Self::UnknownCommand,
            _ if says("invalid bulk length") || says("invalid multibulk length") => Self::TooLarge,
            _ if says("unauthenticated") => Self::NoAuth,
            _ if details.starts_with("Protocol error") => Self::Desynchronised,
            _ if says("Elements are too large") || says("exceeds maximum allowed size") => Self::TooLarge,
            _ if says("exhausted the last possible ID") || says("smaller than the target stream top item") => {
                Self::StreamExhausted
            }
            _ if says("without any password configured") || says("no password is set") => Self::NoPasswordSet,
            // Redis 5.
            _ if details.starts_with("invalid password") => Self::WrongPass,
            _ if says("DB index") || says("SELECT is not allowed") => Self::NoSuchDb,
            _ => Self::UnknownReply,
        }
    }
}

fn names_a_key(details: &str) -> bool {
    // The last text occurs in EXEC if rights were changed after the command was queued.
    ["access one of the keys", "access a key", "touch the specified keys"]
        .iter()
        .any(|text| details.contains(text))
        || (details.contains("permissions to access the '") && details.contains("' key"))
}

fn names_xadd(details: &str) -> bool {
    let name = details.split(['\'', '`']).nth(1).unwrap_or_default();
    name.eq_ignore_ascii_case("XADD")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts of Redis 6.0 to 8 and of Valkey 8 and 9.
    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn error_replies_are_classified() {
        use Trouble::*;
        for (code, details, trouble) in [
            ("LOADING", "Redis is loading the dataset in memory", Loading),
            (
                "OOM",
                "command not allowed when used memory > 'maxmemory'.",
                OutOfMemory,
            ),
            ("READONLY", "You can't write against a read only replica.", ReadOnly),
            (
                "MISCONF",
                "Redis is configured to save RDB snapshots, but it's currently unable to persist to disk.",
                Misconf,
            ),
            (
                "BUSY",
                "Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
                Busy,
            ),
            (
                "UNKILLABLE",
                "Sorry the script already executed write commands against the dataset.",
                Unkillable,
            ),
            (
                "MASTERDOWN",
                "Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
                MasterDown,
            ),
            ("NOREPLICAS", "Not enough good replicas to write.", NoReplicas),
            ("CLUSTERDOWN", "Hash slot not served", ClusterDown),
            ("CLUSTERDOWN", "The cluster is down", ClusterDown),
            ("TRYAGAIN", "Multiple keys request during rehashing of slot", TryAgain),
            ("MOVED", "3999 127.0.0.1:6381", Moved),
            ("ASK", "3999 127.0.0.1:6381", Ask),
            ("CROSSSLOT", "Keys in request don't hash to the same slot", CrossSlot),
            ("ERR", "max number of clients reached", MaxClients),
            ("ERR", "max number of clients + cluster connections reached", MaxClients),
            ("NOAUTH", "Authentication required.", NoAuth),
            ("ERR", "Protocol error: unauthenticated multibulk length", NoAuth),
            (
                "WRONGPASS",
                "invalid username-password pair or user is disabled.",
                WrongPass,
            ),
            ("ERR", "invalid password", WrongPass),
            (
                "ERR",
                "AUTH <password> called without any password configured for the default user. Are you sure?",
                NoPasswordSet,
            ),
            ("ERR", "Client sent AUTH, but no password is set", NoPasswordSet),
            (
                "DENIED",
                "Redis is running in protected mode because protected mode is enabled",
                Denied,
            ),
            ("ERR", "DB index is out of range", NoSuchDb),
            ("ERR", "invalid DB index", NoSuchDb),
            ("ERR", "SELECT is not allowed in cluster mode", NoSuchDb),
            ("ERR", "unknown command 'XADD'", NoStreams),
            ("ERR", "unknown command `xadd`", NoStreams),
            ("ERR", "unknown command 'WATCH'", UnknownCommand),
            (
                "NOPERM",
                "this user has no permissions to run the 'xadd' command",
                NoPermCommand,
            ),
            (
                "NOPERM",
                "User relay has no permissions to run the 'xadd' command",
                NoPermCommand,
            ),
            (
                "NOPERM",
                "this user has no permissions to access one of the keys used as arguments",
                NoPermKey,
            ),
            ("NOPERM", "No permissions to access a key", NoPermKey),
            (
                "NOPERM",
                "User relay has no permissions to access the 'events' key",
                NoPermKey,
            ),
            (
                "NOPERM",
                "ACLs rules changed between the moment the transaction was accumulated and the EXEC call. This command is no longer allowed for the following reason: no permission to touch the specified keys",
                NoPermKey,
            ),
            (
                "WRONGTYPE",
                "Operation against a key holding the wrong kind of value",
                WrongType,
            ),
            (
                "ERR",
                "The stream has exhausted the last possible ID, unable to add more items",
                StreamExhausted,
            ),
            // Redis 6.
            (
                "ERR",
                "The ID specified in XADD is equal or smaller than the target stream top item",
                StreamExhausted,
            ),
            ("ERR", "Protocol error: invalid bulk length", TooLarge),
            ("ERR", "Protocol error: invalid multibulk length", TooLarge),
            ("ERR", "Elements are too large to be stored", TooLarge),
            ("ERR", "Protocol error: expected '$', got 'x'", Desynchronised),
            ("ERR", "syntax error", UnknownReply),
            ("SOMETHING", "new", UnknownReply),
            ("", "", UnknownReply),
        ] {
            assert_eq!(Trouble::of_reply(code, details), trouble, "{code} {details}");
        }
    }
}
