//! Read-only maps of files, with pages that can be given back. The only unsafe code of this crate.

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
