//! Activations between blocks: per window `[tokens, width]` f32, in memory up to a limit, else in a
//! scratch file with positioned reads and writes.

use std::{
    io,
    sync::{Arc, Mutex},
};

use attar_tensor::{Scratch, Shelf};

/// Where activations and sums go when they do not fit.
#[derive(Debug, Clone)]
pub struct Spill {
    /// Largest stream between blocks kept in memory, bytes.
    pub limit: usize,
    /// Largest stream inside a block kept in memory, bytes.
    pub beside: usize,
    /// Sums of Hessians lie on scratch.
    pub gram: bool,
    /// Opens scratch files.
    pub scratch: Scratch,
    /// The scratch file of a stream inside a block, until the next block asks for it; shared by clones.
    pub spare: Arc<Mutex<Option<Shelf<f32>>>>,
}

impl Spill {
    /// Keeps everything in memory up to `limit` bytes each.
    pub fn above(limit: usize, scratch: Scratch) -> Self {
        Self { limit, beside: limit, gram: false, scratch, spare: Arc::default() }
    }
}

/// Activations of all windows at one place of the model.
#[derive(Debug)]
pub struct Stream {
    width: usize,
    /// First token of each window, and the end.
    starts: Vec<usize>,
    values: Shelf<f32>,
}

impl Stream {
    /// A stream of zeros for windows of the given lengths in tokens.
    ///
    /// # Errors
    /// When the scratch file cannot be opened or sized.
    pub fn new(lengths: &[usize], width: usize, spill: Option<&Spill>) -> io::Result<Self> {
        let mut starts = vec![0];
        for &length in lengths {
            starts.push(starts[starts.len() - 1] + length);
        }
        let elements = starts[starts.len() - 1] * width;
        let spill = spill.filter(|spill| elements * 4 > spill.limit);
        let values = Shelf::new(elements, spill.map(|spill| &spill.scratch))?;
        Ok(Self { width, starts, values })
    }

    /// A stream inside a block, of any content: the same windows, another width.
    ///
    /// # Errors
    /// As [`Stream::new`].
    pub fn beside(&self, width: usize, spill: Option<&Spill>) -> io::Result<Self> {
        let elements = self.tokens() * width;
        if let Some(spill) = spill.filter(|spill| elements * 4 > spill.beside) {
            let spare = spill.spare.lock().expect("nobody panics with it").take();
            if let Some(values) = spare.map(|spare| spare.reuse(elements)).transpose()?.flatten() {
                return Ok(Self { width, starts: self.starts.clone(), values });
            }
        }
        let spill = spill.map(|spill| Spill { limit: spill.beside, ..spill.clone() });
        Self::new(&self.lengths(), width, spill.as_ref())
    }

    /// A stream of the same content.
    ///
    /// # Errors
    /// As [`Stream::new`], and when either scratch file cannot be read or written.
    pub fn copy(&self, spill: &Spill) -> io::Result<Self> {
        let mut copy = Self::new(&self.lengths(), self.width, Some(spill))?;
        let mut values = Vec::new();
        for window in 0..self.windows() {
            self.read_into(window, &mut values)?;
            copy.write(window, &values)?;
        }
        Ok(copy)
    }

    /// Ends the stream; its scratch file, if it has one, serves the next one [`Stream::beside`].
    pub fn end(self, spill: Option<&Spill>) {
        if let (true, Some(spill)) = (self.values.on_scratch(), spill) {
            *spill.spare.lock().expect("nobody panics with it") = Some(self.values);
        }
    }

    /// Tokens of each window.
    pub fn lengths(&self) -> Vec<usize> {
        self.starts.windows(2).map(|pair| pair[1] - pair[0]).collect()
    }

    /// Number of windows.
    pub fn windows(&self) -> usize {
        self.starts.len() - 1
    }

    /// Tokens in all windows.
    pub fn tokens(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes held in memory.
    pub fn resident_bytes(&self) -> usize {
        self.values.resident_bytes()
    }

    /// Copies out one window `[tokens, width]`.
    ///
    /// # Errors
    /// When the scratch file cannot be read.
    pub fn read(&self, window: usize) -> io::Result<Vec<f32>> {
        let mut out = Vec::new();
        self.read_into(window, &mut out)?;
        Ok(out)
    }

    /// As [`Stream::read`], into memory that is used again.
    ///
    /// # Errors
    /// As [`Stream::read`].
    pub fn read_into(&self, window: usize, out: &mut Vec<f32>) -> io::Result<()> {
        let (start, end) = (self.starts[window] * self.width, self.starts[window + 1] * self.width);
        out.resize(end - start, 0.0);
        self.values.read(start, out)
    }

    /// One window `[tokens, width]`: borrowed when it lies in memory, else read into `buffer`.
    ///
    /// # Errors
    /// As [`Stream::read`].
    pub fn window<'a>(&'a self, window: usize, buffer: &'a mut Vec<f32>) -> io::Result<&'a [f32]> {
        let (start, end) = (self.starts[window] * self.width, self.starts[window + 1] * self.width);
        self.values.span(start, end - start, buffer)
    }

    /// Changes one window in place: through `buffer` when it lies in a scratch file, which then holds it.
    ///
    /// # Errors
    /// When the scratch file cannot be read or written.
    pub fn update(
        &mut self,
        window: usize,
        buffer: &mut Vec<f32>,
        change: impl FnOnce(&mut [f32]),
    ) -> io::Result<()> {
        let (start, end) = (self.starts[window] * self.width, self.starts[window + 1] * self.width);
        self.values.update(start, end - start, buffer, change)
    }

    /// Stores one window.
    ///
    /// # Errors
    /// When the scratch file cannot be written (disk full).
    ///
    /// # Panics
    /// When `values` is not the window's size.
    pub fn write(&mut self, window: usize, values: &[f32]) -> io::Result<()> {
        let (start, end) = (self.starts[window] * self.width, self.starts[window + 1] * self.width);
        assert_eq!(values.len(), end - start, "a window is written whole");
        self.values.write(start, values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spilled_stream_holds_what_one_in_memory_holds() {
        let spill = Spill::above(16, Scratch::new(tempfile::tempfile));
        let (lengths, width) = ([3, 1, 5], 2);
        let mut memory = Stream::new(&lengths, width, None).unwrap();
        let mut file = Stream::new(&lengths, width, Some(&spill)).unwrap();
        assert_eq!((memory.resident_bytes(), file.resident_bytes()), (9 * 2 * 4, 0));
        assert_eq!(file.read(1).unwrap(), [0.0; 2]);
        for window in [2, 0, 1] {
            let values: Vec<f32> =
                (0..lengths[window] * width).map(|i| (window * 100 + i) as f32).collect();
            memory.write(window, &values).unwrap();
            file.write(window, &values).unwrap();
        }
        for window in 0..3 {
            assert_eq!(memory.read(window).unwrap(), file.read(window).unwrap());
            let (mut a, mut b) = (Vec::new(), Vec::new());
            for stream in [&mut memory, &mut file] {
                stream.update(window, &mut a, |values| values[0] += 0.5).unwrap();
            }
            assert_eq!(
                memory.window(window, &mut a).unwrap(),
                file.window(window, &mut b).unwrap()
            );
            assert!((memory.read(window).unwrap()[1] - (window * 100 + 1) as f32).abs() < 1e-6);
        }
    }

    #[test]
    fn streams_inside_blocks_use_one_scratch_file() {
        let opened = Arc::new(Mutex::new(0));
        let count = Arc::clone(&opened);
        let open = move || {
            *count.lock().unwrap() += 1;
            tempfile::tempfile()
        };
        let spill = Spill { limit: usize::MAX, ..Spill::above(16, Scratch::new(open)) };
        let stream = Stream::new(&[2, 3], 2, Some(&spill)).unwrap();
        for (width, value) in [(4, 1.0), (8, 2.0), (4, 3.0)] {
            let mut beside = stream.beside(width, Some(&spill)).unwrap();
            for (window, tokens) in [2, 3].into_iter().enumerate() {
                beside.write(window, &vec![value; tokens * width]).unwrap();
            }
            assert_eq!(beside.read(0).unwrap(), vec![value; 2 * width]);
            assert_eq!(beside.read(1).unwrap(), vec![value; 3 * width]);
            beside.end(Some(&spill));
        }
        assert_eq!(*opened.lock().unwrap(), 1);
    }

    #[test]
    fn a_scratch_file_that_cannot_be_opened_is_an_error() {
        let full = || Err(io::Error::from(io::ErrorKind::StorageFull));
        let spill = Spill::above(0, Scratch::new(full));
        let error = Stream::new(&[4], 2, Some(&spill)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
