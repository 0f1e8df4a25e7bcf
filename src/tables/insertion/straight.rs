//! The fast way: inserts a row directly into a table that is as the extension made it, and into its indexes.

use crate::tables::trusted::NewRow;
use pgrx::pg_sys;

// SAFETY: the declarations of Postgres's headers. Without pgrx's guards: see the module above.
unsafe extern "C-unwind" {
    fn table_slot_create(relation: pg_sys::Relation, list: *mut *mut pg_sys::List) -> *mut pg_sys::TupleTableSlot;
    fn palloc0(size: usize) -> *mut std::ffi::c_void;
    fn CreateExecutorState() -> *mut pg_sys::EState;
    fn FreeExecutorState(estate: *mut pg_sys::EState);
    fn InitResultRelInfo(
        result: *mut pg_sys::ResultRelInfo,
        relation: pg_sys::Relation,
        index: pg_sys::Index,
        root: *mut pg_sys::ResultRelInfo,
        options: i32,
    );
    fn ExecOpenIndices(result: *mut pg_sys::ResultRelInfo, speculative: bool);
    fn ExecCloseIndices(result: *mut pg_sys::ResultRelInfo);
    fn ExecStoreVirtualTuple(tuple_slot: *mut pg_sys::TupleTableSlot) -> *mut pg_sys::TupleTableSlot;
    fn ExecDropSingleTupleTableSlot(tuple_slot: *mut pg_sys::TupleTableSlot);
    #[cfg(feature = "pg15")]
    fn ExecInsertIndexTuples(
        result: *mut pg_sys::ResultRelInfo,
        tuple_slot: *mut pg_sys::TupleTableSlot,
        estate: *mut pg_sys::EState,
        update: bool,
        no_duplicate_error: bool,
        conflict: *mut bool,
        arbiters: *mut pg_sys::List,
    ) -> *mut pg_sys::List;
    #[cfg(not(feature = "pg15"))]
    fn ExecInsertIndexTuples(
        result: *mut pg_sys::ResultRelInfo,
        tuple_slot: *mut pg_sys::TupleTableSlot,
        estate: *mut pg_sys::EState,
        update: bool,
        no_duplicate_error: bool,
        conflict: *mut bool,
        arbiters: *mut pg_sys::List,
        only_summarizing: bool,
    ) -> *mut pg_sys::List;
    fn GetCurrentCommandId(used: bool) -> pg_sys::CommandId;
}

/// What the executor needs for a table. Plain memory of the current context.
#[derive(Clone, Copy)]
pub(super) struct Straight {
    estate: *mut pg_sys::EState,
    result: *mut pg_sys::ResultRelInfo,
    tuple_slot: *mut pg_sys::TupleTableSlot,
}

impl Straight {
    /// # Safety
    /// As [`super::Insertion::open`]; an open relation.
    pub(super) unsafe fn open(relation: pg_sys::Relation) -> Self {
        // SAFETY: the executor's own steps.
        unsafe {
            let estate = CreateExecutorState();
            let result = palloc0(size_of::<pg_sys::ResultRelInfo>()).cast::<pg_sys::ResultRelInfo>();
            InitResultRelInfo(result, relation, 0, std::ptr::null_mut(), 0);
            ExecOpenIndices(result, false);
            let tuple_slot = table_slot_create(relation, std::ptr::null_mut());
            Self {
                estate,
                result,
                tuple_slot,
            }
        }
    }

    /// # Safety
    /// As [`super::Insertion::insert`], for the table that was opened.
    pub(super) unsafe fn insert(&self, relation: pg_sys::Relation, row: &NewRow) {
        let tuple_slot = self.tuple_slot;
        // SAFETY: the executor's own steps for one row. The arrays of the tuple slot are as long as its descriptor,
        // which was checked. The tuple slot and the table always have these functions.
        unsafe {
            let columns = (*(*relation).rd_att).natts as usize;
            if let Some(clear) = (*(*tuple_slot).tts_ops).clear {
                clear(tuple_slot);
            }
            (*tuple_slot)
                .tts_values
                .copy_from_nonoverlapping(row.values.as_ptr(), columns);
            (*tuple_slot)
                .tts_isnull
                .copy_from_nonoverlapping(row.nulls.as_ptr(), columns);
            ExecStoreVirtualTuple(tuple_slot);
            let command = GetCurrentCommandId(true);
            if let Some(insert) = (*(*relation).rd_tableam).tuple_insert {
                insert(relation, tuple_slot, command, 0, std::ptr::null_mut());
            }
            let (none, arbiters) = (std::ptr::null_mut(), std::ptr::null_mut());
            #[cfg(feature = "pg15")]
            ExecInsertIndexTuples(self.result, tuple_slot, self.estate, false, false, none, arbiters);
            #[cfg(not(feature = "pg15"))]
            ExecInsertIndexTuples(
                self.result,
                tuple_slot,
                self.estate,
                false,
                false,
                none,
                arbiters,
                false,
            );
        }
    }

    /// # Safety
    /// May be called once.
    pub(super) unsafe fn close(self) {
        // SAFETY: closes what open() has opened.
        unsafe {
            ExecDropSingleTupleTableSlot(self.tuple_slot);
            ExecCloseIndices(self.result);
            FreeExecutorState(self.estate);
        }
    }
}
