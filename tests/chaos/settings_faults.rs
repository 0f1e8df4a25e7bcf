//! Settings that change under load.

use std::time::Duration;

use crate::nemesis::Repair;
use crate::plan::Fault;
use crate::postgres_faults::sql;
use crate::site::Site;

pub(crate) fn befall(site: &mut Site, fault: Fault) -> Option<(Duration, Repair)> {
    match fault {
        Fault::BatchSize(size) => set(site, "batch_size", &size.to_string()),
        Fault::PollInterval(ms) => set(site, "poll_interval", &format!("{ms}ms")),
        Fault::RetryDelay(ms) => set(site, "retry_delay", &format!("{ms}ms")),
        Fault::Disable(time) => {
            set(site, "enabled", "off");
            return Some((time, Repair::Enable));
        }
        Fault::Pause(backend, time) => {
            enable(site, backend, false);
            return Some((time, Repair::Unpause(backend)));
        }
        _ => unreachable!("{fault:?} is no setting"),
    }
    None
}

pub(crate) fn repair(site: &Site, repair: Repair) {
    match repair {
        Repair::Enable => set(site, "enabled", "on"),
        Repair::Unpause(backend) => enable(site, backend, true),
        _ => unreachable!("{repair:?} is no setting"),
    }
}

fn set(site: &Site, name: &str, value: &str) {
    sql(site, &format!("alter system set outbox_relay.{name} = '{value}'"));
    site.pg.reload();
}

fn enable(site: &Site, backend: &str, enabled: bool) {
    sql(
        site,
        &format!("update outbox.backends set enabled = {enabled} where name = '{backend}' and enabled <> {enabled}"),
    );
}
