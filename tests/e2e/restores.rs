//! Older states of a database come back, from a backup, an archive, a copy of its directory or a dump: their events are
//! delivered, entries that are already in the stream are not repeated, and the log says what was found.

use std::path::Path;
use std::process::Command;

use kit::owners::{PATIENCE, WATCHFUL, owns, publish, take_over, wait_fenced, wait_owner};
use kit::{Mode, Postgres, Redis, Stack, env, holds_for, ids, standing, wait_drained, wait_until};
use uuid::Uuid;

fn stack(settings: &[(&str, &str)]) -> Stack {
    Stack::of(Postgres::with(WATCHFUL).with(settings), Redis::start())
}

/// This many delivered events, each in a separate transaction.
#[track_caller]
fn delivered(pg: &Postgres, redis: &Redis, prefix: &str, count: usize) -> Vec<Uuid> {
    let there = redis.xlen(kit::stack::STREAM);
    let sent: Vec<Uuid> = (0..count)
        .flat_map(|n| publish(pg, &format!("{prefix}{n}-"), 1))
        .collect();
    redis.wait_entries(kit::stack::STREAM, there + count);
    wait_drained(pg, "default");
    sent
}

/// The log reports another history, and how many of its events were found and sent.
#[track_caller]
fn assert_compared(pg: &Postgres, sent_at_least: i64) {
    pg.wait_log("WARNING:  backend \"default\" goes on after another history of this database");
    let log = pg.log();
    let said = log
        .lines()
        .find(|line| line.contains("are already in the streams"))
        .expect("a count");
    let sent = said
        .split_once("not repeated; ")
        .and_then(|(_, rest)| rest.split_once(" are sent"));
    let sent: i64 = sent.expect("a count").0.parse().expect("a number");
    assert!(sent >= sent_at_least, "{said}");
}

fn as_server(program: &str, args: &[&str], paths: &[&Path]) {
    let mut command: Command = env::server_command(program);
    let status = command.args(args).args(paths).status().expect("it runs");
    assert!(status.success(), "{program} {args:?} {paths:?} failed");
}

/// Puts a copy of a data directory into a stopped server's place.
fn put_in_place(copy: &Path, server: &Postgres) {
    as_server("rm", &["-rf"], &[server.data_dir()]);
    as_server("cp", &["-R"], &[copy, server.data_dir()]);
    as_server("chmod", &["700"], &[server.data_dir()]);
    let socket_dir = server.host().display().to_string();
    server.configure(&[("unix_socket_directories", &socket_dir)]);
}

/// Puts a copy of a data directory's contents into a stopped server's.
fn put_into(copy: &Path, server: &Postgres) {
    let data = server.data_dir();
    as_server("find", &[&data.display().to_string(), "-mindepth", "1", "-delete"], &[]);
    as_server("cp", &["-R"], &[&copy.join("."), data]);
    let socket_dir = server.host().display().to_string();
    server.configure(&[("unix_socket_directories", &socket_dir)]);
}

/// A primary that archives its WAL beside its data directory.
fn archiving() -> Stack {
    stack(&[
        ("archive_mode", "on"),
        (
            "archive_command",
            "mkdir -p ../archive && cp %p ../archive/%f.new && mv ../archive/%f.new ../archive/%f",
        ),
    ])
}

#[track_caller]
fn archive_all(pg: &Postgres) {
    let name: String = pg.one("select pg_walfile_name(pg_current_wal_insert_lsn())");
    pg.exec("select pg_switch_wal()");
    wait_until("the WAL to be archived", || {
        pg.host().join("archive").join(&name).exists()
    });
}

/// Recovers a backup up to a restore point, with the WAL that `original` has archived.
fn recover_to(backup: &mut Postgres, original: &Postgres, point: &str) {
    let command = format!("cp {}/archive/%f %p", original.host().display());
    backup.configure(&[
        ("restore_command", &command),
        ("recovery_target_name", point),
        ("recovery_target_action", "promote"),
        ("archive_mode", "off"),
    ]);
    as_server("touch", &[], &[&backup.data_dir().join("recovery.signal")]);
    backup.start_again();
    wait_until("the end of recovery", || {
        !backup.one::<bool>("select pg_is_in_recovery()")
    });
}

#[test]
fn a_recovery_to_a_point_in_time_repeats_nothing_and_delivers_new_events() {
    let mut stack = archiving();
    let base = delivered(&stack.pg, &stack.redis, "base", 5);
    let mut backup = stack.pg.base_backup().stopped();
    let before = delivered(&stack.pg, &stack.redis, "before", 10);
    stack.pg.exec("select pg_create_restore_point('here')");
    let lost = delivered(&stack.pg, &stack.redis, "lost", 20);
    archive_all(&stack.pg);
    stack.pg.stop(Mode::Fast);

    recover_to(&mut backup, &stack.pg, "here");
    assert_eq!(
        backup.one::<i64>("select count(*) from outbox.events where event_type like 'lost%'"),
        0
    );
    wait_fenced(&backup, &stack.pg);
    take_over(&backup);
    let new = delivered(&backup, &stack.redis, "new", 30);
    assert_eq!(ids(&stack.events()), [base, before, lost, new].concat());
    assert_compared(&backup, 0);
}

/// Events that the original had published, but not sent, before the point are sent by the restored server.
#[test]
fn a_recovery_to_a_point_in_time_sends_events_that_were_never_sent() {
    let mut stack = archiving();
    let base = delivered(&stack.pg, &stack.redis, "base", 5);
    let mut backup = stack.pg.base_backup().stopped();
    stack.pg.exec("update outbox.backends set enabled = false");
    let unsent = publish(&stack.pg, "unsent", 10);
    stack.pg.exec("select pg_create_restore_point('here')");
    publish(&stack.pg, "gone", 10);
    archive_all(&stack.pg);
    stack.pg.crash();

    recover_to(&mut backup, &stack.pg, "here");
    backup.exec("update outbox.backends set enabled = true");
    wait_fenced(&backup, &stack.pg);
    take_over(&backup);
    wait_owner(&backup, &stack.redis);
    let new = delivered(&backup, &stack.redis, "new", 5);
    assert_eq!(ids(&stack.events()), [base, unsent, new].concat());
}

/// A second attempt, to another point: the first restored server has owned the streams meanwhile, which the second does
/// not know.
#[test]
fn a_second_recovery_waits_for_take_over_after_the_first_was_owner() {
    let mut stack = archiving();
    let mut expected = delivered(&stack.pg, &stack.redis, "base", 5);
    let mut attempts = [stack.pg.base_backup().stopped(), stack.pg.base_backup().stopped()];
    expected.extend(delivered(&stack.pg, &stack.redis, "before", 5));
    stack.pg.exec("select pg_create_restore_point('one')");
    expected.extend(delivered(&stack.pg, &stack.redis, "between", 5));
    stack.pg.exec("select pg_create_restore_point('two')");
    expected.extend(delivered(&stack.pg, &stack.redis, "lost", 5));
    archive_all(&stack.pg);
    stack.pg.stop(Mode::Fast);
    let [first, second] = &mut attempts;
    recover_to(first, &stack.pg, "one");
    wait_fenced(first, &stack.pg);
    take_over(first);
    expected.extend(delivered(first, &stack.redis, "first", 5));
    first.stop(Mode::Fast);

    recover_to(second, &stack.pg, "two");
    wait_fenced(second, first);
    let new = publish(second, "second", 5);
    take_over(second);
    stack.wait_events(expected.len() + 5);
    wait_drained(second, "default");
    expected.extend(new);
    assert_eq!(ids(&stack.events()), expected);
}

/// The original is dead; its backup takes its place, elsewhere or in the same directory.
#[test]
fn a_restored_backup_goes_on_in_place_of_the_dead_original_when_it_is_told_to() {
    for in_place in [false, true] {
        let mut stack = stack(&[]);
        let mut expected = delivered(&stack.pg, &stack.redis, "base", 5);
        let mut backup = stack.pg.base_backup().stopped();
        expected.extend(delivered(&stack.pg, &stack.redis, "lost", 20));
        stack.pg.crash();
        if in_place {
            put_in_place(backup.data_dir(), &stack.pg);
            stack.pg.start_again();
        } else {
            backup.start_again();
        }
        let restored = if in_place { &stack.pg } else { &backup };
        wait_fenced(restored, &stack.pg);
        take_over(restored);
        let new: Vec<Uuid> = (0..30)
            .flat_map(|n| publish(restored, &format!("new{n}-"), 1))
            .collect();
        stack.wait_events(55);
        wait_drained(restored, "default");
        expected.extend(new);
        assert_eq!(ids(&stack.events()), expected, "in the same directory: {in_place}");
        assert_compared(restored, 0);
    }
}

/// A snapshot of a stopped server's directory is put back after another run has relayed: that run is unknown, so
/// take_over() must confirm that it is gone.
#[test]
fn a_data_directory_that_was_set_back_loses_nothing_once_it_is_told_to_go_on() {
    let mut stack = stack(&[]);
    let mut expected = delivered(&stack.pg, &stack.redis, "base", 5);
    stack.pg.exec("update outbox.backends set enabled = false");
    let unsent = publish(&stack.pg, "unsent", 3);
    stack.pg.stop(Mode::Fast);
    let copy = stack.pg.host().join("copy");
    as_server("cp", &["-R"], &[stack.pg.data_dir(), &copy]);
    stack.pg.start_again();
    stack.pg.exec("update outbox.backends set enabled = true");
    stack.wait_events(8);
    expected.extend(unsent);
    expected.extend(delivered(&stack.pg, &stack.redis, "lost", 20));
    stack.pg.stop(Mode::Fast);

    put_in_place(&copy, &stack.pg);
    stack.pg.start_again();
    stack.pg.exec("update outbox.backends set enabled = true");
    wait_until("it to be fenced", || standing(&stack.pg, "default").state == "fenced");
    let new: Vec<Uuid> = (0..30)
        .flat_map(|n| publish(&stack.pg, &format!("new{n}-"), 1))
        .collect();
    holds_for(2 * PATIENCE, "it waits for a word", || {
        stack.events().len() == expected.len()
    });
    take_over(&stack.pg);
    stack.wait_events(expected.len() + 30);
    wait_drained(&stack.pg, "default");
    expected.extend(new);
    assert_eq!(ids(&stack.events()), expected);
    stack.pg.wait_log(
        "3 of the events after its saved position are already in the streams and are not repeated; 30 are sent.",
    );
}

/// The snapshot was taken of the run that continued to relay: the run is known, and its history goes beyond the
/// snapshot. The snapshot is put into the original's own directory, which no other server can use.
#[test]
fn a_snapshot_of_a_running_server_that_is_put_back_goes_on_by_itself() {
    let mut stack = stack(&[]);
    let mut expected = delivered(&stack.pg, &stack.redis, "base", 5);
    let snapshot = stack.pg.base_backup().stopped();
    expected.extend(delivered(&stack.pg, &stack.redis, "lost", 10));
    stack.pg.stop(Mode::Fast);
    put_into(snapshot.data_dir(), &stack.pg);
    stack.pg.start_again();
    expected.extend(delivered(&stack.pg, &stack.redis, "new", 10));
    assert_eq!(ids(&stack.events()), expected);
    assert_compared(&stack.pg, 0);
}

/// A dump in another cluster is another installation, with its own guard; it brings the unsent events.
#[test]
fn a_restored_dump_sends_what_was_not_sent_under_a_guard_of_its_own() {
    let mut stack = stack(&[]);
    let sent = delivered(&stack.pg, &stack.redis, "sent", 5);
    stack.pg.exec("update outbox.backends set enabled = false");
    let unsent = publish(&stack.pg, "unsent", 5);
    wait_until("the cursor to be saved", || standing(&stack.pg, "default").pending == 5);
    let dump = stack.pg.pg_dump("postgres");
    let key: String = stack.pg.one("select outbox.guard_key('default')");
    stack.pg.stop(Mode::Fast);

    let restored = Postgres::with(WATCHFUL).start();
    restored.restore("postgres", &dump);
    assert_ne!(restored.one::<String>("select outbox.guard_key('default')"), key);
    assert_eq!(restored.one::<i64>("select count(*) from outbox.take_overs"), 0);
    restored.exec("update outbox.backends set enabled = true");
    stack.wait_events(10);
    let new = delivered(&restored, &stack.redis, "new", 5);
    assert_eq!(ids(&stack.events()), [sent, unsent, new].concat());
    assert!(owns(&restored, &stack.redis));
    // The other server's guard is unchanged.
    let left = stack.redis.guard(&key).expect("it is there");
    assert!(
        left.field("place")
            .contains(&format!("{}#", stack.pg.data_dir().display()))
    );
    assert!(
        !restored.log().contains("fenced"),
        "a stranger's guard is none of its business"
    );
}

/// The extension is created again while its server runs: the tables know nothing of that run unless they are told
/// again.
#[test]
fn an_extension_that_was_created_anew_knows_its_server() {
    let stack = stack(&[]);
    delivered(&stack.pg, &stack.redis, "before", 3);
    let row = format!(
        "update outbox.backends set host = '127.0.0.1', port = {}",
        stack.redis.port()
    );
    stack.pg.exec(&format!(
        "begin; drop extension outbox_relay cascade; create extension outbox_relay; {row}; commit"
    ));
    delivered(&stack.pg, &stack.redis, "after", 3);
    let standby = stack.pg.standby().start();
    kit::owners::wait_caught_up(&stack.pg, &standby);
    let Stack { mut pg, redis } = stack;
    pg.stop(Mode::Fast);
    standby.promote();
    wait_owner(&standby, &redis);
    let named = "select count(*) from outbox.incarnations";
    assert_eq!(standby.one::<i64>(named), 2, "runs of the two servers");
}
