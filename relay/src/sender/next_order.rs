//! Waits for the next order, asleep or awake.

use crate::sender::orders::Order;
use crossbeam_channel::{Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a sender that was roused stays awake: as long as the worker may need to bring the batch. Meanwhile it
/// yields the processor to others.
const ROUSED_FOR: Duration = Duration::from_micros(200);

/// Waits for an order: asleep or, if it was roused, awake, because waking takes as long as reading and appending an
/// event.
pub(super) fn next_order(orders: &Receiver<Order>) -> Result<Order, TryRecvError> {
    loop {
        let order = orders.recv().map_err(|_| TryRecvError::Disconnected)?;
        if !matches!(order, Order::Rouse) {
            return Ok(order);
        }
        let roused_at = Instant::now();
        while roused_at.elapsed() < ROUSED_FOR {
            match orders.try_recv() {
                Err(TryRecvError::Empty) => thread::yield_now(),
                Ok(Order::Rouse) => {}
                order => return order,
            }
        }
    }
}
