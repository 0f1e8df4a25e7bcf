//! Failures between the relay and Redis on real sockets, and the errors that a user sees: docs/FAILURES.md has the
//! whole list. No event fails, and all arrive once when the connection works again.

use std::os::unix::fs::PermissionsExt;

use kit::{
    BlackHole, Garbage, Postgres, QUICK, Redis, Stack, UNTRIMMED, Way, backoff, env, misconfigured, publish_many,
};

fn quick() -> Stack {
    Stack::of(Postgres::with(QUICK).with(&[UNTRIMMED]), Redis::start())
}

/// Points the backend to this address, waits for the error, and points it back.
#[track_caller]
fn suffers_at(host: &str, port: u16, trouble: &kit::stack::Trouble<'_>) {
    let stack = quick();
    let mut expected = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    stack.assert_mended(&stack.redis, &expected);
    stack.point_at("default", host, port);
    expected.extend(stack.publish_into(trouble, 150));
    stack.point("default", &stack.redis);
    stack.assert_mended(&stack.redis, &expected);
}

#[test]
fn a_port_where_nobody_listens() {
    suffers_at("127.0.0.1", 1, &backoff("Connection refused", "Start Redis there"));
}

#[test]
fn a_host_that_resets_connections() {
    let hint = "If this continues, look in Redis's log for the reason";
    suffers_at("127.0.0.1", Garbage::resetting().port(), &backoff("", hint));
}

#[test]
fn a_host_that_closes_connections() {
    let hint = "If this continues, look in Redis's log for the reason";
    suffers_at("127.0.0.1", Garbage::saying(b"").port(), &backoff("", hint));
}

#[test]
fn a_name_that_does_not_exist() {
    let trouble = misconfigured("failed to lookup address", "Correct the backend's host");
    suffers_at("no..such..host", 6379, &trouble);
}

#[test]
fn a_host_that_answers_nothing() {
    let gone = BlackHole::unreachable();
    suffers_at(
        "127.0.0.1",
        gone.port(),
        &backoff("timed out", "Redis hangs or is overloaded"),
    );
}

#[test]
fn a_server_that_accepts_and_answers_nothing() {
    let silent = BlackHole::start();
    suffers_at(
        "127.0.0.1",
        silent.port(),
        &backoff("timed out", "Redis hangs or is overloaded"),
    );
}

#[test]
fn a_server_of_another_protocol() {
    let http = Garbage::saying(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
    let trouble = backoff("the server is not Redis", "The server there is not Redis");
    suffers_at("127.0.0.1", http.port(), &trouble);
}

/// Whatever the reply contains, it is given up before it fills the memory.
#[test]
fn a_reply_that_does_not_end() {
    let more = b"$4000\r\n"
        .iter()
        .copied()
        .chain([b'x'; 4_000])
        .chain(*b"\r\n")
        .collect::<Vec<_>>();
    for (begin, more, error) in [
        (
            b"+OK\r\n*200000000\r\n".as_slice(),
            more.as_slice(),
            "the server is not Redis",
        ),
        (
            b"$1000000000\r\n",
            b"x",
            "the reply to CLIENT SETNAME is longer than any reply of Redis",
        ),
        (b"*1\r\n*1\r\n", b"*1\r\n", "the server is not Redis"),
        (b"+", b"x", "the server is not Redis"),
        (b"", b"+OK\r\n", ""),
    ] {
        let stack = quick();
        let endless = BlackHole::endless(begin, more);
        stack.point_at("default", "127.0.0.1", endless.port());
        let said = format!("{:?}", String::from_utf8_lossy(begin));
        let expected = publish_many(&mut stack.pg.client(), "default", "", "t", 150);
        let found = kit::wait_trouble(&stack.pg, "default", "backoff", error);
        assert_eq!((found.pending, found.failed), (150, 0), "{said}: {found:?}");
        let worker = stack.pg.wait_worker("postgres");
        let status = std::fs::read_to_string(format!("/proc/{worker}/status")).expect("the worker runs");
        let peak = status.lines().find_map(|line| {
            line.strip_prefix("VmHWM:")?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        });
        let peak_mib = peak.expect("VmHWM is a number of kB") / 1_024;
        assert!(peak_mib < 100, "{said}: {peak_mib} MiB");
        stack.point("default", &stack.redis);
        stack.assert_mended(&stack.redis, &expected);
    }
}

/// Neither side receives bytes of the other any more, and no end of the connection is signalled. The bytes on their way
/// arrive late.
#[test]
fn a_connection_that_is_half_open() {
    let stack = quick();
    let proxy = stack.through_proxy();
    let mut expected = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    stack.assert_mended(&stack.redis, &expected);
    for way in [Way::ToServer, Way::ToClient] {
        proxy.hold_all(way);
        expected.extend(stack.publish_into(&backoff("timed out", "Redis hangs or is overloaded"), 150));
        proxy.pass();
        stack.assert_mended(&stack.redis, &expected);
    }
}

/// The socket of a Redis that has been stopped and may start again.
#[test]
fn a_socket_file_that_is_not_there() {
    let stack = quick();
    let mut expected = publish_many(&mut stack.pg.client(), "default", "", "before", 3);
    stack.assert_mended(&stack.redis, &expected);
    stack
        .pg
        .exec("update outbox.backends set unix_socket = '/nowhere/redis.sock'");
    let trouble = backoff(
        "No such file or directory",
        "Start Redis, or correct the backend's unix_socket",
    );
    expected.extend(stack.publish_into(&trouble, 150));
    let socket = stack.redis.socket();
    stack.pg.exec(&format!(
        "update outbox.backends set unix_socket = '{}'",
        socket.display()
    ));
    stack.assert_mended(&stack.redis, &expected);
}

#[test]
fn a_socket_that_may_not_be_opened() {
    if env::server_user().is_none() {
        env::not_run("Redis runs as the same user as Postgres, who may open its own socket");
        return;
    }
    let stack = quick();
    let socket = stack.redis.socket();
    let permit = |mode| std::fs::set_permissions(&socket, PermissionsExt::from_mode(mode)).expect("chmod");
    permit(0o700);
    stack.pg.exec(&format!(
        "update outbox.backends set unix_socket = '{}'",
        socket.display()
    ));
    let trouble = misconfigured(
        "Permission denied",
        "Allow the operating system user of the database server to open the socket",
    );
    let expected = stack.publish_into(&trouble, 150);
    permit(0o777);
    stack.assert_mended(&stack.redis, &expected);
}
