//! Bytes that begin on a cache line and lie in large pages: a stream of weights then costs few
//! translations and the hardware prefetcher does not stop every 4 KiB.
//!
//! Buffers of up to half an [`ARENA`] share arenas, so that small weights lie in large pages too. An
//! arena is given back with the last buffer in it.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a large page.
const PAGE: usize = 2 << 20;
/// Bytes of an arena; only what is touched takes memory.
const ARENA: usize = 64 << 20;

/// A block of the system's memory.
struct Arena {
    start: *mut u8,
    len: usize,
}

// SAFETY: an arena is a block of memory; who uses which part of it is settled in `Buffer::new`.
unsafe impl Send for Arena {}
// SAFETY: as above.
unsafe impl Sync for Arena {}

impl Arena {
    fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is never empty.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        // Before the first touch.
        #[cfg(target_os = "linux")]
        if len >= PAGE {
            // SAFETY: whole pages within the block that was just allocated; the advice changes no byte.
            // Failure leaves small pages, which is all right.
            unsafe { libc::madvise(start.cast(), len / PAGE * PAGE, libc::MADV_HUGEPAGE) };
        }
        Self { start, len }
    }

    fn layout(len: usize) -> Layout {
        let align = if len >= PAGE { PAGE } else { LINE };
        Layout::from_size_align(len.max(1), align).expect("lengths are those of weights in memory")
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.start, Self::layout(self.len)) };
    }
}

/// The arena that is being filled, and the bytes of it that are taken.
static FILLING: Mutex<(Weak<Arena>, usize)> = Mutex::new((Weak::new(), 0));

/// A fixed number of bytes, zero at first.
pub(crate) struct Buffer {
    arena: Arc<Arena>,
    offset: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeros.
    pub(crate) fn new(len: usize) -> Self {
        let (arena, offset) = Self::place(len);
        let buffer = Self { arena, offset, len };
        // SAFETY: the arena has `len` bytes from `offset` on, which are this buffer's alone.
        unsafe { buffer.start().write_bytes(0, len) };
        buffer
    }

    fn place(len: usize) -> (Arc<Arena>, usize) {
        if len > ARENA / 2 {
            return (Arc::new(Arena::new(len)), 0);
        }
        // Tests and passes prepare one small weight after the other; those share nothing.
        let taken = len.next_multiple_of(LINE);
        let mut filling = FILLING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(arena) = filling.0.upgrade()
            && filling.1 + taken <= arena.len
        {
            let offset = filling.1;
            filling.1 += taken;
            return (arena, offset);
        }
        let arena = Arc::new(Arena::new(ARENA));
        *filling = (Arc::downgrade(&arena), taken);
        (arena, 0)
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: the offset lies within the arena.
        unsafe { self.arena.start.add(self.offset) }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        let mut buffer = Self::new(self.len);
        buffer.copy_from_slice(self);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes were initialised in `new` and are this buffer's.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_and_aligned_and_do_not_overlap() {
        let mut buffers: Vec<Buffer> = Vec::new();
        for (value, len) in [0, 1, 100, PAGE, PAGE + 3, ARENA / 2 + 1, 64].into_iter().enumerate() {
            let mut buffer = Buffer::new(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&byte| byte == 0));
            assert_eq!(buffer.as_ptr().align_offset(LINE), 0);
            buffer.fill(value as u8 + 1);
            buffers.push(buffer);
        }
        for (value, buffer) in buffers.iter().enumerate() {
            assert!(buffer.iter().all(|&byte| byte == value as u8 + 1));
        }
    }
}
