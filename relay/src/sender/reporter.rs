//! How a sender's thread reports, and when a report wakes the worker.

use crate::delivery::flight::WINDOW_BATCHES;
use crate::failure::Failure;
use crate::sender::orders::Report;
use crossbeam_channel::Sender;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// The worker is woken once for this many reports of successful batches,
const HEARD_TOGETHER: usize = WINDOW_BATCHES / 4;

/// but only while more orders than this wait for the sender: then the worker need not hurry.
const ENOUGH_ORDERS: usize = WINDOW_BATCHES / 4;

pub(super) struct Reporter {
    pub(super) reports: Sender<Report>,
    pub(super) waker: Arc<UnixStream>,
}

impl Reporter {
    /// False: the worker has dropped this sender.
    pub(super) fn report(&self, report: Report) -> bool {
        self.report_before(report, 0)
    }

    /// As [`Self::report`], while this many orders are `waiting`: then a successful batch need not wake the worker.
    pub(super) fn report_before(&self, report: Report, waiting: usize) -> bool {
        let is_news = !matches!(&report, Report::Done { refused, .. } if refused.is_empty());
        let heard = self.reports.try_send(report).is_ok();
        if heard && (is_news || waiting <= ENOUGH_ORDERS || self.reports.len() >= HEARD_TOGETHER) {
            // If the socket is full, the worker will wake anyway.
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
    /// This also runs if the thread panics: the worker sees the closed channel.
    fn drop(&mut self) {
        let _ = (&*self.waker).write(&[0]);
    }
}
