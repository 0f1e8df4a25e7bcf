//! TLS to sentinels and cluster nodes: the servers that they name must prove who they are, too.

use kit::sentinel::MASTER;
use kit::{
    Authority, Certificate, Postgres, QUICK, Redis, Sentinel, Stack, ids, publish_many, standing, wait_drained,
    wait_trouble, wait_until,
};

fn stack(redis: Redis) -> Stack {
    Stack::of(Postgres::with(QUICK), redis)
}

fn point(stack: &Stack, columns: &str, authority: &Authority) {
    stack.pg.exec(&format!(
        "update outbox.backends set host = null, port = null, tls = true, tls_ca_file = '{}', {columns}",
        authority.ca_file()
    ));
}

/// The columns of a backend that uses this sentinel.
fn asks(sentinel: &Sentinel) -> String {
    format!(
        "mode = 'sentinel', sentinel_master = '{MASTER}', nodes = '{{localhost:{}}}'",
        sentinel.tls_port()
    )
}

#[test]
fn sentinels_and_their_primary_are_spoken_to_over_tls() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let certificate = authority.issue(&["localhost", "127.0.0.1"]);
    let stack = stack(Redis::tls(&certificate, &[]));
    let sentinel = Sentinel::over_tls(&stack.redis, &certificate, &authority.ca_file());
    point(&stack, &asks(&sentinel), &authority);
    stack.publish("t");
    stack.wait_events(1);
    wait_drained(&stack.pg, "default");
    let address: String = stack.pg.one("select address from outbox.backend_status");
    assert_eq!(address, format!("127.0.0.1:{}", stack.redis.tls_port()));

    // A sentinel without a trusted certificate is not believed.
    point(&stack, &asks(&sentinel), &stranger);
    stack.publish("t");
    let said = wait_trouble(
        &stack.pg,
        "default",
        "misconfigured",
        "not signed by a trusted authority",
    );
    let error = said.last_error.unwrap_or_default();
    assert!(error.contains("sentinel localhost:"), "{error}");
    assert_eq!((said.failed, stack.redis.xlen("events")), (0, 1));
    point(&stack, &asks(&sentinel), &authority);
    stack.wait_events(2);
    wait_drained(&stack.pg, "default");
}

/// Nor is the primary that a sentinel names: its certificate must be for the named address.
#[test]
fn a_primary_with_an_untrusted_certificate_gets_nothing() {
    let authority = Authority::new();
    let redis = Redis::tls(&authority.issue(&["redis.example.com"]), &[]);
    let stack = stack(redis);
    let sentinel = Sentinel::over_tls(&stack.redis, &authority.issue(&["localhost"]), &authority.ca_file());
    point(&stack, &asks(&sentinel), &authority);
    stack.publish("t");
    wait_trouble(&stack.pg, "default", "misconfigured", "is for another host: ");
    assert_eq!(stack.redis.xlen("events"), 0);
}

fn cluster_node(certificate: &Certificate, authority: &Authority) -> Redis {
    let ca_file = authority.ca_file();
    let args = [
        "--cluster-enabled",
        "yes",
        "--tls-cluster",
        "yes",
        "--tls-ca-cert-file",
        &ca_file,
    ];
    Redis::tls(certificate, &[&args[..], &["--tls-auth-clients", "no"]].concat())
}

#[test]
fn the_nodes_of_a_cluster_are_spoken_to_over_tls() {
    let authority = Authority::new();
    let certificate = authority.issue(&["localhost", "127.0.0.1"]);
    let nodes = [0, 1].map(|_| cluster_node(&certificate, &authority));
    nodes[0].call(&["CLUSTER", "ADDSLOTSRANGE", "0", "8191"]);
    nodes[1].call(&["CLUSTER", "ADDSLOTSRANGE", "8192", "16383"]);
    nodes[0].call(&["CLUSTER", "MEET", "127.0.0.1", &nodes[1].tls_port().to_string()]);
    wait_until("the nodes to know each other", || {
        nodes.iter().all(|node| {
            let info: String = redis::cmd("CLUSTER")
                .arg("INFO")
                .query(&mut node.conn())
                .expect("CLUSTER INFO");
            info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:2")
        })
    });
    let stack = stack(Redis::start());
    let columns = format!("mode = 'cluster', nodes = '{{localhost:{}}}'", nodes[0].tls_port());
    point(&stack, &columns, &authority);
    let streams = ["a", "b", "c", "d"];
    let published = streams.map(|stream| (stream, publish_many(&mut stack.pg.client(), "default", stream, "t", 5)));
    wait_drained(&stack.pg, "default");
    let mut used = [0, 0];
    for (stream, events) in published {
        let node = usize::from(nodes[0].slot_of(stream) > 8_191);
        used[node] += 1;
        assert_eq!(ids(&nodes[node].entries(stream)), events, "{stream}");
    }
    assert!(used.iter().all(|count| *count > 0), "{used:?}: one node has nothing");
    assert_eq!(standing(&stack.pg, "default").failed, 0);
}
