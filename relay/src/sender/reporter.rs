//! How a sender's thread reports, and when that wakes the worker.

use crate::delivery::flight::WINDOW_BATCHES;
use crate::failure::Failure;
use crate::sender::orders::Report;
use crossbeam_channel::Sender;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The worker is woken once for this many reports of batches that went well,
const HEARD_TOGETHER: usize = WINDOW_BATCHES / 4;

/// but only while more orders than this wait for the sender: then the worker need not hurry.
const ENOUGH_ORDERS: usize = WINDOW_BATCHES / 4;

pub(super) struct Reporter {
    pub(super) reports: Sender<Report>,
    pub(super) waker: Arc<UnixStream>,
}

impl Reporter {
    /// False: the worker has let go of this sender.
    pub(super) fn report(&self, report: Report) -> bool {
        self.report_before(report, 0)
    }

    /// The same, while so many orders are `waiting` to be obeyed: a batch that went well need not wake the worker then.
    pub(super) fn report_before(&self, report: Report, waiting: usize) -> bool {
        let is_news = !matches!(&report, Report::Done { refused, .. } if refused.is_empty());
        let heard = self.reports.try_send(report).is_ok();
        if heard && (is_news || waiting <= ENOUGH_ORDERS || self.reports.len() >= HEARD_TOGETHER) {
            // A full socket wakes the worker just as well.
            let _ = (&*self.waker).write(&[0]);
        }
        heard
    }

    pub(super) fn lost(&self, failure: Failure) {
        self.report(Report::Lost {
            failure,
            accepted: 0,
            refused: Vec::new(),
        });
    }
}

impl Drop for Reporter {
    /// Also when the thread panics: the worker sees the closed channel.
    fn drop(&mut self) {
        let _ = (&*self.waker).write(&[0]);
    }
}
