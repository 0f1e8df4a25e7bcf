//! Backends that are paused: their readers pass rows of others, and nothing else.

use crate::model::likely;
use crate::{Member, Mutant, World, said_of};
use relay::reading::range::Position;
use relay::reading::role::Role;
use relay::reading::schedule::Group;
use std::sync::Arc;

impl World {
    /// Pauses some backends, and lets others go on.
    pub(crate) fn pause(&mut self) {
        for member in &mut self.members {
            let may = matches!(member.role, Role::Redis | Role::Finder);
            member.is_paused ^= may && likely(&mut self.rng, 0.1);
        }
    }

    /// The readers of those that are paused pass rows of others.
    pub(crate) fn pass_by(&mut self, steps: usize, aborts: f64) -> Result<(), String> {
        let may = |m: &Member| m.is_paused && m.delivery.may_pass_by() && m.way(&self.latest).leads_on();
        let mut waiting: Vec<usize> = (0..self.members.len())
            .filter(|index| may(&self.members[*index]))
            .collect();
        while let Some(group) = Group::take(&mut waiting, |index| self.members[index].way(&self.latest)) {
            let readers = self.pass(&group, steps, true);
            if likely(&mut self.rng, aborts) {
                continue;
            }
            for mut reader in readers {
                if reader.is_stopped && self.mutant == Mutant::PassesItsOwn {
                    let (from, to) = (reader.end.from.clone(), reader.end.to(&self.latest).clone());
                    reader.end = Position::towards(from, to, reader.end.place() + 1);
                }
                let has_any = reader.found.is_some() || !reader.skipped.is_empty() || !reader.records.is_empty();
                if has_any || !reader.built.is_empty() {
                    return Err("a paused backend has taken a row".to_owned());
                }
                self.hand_over(reader)?;
            }
            self.check_positions()?;
        }
        Ok(())
    }
}

#[test]
fn the_oracle_catches_a_paused_backend_that_passes_its_own_row() {
    let said = said_of(Mutant::PassesItsOwn);
    let says = ["is covered: true", "is lost", "which has no lane"];
    assert!(says.iter().any(|says| said.contains(says)), "{said}");
}

#[test]
fn a_paused_backend_comes_up_to_its_first_row_and_not_beyond() {
    let mut world = World::new(1, Mutant::None);
    world.members.retain(|m| m.role == Role::Redis);
    let (others, paused) = (0, 1);
    world.members[paused].is_paused = true;
    for streams in [&[0; 50][..], &[0, 0, 1, 0]] {
        (0..3).for_each(|_| world.database.publish(streams));
        world.latest = Arc::new(world.database.quiet_tick());
        while !world.is_through(others) {
            world.round(50, 0.0).expect("all is well");
            world.hear();
        }
        for _ in 0..10 {
            world.pass_by(50, 0.0).expect("all is well");
        }
    }
    assert_eq!(world.members[paused].delivery.acked().last_seq(), 152);
    assert!(world.members[paused].sent.is_empty());
}
