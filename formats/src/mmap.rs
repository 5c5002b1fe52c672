//! Memory and the operating system: read-only maps of files, with pages that can be given back, and an
//! allocator that gives freed memory back. The only unsafe code of this crate.

use std::{fs::File, io};

use memmap2::Mmap;

/// A mapped file.
#[derive(Debug)]
pub(crate) struct Map(Mmap);

impl Map {
    /// The whole of a file; an empty one is an empty map.
    pub(crate) fn open(file: &File) -> io::Result<Self> {
        // SAFETY: the map is read-only and private to this process. A file that another process
        // truncates while it is mapped raises SIGBUS, as for every tool that maps checkpoints.
        unsafe { Mmap::map(file) }.map(Self)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Asks the system to read a byte range ahead into its page cache; advice that may be ignored.
    pub(crate) fn prefetch(&self, start: usize, length: usize) {
        #[cfg(unix)]
        if length > 0 {
            let _ = self.0.advise_range(memmap2::Advice::WillNeed, start, length);
        }
        #[cfg(not(unix))]
        let _ = (start, length);
    }

    /// Gives the pages of a byte range back to the system; they are read again when touched.
    pub(crate) fn release(&self, start: usize, length: usize) {
        #[cfg(unix)]
        if length > 0 {
            // SAFETY: the map is a read-only file map, so dropped pages are refilled from the file
            // with the same bytes; no write can be lost.
            let _ = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, length)
            };
        }
        #[cfg(not(unix))]
        let _ = (start, length);
    }
}

/// From now on, what is freed in large pieces goes back to the system at once, so that the resident memory
/// of this process is what it uses. glibc's allocator otherwise learns from the first large piece that is freed
/// to keep pieces of up to 32 MiB for itself. Without effect on other allocators.
pub fn give_freed_memory_back() {
    /// Pieces of at least so many bytes are maps of their own.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const MAPPED: libc::c_int = 1 << 20;
    /// Free bytes kept at the end of a heap.
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const KEPT: libc::c_int = 8 << 20;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes two numbers, changes settings of the allocator under its own lock and touches no
    // memory of ours; a value that it does not like is refused by its result.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Gives the small pieces back too that were freed so far: after work that takes millions of them (reading a
/// text), and before work whose memory was predicted. Takes milliseconds. Without effect on other allocators.
pub fn give_freed_pieces_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim takes a number, works under the allocator's own locks and touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}
