//! Servers of a cluster that do not let its lanes go.

use std::time::{Duration, Instant};

use kit::{Bystander, Liar, Lie, Postgres, QUICK, Redis, Stack, standing, wait_until};

/// A node that serves all hash slots, and never answers when a lane that is given up says so.
#[test]
fn a_node_that_does_not_let_lanes_go_keeps_no_other_from_connecting() {
    const SECONDS: u64 = 10;
    let stack = Stack::of(
        Postgres::with(QUICK).with(&[("max_files_per_process", "300")]),
        Redis::start(),
    );
    let liar = Liar::honest();
    let port = liar.port();
    liar.lie(move |words| match words[0].as_str() {
        "CLUSTER" => Lie::say(format!(
            "*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n127.0.0.1\r\n:{port}\r\n"
        )),
        "HSET" if words[words.len() - 2..] == ["released", "1"] => Some(Lie::Hang),
        _ => None,
    });
    stack.pg.exec(&format!(
        "insert into outbox.backends (name, mode, nodes, allowed_streams, socket_timeout)
            values ('liar', 'cluster', '{{127.0.0.1:{port}}}', '{{*}}', '1 h')"
    ));
    let bystander = Bystander::start(&stack);
    let (mut client, start, mut round) = (stack.pg.client(), Instant::now(), 0);
    let mut slowest = Duration::ZERO;
    while start.elapsed() < Duration::from_secs(SECONDS) {
        client
            .batch_execute("select outbox.publish_event('t', 'kit', backend => 'liar', stream => 's' || 5000 * random()) from generate_series(1, 100) n")
            .expect("published");
        let name = format!("new{round}");
        stack.pg.exec(&format!(
            "insert into outbox.backends (name, host, port) values ('{name}', '127.0.0.1', {})",
            stack.redis.port()
        ));
        let since = Instant::now();
        stack
            .pg
            .exec(&format!("select outbox.publish_event('t', 'kit', backend => '{name}')"));
        wait_until("the event of a new backend", || standing(&stack.pg, &name).pending == 0);
        slowest = slowest.max(since.elapsed());
        stack
            .pg
            .exec(&format!("delete from outbox.backends where name = '{name}'"));
        round += 1;
    }
    let former: i64 = stack.pg.one("select count(*) from outbox.former_lanes");
    println!(
        "{round} new backends, slowest {slowest:?}; {former} former lanes; {} connections",
        liar.accepted()
    );
    bystander
        .stop(&stack)
        .assert_harmless("a node that does not let lanes go");
    assert!(former >= 16, "{former} former lanes");
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
}
