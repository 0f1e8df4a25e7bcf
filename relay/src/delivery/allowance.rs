//! How many events a delivery may send now because of `max_rate`.

/// How many events may be sent now.
#[derive(Default)]
pub(super) struct Allowance {
    /// `None`: any number.
    left: Option<usize>,
    /// The part of these that is reserved for waiting events that are due.
    reserved: usize,
    /// Whether there may be more to send, which waits for the pace.
    is_paced: bool,
    /// How many events were sent since [`Self::take_sent`] was last called.
    sent: usize,
}

impl Allowance {
    pub(super) fn grant(&mut self, events: Option<usize>, reserved: usize, wants: bool) {
        (self.left, self.reserved) = (events, reserved);
        self.is_paced = wants && events == Some(0);
    }

    pub(super) fn is_paced(&self) -> bool {
        self.is_paced
    }

    pub(super) fn take_sent(&mut self) -> usize {
        std::mem::take(&mut self.sent)
    }

    pub(super) fn for_rows(&self) -> usize {
        self.left.map_or(usize::MAX, |left| left.saturating_sub(self.reserved))
    }

    pub(super) fn for_waiting(&self) -> usize {
        self.left.unwrap_or(usize::MAX)
    }

    pub(super) fn spend(&mut self, events: usize) {
        self.sent += events;
        if let Some(left) = &mut self.left {
            *left = left.saturating_sub(events);
            self.is_paced = *left == 0;
        }
    }
}
