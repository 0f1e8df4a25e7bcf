//! Inserts rows so that they behave like any INSERT for everybody else.
//!
//! As long as the table is as the extension made it, a row is inserted directly: a tuple and its index entries, no
//! plan. This is the fast way. If the table's owner has added a trigger, a constraint, a generated column, a column, a
//! rule or a policy, the row goes through rewriter, planner and executor as an INSERT statement, so that all of these
//! apply to it as to any other row.
//!
//! Both ways run with the caller's rights: other people's triggers, policies and expressions run with the publisher's
//! rights, as in a plain INSERT, and never with more. Two rights are checked for the tables' owner instead, because
//! publishing needs only EXECUTE: the right to insert into the table, and the right to look up its name in the schema.
//!
//! An ERROR of other people's code passes through here unchanged, by Postgres's own longjmp. Therefore the functions
//! that it may cross hold nothing that needs to be dropped. They call Postgres without pgrx's guards, which would keep
//! only a part of the error.

mod statement;
mod straight;

use crate::tables::catalog::Relations;
use crate::tables::insertion::statement::Statement;
use crate::tables::insertion::straight::Straight;
use crate::tables::row::attribute;
use crate::tables::trusted::{self, NewRow};
use pgrx::pg_sys;

/// Columns that may be null; all columns before them are always set.
const NULLABLE: std::ops::Range<usize> = attribute::DATA - 1..attribute::COUNT;

// SAFETY: the declarations of Postgres's headers. Without pgrx's guards: see above.
unsafe extern "C-unwind" {
    fn table_open(relation: pg_sys::Oid, lock: pg_sys::LOCKMODE) -> pg_sys::Relation;
    fn table_close(relation: pg_sys::Relation, lock: pg_sys::LOCKMODE);
}

/// One of our tables, open for inserting. It is plain memory of the current context. What it has opened is closed by
/// `close`, or released by the transaction's abort.
#[derive(Clone, Copy)]
pub(crate) struct Insertion {
    relation: pg_sys::Relation,
    path: Path,
}

#[derive(Clone, Copy)]
enum Path {
    /// The table is as the extension made it.
    Straight(Straight),
    Statement(Statement),
}

impl Insertion {
    /// # Safety
    /// Within a transaction; no frame up to Postgres's holds anything that needs to be dropped.
    pub(crate) unsafe fn open(relations: &Relations, is_scheduled: bool) -> Self {
        let (table, columns) = match is_scheduled {
            true => (relations.scheduled, attribute::SCHEDULED_AT),
            false => (relations.events, attribute::COUNT),
        };
        // SAFETY: the caller's promise. The lock is taken, so nobody changes the table from here on.
        unsafe {
            let relation = table_open(table, pg_sys::RowExclusiveLock as pg_sys::LOCKMODE);
            let path = match is_ours_alone(relation, columns, &relations.triggers) {
                true => Path::Straight(Straight::open(relation)),
                false => Path::Statement(Statement::plan(relation, is_scheduled)),
            };
            Self { relation, path }
        }
    }

    /// Inserts a row. False: a trigger or rule has left it out.
    ///
    /// # Safety
    /// As [`Self::open`]; a row of the table that was opened.
    pub(crate) unsafe fn insert(&self, row: &NewRow) -> bool {
        // SAFETY: the caller's promise.
        unsafe {
            match self.path {
                Path::Straight(straight) => {
                    straight.insert(self.relation, row);
                    true
                }
                Path::Statement(statement) => {
                    let before = trusted::inserting(row.key);
                    let inserted = statement.insert(self.relation, row);
                    trusted::inserting_again(before);
                    inserted
                }
            }
        }
    }

    /// # Safety
    /// May be called once.
    pub(crate) unsafe fn close(self) {
        // SAFETY: closes what open() has opened; the lock is kept until the end of the transaction, as for any writer.
        unsafe {
            if let Path::Straight(straight) = self.path {
                straight.close();
            }
            table_close(self.relation, pg_sys::NoLock as pg_sys::LOCKMODE);
        }
    }
}

/// Whether a table is as the extension made it, as far as INSERT is concerned. It checks a few flags, and identifies
/// triggers by their functions: see [`Relations`].
///
/// # Safety
/// An open relation.
unsafe fn is_ours_alone(relation: pg_sys::Relation, columns: usize, ours: &[pg_sys::Oid]) -> bool {
    // SAFETY: the caller's promise; an open relation has all of these.
    unsafe {
        let class = &*(*relation).rd_rel;
        let is_plain = class.relkind as u8 == pg_sys::RELKIND_RELATION
            && !class.relispartition
            && !class.relrowsecurity
            && (*relation).rd_rules.is_null();
        let descriptor = (*relation).rd_att;
        let is_shaped = (*descriptor).natts as usize == columns
            && !NULLABLE.into_iter().any(|index| is_not_null(descriptor, index))
            && !has_constraints((*descriptor).constr);
        is_plain && is_shaped && !has_other_triggers((*relation).trigdesc, ours)
    }
}

/// # Safety
/// A valid descriptor and the index of one of its columns (from 0).
unsafe fn is_not_null(descriptor: pg_sys::TupleDesc, index: usize) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        #[cfg(feature = "pg18")]
        let attribute = pg_sys::TupleDescAttr(descriptor, index as i32);
        #[cfg(not(feature = "pg18"))]
        let attribute = (*descriptor).attrs.as_ptr().add(index);
        (*attribute).attnotnull
    }
}

/// Whether there are CHECK constraints or generated columns. (Our own columns are never null in our rows.)
///
/// # Safety
/// A descriptor's constraints, or null.
unsafe fn has_constraints(constraints: *const pg_sys::TupleConstr) -> bool {
    // SAFETY: the caller's promise.
    let Some(constraints) = (unsafe { constraints.as_ref() }) else {
        return false;
    };
    #[cfg(feature = "pg18")]
    if constraints.has_generated_virtual {
        return true;
    }
    constraints.num_check > 0 || constraints.has_generated_stored
}

/// Whether other triggers would fire for an INSERT. Those of foreign keys and deferred constraints count too.
///
/// # Safety
/// A relation's triggers, or null.
pub(crate) unsafe fn has_other_triggers(triggers: *const pg_sys::TriggerDesc, ours: &[pg_sys::Oid]) -> bool {
    // SAFETY: the caller's promise; the array has the stated length.
    unsafe {
        let Some(triggers) = triggers.as_ref() else {
            return false;
        };
        let triggers = std::slice::from_raw_parts(triggers.triggers, triggers.numtriggers as usize);
        triggers.iter().any(|trigger| {
            trigger.tgtype as u32 & pg_sys::TRIGGER_TYPE_INSERT != 0
                && trigger.tgenabled as u8 != pg_sys::TRIGGER_DISABLED
                && !ours.contains(&trigger.tgfoid)
        })
    }
}
