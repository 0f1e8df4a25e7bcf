//! Under construction.
use kit::*;
#[test]
fn probe() {
    for _ in 0..12 {
        let t = std::time::Instant::now();
        let redis = Redis::start();
        let t1 = t.elapsed();
        let stack = Stack::of(Postgres::builder(), redis);
        let t2 = t.elapsed();
        stack.publish("x");
        let p = t.elapsed();
        stack.wait_events(1);
        eprintln!("{t1:?} {t2:?} {p:?} {:?}", t.elapsed());
        let d = t.elapsed() - p;
        drop(stack);
        eprintln!("{:?}", t.elapsed());
        assert!(d < std::time::Duration::from_secs(1), "{d:?}");
    }
}
#[test]
fn probe2() {
    probe()
}
