//! The kit itself, without the extension: servers start, die and come back.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kit::{BlackHole, Garbage, Mode, Postgres, Redis, wait_eq};

const PLAIN: &[(&str, &str)] = &[("shared_preload_libraries", "")];

#[test]
fn the_extension_is_installed_in_the_private_postgres() {
    let pg = Postgres::with(PLAIN).start();
    let found: i64 = pg.one("select count(*) from pg_available_extensions where name in ('outbox_relay', 'plpgsql')");
    assert_eq!(found, 2);
}

#[test]
fn postgres_survives_restart_crash_and_a_killed_postmaster() {
    let mut pg = Postgres::with(PLAIN).with(&[("work_mem", "5MB")]).start();
    assert_eq!(pg.one::<String>("show work_mem"), "5MB");
    pg.exec("create table t (n integer)");
    for (round, end) in [Postgres::kill9, Postgres::crash, Postgres::restart]
        .into_iter()
        .enumerate()
    {
        pg.exec("insert into t values (1)");
        end(&mut pg);
        if !pg.is_running() {
            pg.start_again();
        }
        assert_eq!(
            pg.one::<i64>("select count(*) from t"),
            i64::try_from(round).unwrap() + 1
        );
    }
    for mode in [Mode::Smart, Mode::Fast, Mode::Immediate] {
        pg.stop(mode);
        pg.start_again();
    }
    let mark = pg.log().len();
    pg.set("work_mem", "6MB");
    pg.wait_log_after(mark, "reloading configuration files");
    wait_eq("work_mem", "6MB".to_string(), || pg.one("show work_mem"));
    assert_eq!(pg.worker_pid("postgres"), None);
}

#[test]
fn a_database_is_dumped_and_restored() {
    let pg = Postgres::with(PLAIN).start();
    pg.exec("create table t as select generate_series(1, 3) as n");
    let dump = pg.pg_dump("postgres");
    pg.exec("create database copy");
    pg.restore("copy", &dump);
    assert_eq!(pg.one_db::<i64>("copy", "select count(*) from t"), 3);
    let ran = pg.psql(&["-d", "copy", "-At", "-c", "select sum(n) from t"]);
    assert_eq!((ran.ok, ran.stdout.trim()), (true, "6"));
    assert!(!pg.psql(&["-c", "select nonsense"]).ok);
}

#[test]
fn a_standby_follows_and_is_promoted() {
    let mut pg = Postgres::with(PLAIN).start();
    let standby = pg.standby().start();
    pg.exec("create table t as select 42 as n");
    wait_eq("the table on the standby", true, || {
        standby.one("select to_regclass('t') is not null")
    });
    standby.promote();
    standby.exec("insert into t values (43)");
    pg.stop(Mode::Fast);
    let copy = Postgres::copy_of(pg.data_dir()).start();
    assert_eq!(copy.one::<i64>("select count(*) from t"), 1);
    assert_ne!(copy.host(), pg.host());
}

#[test]
fn redis_is_killed_frozen_and_started_again() {
    let mut redis = Redis::with(&["--appendonly", "yes", "--appendfsync", "always"]);
    redis.call(&["XADD", "s", "1-1", "name", "value", "other", "thing"]);
    redis.kill9();
    redis.start_again();
    let entries = redis.wait_entries("s", 1);
    assert_eq!(entries[0].id, "1-1");
    assert_eq!((entries[0].get("other"), entries[0].get("none")), (Some("thing"), None));
    redis.sigstop();
    redis.sigcont();
    assert_eq!(redis.xlen("s"), 1);
    redis.shutdown();
    redis.start_again();
    assert_eq!(redis.xlen("nothing"), 0);
}

#[test]
fn hostile_servers_are_hostile() {
    let hole = BlackHole::start();
    let mut stream = TcpStream::connect(("127.0.0.1", hole.port())).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(stream.read(&mut [0; 1]).is_err());
    wait_eq("the accepted connection", 1, || hole.accepted());

    let gone = BlackHole::unreachable();
    let address = SocketAddr::from(([127, 0, 0, 1], gone.port()));
    let error = TcpStream::connect_timeout(&address, Duration::from_millis(100)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);

    let garbage = Garbage::saying(b"+OK\r\n");
    let mut said = String::new();
    TcpStream::connect(("127.0.0.1", garbage.port()))
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(said, "+OK\r\n");
}
