//! The kit's proxy works as documented: other tests rely on each byte of it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use kit::{Proxy, Way, wait_eq, wait_until};

/// A listener behind a proxy.
fn proxied() -> (TcpListener, Proxy) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let proxy = Proxy::to(listener.local_addr().expect("an address").port());
    (listener, proxy)
}

/// A client's socket and the one that the server accepted for it.
fn pair(listener: &TcpListener, proxy: &Proxy) -> (TcpStream, TcpStream) {
    let client = connect(proxy).expect("a connection");
    let (server, _) = listener.accept().expect("a connection");
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(kit::LIMIT)).expect("a timeout");
    }
    (client, server)
}

fn connect(proxy: &Proxy) -> std::io::Result<TcpStream> {
    TcpStream::connect(("127.0.0.1", proxy.port()))
}

fn receive(socket: &mut TcpStream, count: usize) -> String {
    let mut bytes = vec![0; count];
    socket.read_exact(&mut bytes).expect("as many bytes");
    String::from_utf8(bytes).expect("text")
}

/// Everything that still arrives, until the connection ends in any way.
fn rest(socket: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = socket.read_to_end(&mut bytes);
    String::from_utf8(bytes).expect("text")
}

#[test]
fn bytes_and_ends_pass_both_ways() {
    let (listener, proxy) = proxied();
    let (mut client, mut server) = pair(&listener, &proxy);
    // More than the buffers on the way can hold.
    let long = "0123456789abcdef".repeat(1 << 18);
    std::thread::scope(|scope| {
        scope.spawn(|| client.write_all(long.as_bytes()).expect("writing"));
        assert!(receive(&mut server, long.len()) == long, "bytes changed on their way");
    });
    server.write_all(b"answer").unwrap();
    assert_eq!(receive(&mut client, 6), "answer");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&mut server), "");
    server.write_all(b"last words").unwrap();
    drop(server);
    assert_eq!(rest(&mut client), "last words");
    assert_eq!(proxy.passed(Way::ToServer), long.len() as u64);
    assert_eq!(proxy.passed(Way::ToClient), 16);
    wait_eq("open connections", 0, || proxy.connections());
}

#[test]
fn a_connection_is_cut_after_exactly_so_many_bytes() {
    for way in [Way::ToServer, Way::ToClient] {
        let (listener, proxy) = proxied();
        let (client, server) = pair(&listener, &proxy);
        let (mut from, mut to) = match way {
            Way::ToServer => (client, server),
            Way::ToClient => (server, client),
        };
        proxy.cut_after(way, 10);
        from.write_all(b"0123").unwrap();
        assert_eq!(receive(&mut to, 4), "0123");
        assert_eq!(proxy.cuts(), 0);
        // Whether the last write still succeeds depends on the kernel.
        let _ = from.write_all(b"456789abc");
        assert_eq!(rest(&mut to), "456789");
        assert_eq!(rest(&mut from), "");
        assert_eq!((proxy.cuts(), proxy.connections()), (1, 0));
        let (mut client, mut server) = pair(&listener, &proxy);
        client.write_all(&[b'x'; 100]).unwrap();
        assert_eq!(receive(&mut server, 100).len(), 100, "only one is cut");
        proxy.cut();
        assert_eq!((rest(&mut client), rest(&mut server)), (String::new(), String::new()));
        assert_eq!(proxy.cuts(), 2);
    }
}

#[test]
fn a_cut_after_nothing_waits_for_the_next_byte() {
    let (listener, proxy) = proxied();
    let (mut client, mut server) = pair(&listener, &proxy);
    proxy.cut_after(Way::ToServer, 0);
    server.write_all(b"this way is free").unwrap();
    assert_eq!(receive(&mut client, 16), "this way is free");
    assert_eq!(proxy.connections(), 1);
    client.write_all(b"x").unwrap();
    assert_eq!(rest(&mut server), "");
    assert_eq!(proxy.passed(Way::ToServer), 0);
}

#[test]
fn a_connection_is_held_or_cut_behind_a_mark() {
    let (listener, proxy) = proxied();
    let (mut client, mut server) = pair(&listener, &proxy);
    proxy.hold_behind(Way::ToServer, b"EXEC\r\n");
    // The mark comes in two pieces, and once more after that.
    client.write_all(b"MULTI EX").unwrap();
    assert_eq!(receive(&mut server, 8), "MULTI EX");
    client.write_all(b"EC\r\nWATCH EXEC\r\n").unwrap();
    assert_eq!(receive(&mut server, 4), "EC\r\n");
    proxy.wait_held(Way::ToServer, 12);
    proxy.release();
    assert_eq!(receive(&mut server, 12), "WATCH EXEC\r\n");
    proxy.cut_behind(Way::ToServer, b"EXEC\r\n");
    client.write_all(b"MULTI EXEC\r\nWATCH").unwrap();
    assert_eq!(rest(&mut server), "MULTI EXEC\r\n");
    assert_eq!(proxy.cuts(), 1);
}

/// The client is gone and another has connected; then the first one's bytes arrive.
#[test]
fn held_bytes_arrive_after_their_sender_has_gone() {
    let (listener, proxy) = proxied();
    let (mut early, mut server) = pair(&listener, &proxy);
    proxy.hold(Way::ToServer);
    early.write_all(b"the late write").unwrap();
    proxy.wait_held(Way::ToServer, 14);
    drop(early);
    wait_eq("connections left by their client", 1, || proxy.abandoned());
    let (mut later, mut other) = pair(&listener, &proxy);
    later.write_all(b"first").unwrap();
    assert_eq!(receive(&mut other, 5), "first");
    server.set_nonblocking(true).unwrap();
    assert!(server.read(&mut [0; 1]).is_err(), "it was not held");
    server.set_nonblocking(false).unwrap();
    proxy.release();
    assert_eq!(rest(&mut server), "the late write");
    drop(server);
    wait_eq("open connections", 1, || proxy.connections());
}

#[test]
fn connections_to_come_may_be_held_too() {
    let (listener, proxy) = proxied();
    proxy.hold_all(Way::ToClient);
    let (mut client, mut server) = pair(&listener, &proxy);
    server.write_all(b"held").unwrap();
    client.write_all(b"free").unwrap();
    assert_eq!(receive(&mut server, 4), "free");
    proxy.wait_held(Way::ToClient, 4);
    proxy.pass();
    assert_eq!(receive(&mut client, 4), "held");
}

#[test]
fn a_delay_delays_and_keeps_the_order() {
    let (listener, proxy) = proxied();
    let (mut client, mut server) = pair(&listener, &proxy);
    proxy.delay(Duration::from_millis(100));
    let start = Instant::now();
    client.write_all(b"slow ").unwrap();
    wait_until("the proxy to read", || proxy.held(Way::ToServer) == 5);
    proxy.delay(Duration::ZERO);
    client.write_all(b"quick").unwrap();
    assert_eq!(receive(&mut server, 10), "slow quick");
    let took = start.elapsed();
    assert!((100..2_000).contains(&took.as_millis()), "it took {took:?}");
}

#[test]
fn connections_are_refused_and_led_elsewhere() {
    let (listener, proxy) = proxied();
    let (mut client, mut server) = pair(&listener, &proxy);
    proxy.refuse();
    let error = connect(&proxy).expect_err("refused");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    client.write_all(b"open ones stay").unwrap();
    assert_eq!(receive(&mut server, 14), "open ones stay");
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    proxy.point_to(other.local_addr().unwrap().port());
    proxy.accept();
    let (mut client, mut server) = pair(&other, &proxy);
    client.write_all(b"elsewhere").unwrap();
    assert_eq!(receive(&mut server, 9), "elsewhere");
    assert_eq!(proxy.accepted(), 2);
    // Where nothing listens.
    drop((client, server, other));
    assert_eq!(rest(&mut connect(&proxy).unwrap()), "");
}
