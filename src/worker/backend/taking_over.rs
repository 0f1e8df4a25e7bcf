//! Orders to take over: `outbox.take_over()`. In a cluster, every lane carries out an order, and it is deleted when the
//! last one has. For lanes that were given up before, it is noted in `outbox.former_lanes`: they carry it out when they
//! go on, unless another server has taken over since.

use crate::server::process::{self, Aborted};
use crate::tables::{backends, former_lanes};
use crate::worker::backend::Backend;
use crate::worker::backend::take_over::TakingOver;
use relay::failure::Class;

impl Backend {
    /// Whether it has to take over. A paused backend does that when it is enabled again.
    pub(crate) fn is_told_to_take_over(&self) -> bool {
        let is_owed = self.lane().is_some() && self.taking_over.is_owed;
        self.row()
            .is_some_and(|row| row.enabled && (row.take_over.is_some() || is_owed))
    }

    /// The order of its row, unless this lane has carried it out.
    pub(super) fn order_to_carry_out(&self, order: Option<i64>) -> Option<i64> {
        order.filter(|order| self.lane().is_none() || self.taking_over.done != Some(*order))
    }

    /// Notes that it has taken over.
    pub(crate) fn has_taken_over(&mut self) -> Result<(), Aborted> {
        if !self.is_told_to_take_over() {
            return Ok(());
        }
        let (number, lane) = self.whose();
        let order = self.row().and_then(|row| row.take_over);
        match lane {
            None => {
                if let Some(order) = order {
                    process::transaction(|| backends::forget_take_over(number, order))?;
                }
            }
            // The order of its row stays until all lanes have carried it out.
            Some(hash_slot) => {
                if self.taking_over.is_owed {
                    process::transaction(|| former_lanes::forget(number, hash_slot))?;
                    self.taking_over.is_owed = false;
                }
                self.taking_over.done = order.or(self.taking_over.done);
            }
        }
        if let Some(row) = self.duty.row_mut() {
            row.take_over = None;
        }
        Ok(())
    }

    /// Whether another server has taken over from it.
    fn is_fenced(&self) -> bool {
        let trouble = self.delivery.trouble().filter(|_| !self.recovery.has_claimed());
        trouble.is_some_and(|failure| failure.trouble.class() == Class::Fenced)
    }
}

/// Goes on with orders to the lanes of a cluster's backend. `index`: its finder.
pub(crate) fn finish_lanes(backends: &mut [Backend], index: usize) -> Result<(), Aborted> {
    let finder = &backends[index];
    let number = finder.number;
    let mut lanes = backends.iter().filter(|b| b.number == number && b.lane().is_some());
    let asks = |b: &Backend| b.row().is_some_and(|row| row.take_over.is_some());
    match finder.row().and_then(|row| row.take_over) {
        Some(order) if finder.taking_over.done != Some(order) => {
            process::transaction(|| former_lanes::take_over(number))?;
            backends[index].taking_over = TakingOver {
                done: Some(order),
                is_owed: true,
            };
        }
        Some(_) if !lanes.any(asks) => backends[index].has_taken_over()?,
        None if finder.taking_over.is_owed && lanes.any(Backend::is_fenced) => {
            process::transaction(|| former_lanes::forget_take_overs(number))?;
            let its = backends.iter_mut().filter(|b| b.number == number);
            its.for_each(|b| b.taking_over.is_owed = false);
        }
        _ => {}
    }
    Ok(())
}
