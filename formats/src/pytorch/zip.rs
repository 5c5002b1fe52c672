//! The directory of a ZIP archive (PKWARE APPNOTE 6.3.10) in memory: end record 4.3.16, its 64-bit form
//! 4.3.14 and locator 4.3.15, directory entries 4.3.12, local headers 4.3.7. Stored entries only.

use std::collections::BTreeMap;

use crate::brief;

/// Names and places of the entries.
#[derive(Debug)]
pub(super) struct Archive<'a> {
    file: &'a [u8],
    entries: BTreeMap<&'a str, Place>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    /// Of the local header.
    offset: u64,
    size: u64,
    /// Neither compressed nor encrypted.
    plain: bool,
}

const END: [u8; 4] = *b"PK\x05\x06";
const LOCATOR_64: [u8; 4] = *b"PK\x06\x07";
const END_64: [u8; 4] = *b"PK\x06\x06";
const ENTRY: [u8; 4] = *b"PK\x01\x02";
const LOCAL: [u8; 4] = *b"PK\x03\x04";
/// Length of an end record without comment, and of the longest comment.
const END_LENGTH: usize = 22;
const MAX_COMMENT: usize = 65_535;

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    let b = bytes.get(at..)?.first_chunk::<2>()?;
    Some(usize::from(u16::from_le_bytes(*b)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u64> {
    let b = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u64::from(u32::from_le_bytes(*b)))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk::<8>()?))
}

impl<'a> Archive<'a> {
    /// Reads the directory. Names are borrowed; memory is 100 bytes an entry (which takes 47 in the file)
    /// at most.
    pub(super) fn read(file: &'a [u8]) -> Result<Self, String> {
        let damaged = |what: &str| format!("the ZIP archive is damaged or truncated: {what}");
        let tail = file.len().saturating_sub(END_LENGTH + MAX_COMMENT);
        let end = (tail..=file.len().saturating_sub(END_LENGTH))
            .rev()
            .find(|&at| file[at..].starts_with(&END))
            .ok_or_else(|| damaged("no end record; is this a file of torch.save?"))?;
        let record = &file[end..];
        let mut count = u16_at(record, 10).unwrap_or(0) as u64;
        let mut size = u32_at(record, 12).unwrap_or(0);
        let mut offset = u32_at(record, 16).unwrap_or(0);
        if let Some(locator) = end.checked_sub(20).map(|at| &file[at..end])
            && locator.starts_with(&LOCATOR_64)
        {
            let record = u64_at(locator, 8)
                .and_then(|at| file.get(usize::try_from(at).ok()?..))
                .filter(|record| record.starts_with(&END_64));
            let field = |at| record.and_then(|record| u64_at(record, at));
            let (Some(c), Some(s), Some(o)) = (field(32), field(40), field(48)) else {
                return Err(damaged("no 64-bit end record"));
            };
            (count, size, offset) = (c, s, o);
        }
        let directory = usize::try_from(offset)
            .ok()
            .and_then(|at| file.get(at..)?.get(..usize::try_from(size).ok()?))
            .ok_or_else(|| damaged("the directory lies outside"))?;
        let mut entries = BTreeMap::new();
        let mut rest = directory;
        while !rest.is_empty() {
            let (name, place, length) =
                entry(rest).ok_or_else(|| damaged("an entry of the directory is malformed"))?;
            if entries.insert(name, place).is_some() {
                return Err(format!("the ZIP archive holds {} twice", brief(name)));
            }
            rest = &rest[length..];
        }
        if entries.len() as u64 != count {
            return Err(damaged("the directory has another number of entries than its end record"));
        }
        Ok(Self { file, entries })
    }

    /// All names, sorted.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.entries.keys().copied()
    }

    /// The first entry that is compressed or encrypted.
    pub(super) fn packed(&self) -> Option<&'a str> {
        self.entries.iter().find(|(_, place)| !place.plain).map(|(name, _)| *name)
    }

    /// First byte and bytes of an entry, `None` when there is none of this name.
    pub(super) fn get(&self, name: &str) -> Result<Option<(usize, &'a [u8])>, String> {
        let Some(place) = self.entries.get(name) else { return Ok(None) };
        if !place.plain {
            return Err(format!("entry {} is compressed or encrypted", brief(name)));
        }
        let found = || {
            let at = usize::try_from(place.offset).ok()?;
            let local = self.file.get(at..)?;
            if !local.starts_with(&LOCAL) {
                return None;
            }
            let start = at
                .checked_add(30)?
                .checked_add(u16_at(local, 26)?)?
                .checked_add(u16_at(local, 28)?)?;
            let bytes = self.file.get(start..)?.get(..usize::try_from(place.size).ok()?)?;
            Some((start, bytes))
        };
        found().map(Some).ok_or_else(|| {
            format!("entry {} lies outside of the file; it is truncated", brief(name))
        })
    }
}

/// Name, place and length of the directory entry that `bytes` begin with.
fn entry(bytes: &[u8]) -> Option<(&str, Place, usize)> {
    if !bytes.starts_with(&ENTRY) {
        return None;
    }
    let (flags, method) = (u16_at(bytes, 8)?, u16_at(bytes, 10)?);
    let (mut packed, mut size) = (u32_at(bytes, 20)?, u32_at(bytes, 24)?);
    let mut offset = u32_at(bytes, 42)?;
    let name_end = 46 + u16_at(bytes, 28)?;
    let extra_end = name_end + u16_at(bytes, 30)?;
    let end = extra_end + u16_at(bytes, 32)?;
    let name = std::str::from_utf8(bytes.get(46..name_end)?).ok()?;
    bytes.get(..end)?;
    // The 64-bit field (4.5.3) holds those of size, packed size and offset that are all ones above.
    let mut extra = bytes.get(name_end..extra_end)?;
    while extra.len() >= 4 {
        let (id, length) = (u16_at(extra, 0)?, u16_at(extra, 2)?);
        let mut field = extra.get(4..4 + length)?;
        extra = &extra[4 + length..];
        if id == 1 {
            for value in [&mut size, &mut packed, &mut offset] {
                if *value == u64::from(u32::MAX) {
                    *value = u64_at(field, 0)?;
                    field = &field[8..];
                }
            }
        }
    }
    let plain = method == 0 && flags & 1 == 0 && packed == size;
    Some((name, Place { offset, size, plain }, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One stored entry whose directory says everything in 64 bits.
    fn archive_64(name: &str, data: &[u8]) -> Vec<u8> {
        let ones = u32::MAX.to_le_bytes();
        let mut out = LOCAL.to_vec();
        out.extend([0; 22]);
        out.extend((name.len() as u16).to_le_bytes());
        out.extend([0; 2]);
        out.extend(name.as_bytes());
        out.extend(data);
        let directory = out.len() as u64;
        out.extend(ENTRY);
        out.extend([0; 16]);
        out.extend(ones);
        out.extend(ones);
        out.extend((name.len() as u16).to_le_bytes());
        out.extend(28u16.to_le_bytes());
        out.extend([0; 10]);
        out.extend(ones);
        out.extend(name.as_bytes());
        out.extend([1, 0, 24, 0]);
        for value in [data.len() as u64, data.len() as u64, 0] {
            out.extend(value.to_le_bytes());
        }
        let end = out.len() as u64;
        out.extend(END_64);
        out.extend([0; 28]);
        for value in [1, end - directory, directory] {
            out.extend(value.to_le_bytes());
        }
        out.extend(LOCATOR_64);
        out.extend([0; 4]);
        out.extend(end.to_le_bytes());
        out.extend([0; 4]);
        out.extend(END);
        out.extend([0xff; 16]);
        out.extend([0; 2]);
        out
    }

    #[test]
    fn directories_of_64_bits_are_read() {
        let file = archive_64("a/data.pkl", b"hello");
        let archive = Archive::read(&file).unwrap();
        assert_eq!(archive.names().collect::<Vec<_>>(), ["a/data.pkl"]);
        assert_eq!(archive.get("a/data.pkl").unwrap().unwrap().1, b"hello");
        assert!(archive.get("b").unwrap().is_none());
        let mut far = file.clone();
        let at = file.windows(4).position(|w| w == [1, 0, 24, 0]).unwrap() + 4;
        far[at..at + 16].fill(0xff);
        let error = Archive::read(&far).unwrap().get("a/data.pkl").unwrap_err();
        assert!(error.contains("truncated"), "{error}");
        assert!(Archive::read(&file[..file.len() - 1]).is_err());
        assert!(Archive::read(b"").is_err());
    }
}
