//! Bytes that begin on a cache line and, when there are many, lie in large pages: a stream of weights
//! then costs few translations and the hardware prefetcher does not stop every 4 KiB.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a large page.
const PAGE: usize = 2 << 20;

/// A fixed number of bytes, zero at first.
pub(crate) struct Buffer {
    start: *mut u8,
    len: usize,
}

// SAFETY: a buffer owns its bytes, which are plain data.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zeros.
    pub(crate) fn new(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout is never empty.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        // Before the first touch; what is less than a page long stays in small ones.
        #[cfg(target_os = "linux")]
        if len >= PAGE {
            // SAFETY: whole pages within the block that was just allocated; the advice changes no byte.
            // Failure leaves small pages, which is all right.
            unsafe { libc::madvise(start.cast(), len / PAGE * PAGE, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: the block has at least `len` bytes.
        unsafe { start.write_bytes(0, len) };
        Self { start, len }
    }

    fn layout(len: usize) -> Layout {
        let align = if len >= PAGE { PAGE } else { LINE };
        Layout::from_size_align(len.max(1), align).expect("lengths are those of weights in memory")
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.start, Self::layout(self.len)) };
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes were allocated and initialised in `new`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
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
    fn buffers_are_zero_and_aligned() {
        for len in [0, 1, 100, PAGE, PAGE + 3] {
            let mut buffer = Buffer::new(len);
            assert_eq!(buffer.len(), len);
            assert!(buffer.iter().all(|&byte| byte == 0));
            assert_eq!(buffer.as_ptr().align_offset(LINE), 0);
            buffer.fill(1);
        }
    }
}
