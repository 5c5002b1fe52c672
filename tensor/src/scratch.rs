//! Numbers that lie in memory or, when memory is short, in an anonymous scratch file with positioned reads
//! and writes. Algorithms are written once against [`Shelf`]; where the numbers lie does not change bits.

use std::{fs::File, io, os::unix::fs::FileExt, sync::Arc};

use bytemuck::Pod;

type Open = dyn Fn() -> io::Result<File> + Send + Sync;

/// Opens anonymous scratch files.
#[derive(Clone)]
pub struct Scratch(Arc<Open>);

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scratch")
    }
}

impl Scratch {
    /// Scratch files come from `open`.
    pub fn new(open: impl Fn() -> io::Result<File> + Send + Sync + 'static) -> Self {
        Self(Arc::new(open))
    }

    /// A new, empty file.
    ///
    /// # Errors
    /// When the place for scratch files refuses.
    pub fn open(&self) -> io::Result<File> {
        (self.0)()
    }
}

/// A fixed number of elements, zero at first.
#[derive(Debug)]
pub struct Shelf<T> {
    length: usize,
    place: Place<T>,
}

#[derive(Debug)]
enum Place<T> {
    Memory(Vec<T>),
    File(File),
}

impl<T: Pod> Shelf<T> {
    /// `length` zeros, in a scratch file when one is given.
    ///
    /// # Errors
    /// When the scratch file cannot be opened or sized.
    pub fn new(length: usize, scratch: Option<&Scratch>) -> io::Result<Self> {
        let place = match scratch {
            None => Place::Memory(vec![T::zeroed(); length]),
            Some(scratch) => {
                let file = scratch.open()?;
                file.set_len((length * size_of::<T>()) as u64)?;
                Place::File(file)
            }
        };
        Ok(Self { length, place })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.length
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Bytes held in memory.
    pub fn resident_bytes(&self) -> usize {
        match &self.place {
            Place::Memory(values) => values.len() * size_of::<T>(),
            Place::File(_) => 0,
        }
    }

    /// Copies out the elements from `at` on.
    ///
    /// # Errors
    /// When the scratch file cannot be read.
    pub fn read(&self, at: usize, out: &mut [T]) -> io::Result<()> {
        match &self.place {
            Place::Memory(values) => {
                out.copy_from_slice(&values[at..at + out.len()]);
                Ok(())
            }
            Place::File(file) => {
                file.read_exact_at(bytemuck::cast_slice_mut(out), (at * size_of::<T>()) as u64)
            }
        }
    }

    /// Stores elements from `at` on.
    ///
    /// # Errors
    /// When the scratch file cannot be written (disk full).
    pub fn write(&mut self, at: usize, values: &[T]) -> io::Result<()> {
        match &mut self.place {
            Place::Memory(all) => {
                all[at..at + values.len()].copy_from_slice(values);
                Ok(())
            }
            Place::File(file) => {
                file.write_all_at(bytemuck::cast_slice(values), (at * size_of::<T>()) as u64)
            }
        }
    }

    /// The `length` elements from `at` on: borrowed when they lie in memory, else read into `buffer`.
    ///
    /// # Errors
    /// As [`Shelf::read`].
    pub fn span<'a>(
        &'a self,
        at: usize,
        length: usize,
        buffer: &'a mut Vec<T>,
    ) -> io::Result<&'a [T]> {
        if let Place::Memory(values) = &self.place {
            return Ok(&values[at..at + length]);
        }
        buffer.resize(length, T::zeroed());
        self.read(at, buffer)?;
        Ok(buffer)
    }

    /// Changes the `length` elements from `at` on in place: through `buffer` when they lie in a file.
    ///
    /// # Errors
    /// As [`Shelf::read`] and [`Shelf::write`].
    pub fn update(
        &mut self,
        at: usize,
        length: usize,
        buffer: &mut Vec<T>,
        change: impl FnOnce(&mut [T]),
    ) -> io::Result<()> {
        if let Place::Memory(values) = &mut self.place {
            change(&mut values[at..at + length]);
            return Ok(());
        }
        buffer.resize(length, T::zeroed());
        self.read(at, buffer)?;
        change(buffer);
        self.write(at, buffer)
    }

    /// A shelf of `length` elements in the scratch file of this one, of any content: pages that the system has for
    /// a file already are written much faster than new ones. `None` when this one lies in memory.
    ///
    /// # Errors
    /// When the scratch file cannot be sized.
    pub fn reuse(self, length: usize) -> io::Result<Option<Self>> {
        let Place::File(file) = self.place else { return Ok(None) };
        let bytes = (length * size_of::<T>()) as u64;
        if file.metadata()?.len() < bytes {
            file.set_len(bytes)?;
        }
        Ok(Some(Self { length, place: Place::File(file) }))
    }

    /// True when the elements lie in a scratch file.
    pub fn on_scratch(&self) -> bool {
        matches!(self.place, Place::File(_))
    }

    /// Forgets the elements from `length` on and gives their memory back; what lies in a file stays there.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        if let Place::Memory(values) = &mut self.place {
            values.truncate(length);
            values.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_what_memory_holds() {
        let scratch = Scratch::new(tempfile::tempfile);
        let mut memory = Shelf::<f64>::new(10, None).unwrap();
        let mut file = Shelf::<f64>::new(10, Some(&scratch)).unwrap();
        assert_eq!((memory.resident_bytes(), file.resident_bytes()), (80, 0));
        let mut buffer = Vec::new();
        for shelf in [&mut memory, &mut file] {
            shelf.write(3, &[1.0, 2.0, 3.0]).unwrap();
            shelf.update(4, 3, &mut buffer, |values| values[2] += 0.5).unwrap();
            shelf.truncate(8);
        }
        for at in 0..6 {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            assert_eq!(memory.span(at, 2, &mut a).unwrap(), file.span(at, 2, &mut b).unwrap());
        }
        assert_eq!((memory.len(), file.len(), memory.resident_bytes()), (8, 8, 64));
        assert!(memory.reuse(3).unwrap().is_none());
        let mut file = file.reuse(20).unwrap().unwrap();
        file.write(18, &[7.0, 8.0]).unwrap();
        assert_eq!(file.span(18, 2, &mut buffer).unwrap(), [7.0, 8.0]);
        assert_eq!(file.reuse(2).unwrap().unwrap().len(), 2);
    }

    #[test]
    fn a_place_that_refuses_is_an_error() {
        let full = Scratch::new(|| Err(io::Error::from(io::ErrorKind::StorageFull)));
        let error = Shelf::<f32>::new(4, Some(&full)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
