//! A pickle machine that executes nothing. It reads what PyTorch's `torch.save(state_dict)` writes
//! (protocols 2 to 5 of Python's `pickletools`) and knows these names, nothing else:
//!
//! - `collections.OrderedDict`, with no arguments;
//! - `torch._utils._rebuild_tensor`, `_rebuild_tensor_v2`, `_rebuild_tensor_v3`, `_rebuild_parameter`;
//! - the storage types `torch.FloatStorage`, `torch.HalfStorage`, ... and `torch.storage.UntypedStorage`;
//! - the dtypes `torch.float8_e4m3fn`, `torch.uint16`, ... that `_rebuild_tensor_v3` is given.
//!
//! Any other name is an error that says it. Objects are small copies on a stack; lists have no content
//! here and a dict's items go to one common log, so that no input makes it hold more than a fixed number
//! of bytes for each opcode it has read.

use std::collections::BTreeMap;

use attar_tensor::DType;

use crate::brief;

/// Longest pickle that is read, bytes; a hundred thousand tensors take 20 MB.
pub const MAX_PICKLE: usize = 64 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = crate::safetensors::MAX_RANK;

/// How a storage counts its elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// In elements of this type.
    Typed(DType),
    /// In bytes (`torch.storage.UntypedStorage`).
    Bytes,
}

/// One tensor of a state dict, as the pickle tells it; nothing is checked against the storage yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateTensor<'a> {
    /// Key in the state dict.
    pub name: &'a str,
    /// Element type.
    pub dtype: DType,
    /// Unit of `elements`.
    pub storage: Element,
    /// Name of the storage's entry below `data/`.
    pub key: &'a str,
    /// Claimed length of the storage.
    pub elements: usize,
    /// First element in the storage.
    pub offset: usize,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Elements between neighbours of each dimension.
    pub strides: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    OrderedDict,
    /// `_rebuild_tensor`, with or without `_v2`: dtype of the storage.
    Tensor,
    /// `_rebuild_tensor_v3`: dtype as an argument.
    TensorWithDtype,
    Parameter,
    Storage(Element),
    Dtype(DType),
}

/// A value; what is large lies elsewhere and is referred to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Object<'a> {
    None,
    Bool,
    Float,
    Int(i64),
    /// An integer of more than 64 bits.
    Long,
    Text(&'a str),
    /// Range of `items`.
    Tuple(u32, u32),
    List,
    /// Which dict; its items are in `pairs`.
    Dict(u32),
    Name(Name),
    /// Index into `storages`.
    Storage(u32),
    /// Index into `tensors`.
    Tensor(u32),
}

impl Object<'_> {
    fn kind(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a truth value",
            Self::Int(_) | Self::Long | Self::Float => "a number",
            Self::Text(_) => "a text",
            Self::Tuple(..) => "a tuple",
            Self::List => "a list",
            Self::Dict(_) => "a dict",
            Self::Name(_) => "a name",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Storage<'a> {
    element: Element,
    key: &'a str,
    elements: usize,
}

#[derive(Debug, Clone, Copy)]
struct Tensor {
    storage: u32,
    dtype: DType,
    offset: usize,
    shape: (u32, u32),
    strides: (u32, u32),
}

#[derive(Debug, Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    stack: Vec<Object<'a>>,
    marks: Vec<usize>,
    memo: BTreeMap<u32, Object<'a>>,
    items: Vec<Object<'a>>,
    /// Dict, key, value.
    pairs: Vec<(u32, &'a str, Object<'a>)>,
    dicts: u32,
    storages: Vec<Storage<'a>>,
    tensors: Vec<Tensor>,
}

/// The tensors of a pickled state dict, sorted by name. Memory taken: at most 128 bytes for each byte of
/// the pickle plus 4 KiB.
///
/// # Errors
/// When the pickle is damaged, longer than [`MAX_PICKLE`], names something unknown, or is no dict of tensors.
pub fn state_dict(pickle: &[u8]) -> Result<Vec<StateTensor<'_>>, String> {
    if pickle.len() > MAX_PICKLE {
        return Err(format!(
            "its pickle has {} bytes, more than the {MAX_PICKLE} that a state dict may take",
            pickle.len()
        ));
    }
    let mut machine = Machine { bytes: pickle, ..Machine::default() };
    let top = machine.run()?;
    let Object::Dict(top) = top else {
        return Err(format!("holds {}, not a state dict", top.kind()));
    };
    let mut found: Vec<_> = machine.pairs.iter().filter(|pair| pair.0 == top).collect();
    // A key that is set twice keeps its last value, as in Python.
    found.reverse();
    found.sort_by_key(|pair| pair.1);
    found.dedup_by_key(|pair| pair.1);
    let mut out = Vec::with_capacity(found.len());
    for &&(_, name, value) in &found {
        let Object::Tensor(tensor) = value else {
            return Err(format!(
                "`{}` holds {}, not a tensor: not a plain state dict",
                brief(name),
                value.kind()
            ));
        };
        let tensor = machine.tensors[tensor as usize];
        let storage = machine.storages[tensor.storage as usize];
        let sizes = |range| {
            machine.sizes(range).map_err(|error| format!("tensor {}: {error}", brief(name)))
        };
        out.push(StateTensor {
            name,
            dtype: tensor.dtype,
            storage: storage.element,
            key: storage.key,
            elements: storage.elements,
            offset: tensor.offset,
            shape: sizes(tensor.shape)?,
            strides: sizes(tensor.strides)?,
        });
    }
    Ok(out)
}

impl<'a> Machine<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let bytes = self.bytes.get(self.at..).and_then(|rest| rest.get(..count));
        self.at += count.min(self.bytes.len());
        bytes.ok_or_else(|| "its pickle is truncated".into())
    }

    fn number<const N: usize>(&mut self) -> Result<u64, String> {
        let mut all = [0; 8];
        all[..N].copy_from_slice(self.take(N)?);
        Ok(u64::from_le_bytes(all))
    }

    fn text(&mut self, length: u64) -> Result<&'a str, String> {
        let bytes = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        std::str::from_utf8(bytes).map_err(|_| "its pickle holds a text that is not UTF-8".into())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let end = rest.iter().position(|&b| b == b'\n').ok_or("its pickle is truncated")?;
        let text = self.text(end as u64)?;
        self.at += 1;
        Ok(text)
    }

    fn pop(&mut self) -> Result<Object<'a>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("its pickle takes from an empty stack".into());
        }
        Ok(self.stack.pop().expect("the stack was just seen not to be empty"))
    }

    fn top(&self) -> Result<Object<'a>, String> {
        self.stack.last().copied().ok_or_else(|| "its pickle reads an empty stack".into())
    }

    /// Start of the values above the last mark; the mark is gone.
    fn mark(&mut self) -> Result<usize, String> {
        self.marks.pop().ok_or_else(|| "its pickle lacks a mark".into())
    }

    /// Moves the values from `start` on into a tuple.
    fn tuple(&mut self, start: usize) {
        let from = self.items.len() as u32;
        self.items.extend_from_slice(&self.stack[start..]);
        self.stack.truncate(start);
        self.stack.push(Object::Tuple(from, self.items.len() as u32));
    }

    fn tuple_of(&mut self, count: usize) -> Result<(), String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(count).filter(|&start| start >= floor) {
            Some(start) => {
                self.tuple(start);
                Ok(())
            }
            None => Err("its pickle takes from an empty stack".into()),
        }
    }

    fn set(&mut self, dict: Object<'a>, key: Object<'a>, value: Object<'a>) -> Result<(), String> {
        match (dict, key) {
            (Object::Dict(dict), Object::Text(key)) => {
                self.pairs.push((dict, key, value));
                Ok(())
            }
            (Object::Dict(_), key) => {
                Err(format!("a key of its dict is {}, not a text", key.kind()))
            }
            (other, _) => Err(format!("its pickle sets an item of {}", other.kind())),
        }
    }

    fn dict(&mut self) -> Object<'a> {
        self.dicts += 1;
        Object::Dict(self.dicts)
    }

    fn run(&mut self) -> Result<Object<'a>, String> {
        loop {
            let place = self.at;
            let opcode = self.take(1)?[0];
            let object = match opcode {
                // PROTO, FRAME
                0x80 => {
                    let version = self.number::<1>()?;
                    if version > 5 {
                        return Err(format!(
                            "its pickle has protocol {version}, only 2 to 5 are read"
                        ));
                    }
                    continue;
                }
                0x95 => {
                    self.take(8)?;
                    continue;
                }
                // MARK, STOP, POP, POP_MARK
                b'(' => {
                    self.marks.push(self.stack.len());
                    continue;
                }
                b'.' => return self.pop(),
                b'0' => {
                    self.pop()?;
                    continue;
                }
                b'1' => {
                    let start = self.mark()?;
                    self.stack.truncate(start);
                    continue;
                }
                // NONE, NEWTRUE, NEWFALSE, BINFLOAT
                b'N' => Object::None,
                0x88 | 0x89 => Object::Bool,
                b'G' => {
                    self.take(8)?;
                    Object::Float
                }
                // BININT1, BININT2, BININT, LONG1
                b'K' => Object::Int(self.number::<1>()?.cast_signed()),
                b'M' => Object::Int(self.number::<2>()?.cast_signed()),
                b'J' => Object::Int(i64::from((self.number::<4>()? as u32).cast_signed())),
                0x8a => {
                    let length = self.number::<1>()? as usize;
                    let bytes = self.take(length)?;
                    if length > 8 {
                        Object::Long
                    } else {
                        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
                        let mut all = [if negative { 0xff } else { 0 }; 8];
                        all[..length].copy_from_slice(bytes);
                        Object::Int(i64::from_le_bytes(all))
                    }
                }
                // SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
                0x8c => {
                    let length = self.number::<1>()?;
                    Object::Text(self.text(length)?)
                }
                b'X' => {
                    let length = self.number::<4>()?;
                    Object::Text(self.text(length)?)
                }
                0x8d => {
                    let length = self.number::<8>()?;
                    Object::Text(self.text(length)?)
                }
                // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
                b')' => Object::Tuple(0, 0),
                0x85..=0x87 => {
                    self.tuple_of(usize::from(opcode - 0x84))?;
                    continue;
                }
                b't' => {
                    let start = self.mark()?;
                    self.tuple(start);
                    continue;
                }
                // EMPTY_LIST, APPEND, APPENDS
                b']' => Object::List,
                b'a' | b'e' => {
                    if opcode == b'a' {
                        self.pop()?;
                    } else {
                        let start = self.mark()?;
                        self.stack.truncate(start);
                    }
                    match self.top()? {
                        Object::List => continue,
                        other => return Err(format!("its pickle appends to {}", other.kind())),
                    }
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => self.dict(),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.set(self.top()?, key, value)?;
                    continue;
                }
                b'u' => {
                    let start = self.mark()?;
                    let dict = start.checked_sub(1).map(|at| self.stack[at]);
                    let dict = dict.ok_or("its pickle sets items of nothing")?;
                    if !(self.stack.len() - start).is_multiple_of(2) {
                        return Err("its pickle sets a key without a value".into());
                    }
                    for at in (start..self.stack.len()).step_by(2) {
                        self.set(dict, self.stack[at], self.stack[at + 1])?;
                    }
                    self.stack.truncate(start);
                    continue;
                }
                // GLOBAL, STACK_GLOBAL
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    Object::Name(known(module, name)?)
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (Object::Text(module), Object::Text(name)) = (module, name) else {
                        return Err("its pickle builds a name of something else than texts".into());
                    };
                    Object::Name(known(module, name)?)
                }
                // REDUCE, BUILD, BINPERSID
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    self.call(function, arguments)?
                }
                b'b' => {
                    // `_metadata` of a state dict: versions of modules, nothing of tensors.
                    self.pop()?;
                    match self.top()? {
                        Object::Dict(_) => continue,
                        other => {
                            return Err(format!("its pickle sets the state of {}", other.kind()));
                        }
                    }
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.storage(id)?
                }
                // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
                b'q' | b'r' | 0x94 => {
                    let index = match opcode {
                        b'q' => self.number::<1>()?,
                        b'r' => self.number::<4>()?,
                        _ => self.memo.len() as u64,
                    };
                    self.memo.insert(index as u32, self.top()?);
                    continue;
                }
                b'h' | b'j' => {
                    let index =
                        if opcode == b'h' { self.number::<1>()? } else { self.number::<4>()? };
                    let found = self.memo.get(&(index as u32)).copied();
                    found.ok_or("its pickle refers to something it does not hold")?
                }
                other => {
                    return Err(format!(
                        "its pickle uses opcode {other:#04x} at byte {place}, which a state dict has no use for"
                    ));
                }
            };
            self.stack.push(object);
        }
    }

    fn arguments(&self, tuple: Object<'a>) -> Option<&[Object<'a>]> {
        match tuple {
            Object::Tuple(start, end) => Some(&self.items[start as usize..end as usize]),
            _ => None,
        }
    }

    fn call(&mut self, function: Object<'a>, arguments: Object<'a>) -> Result<Object<'a>, String> {
        let Object::Name(name) = function else {
            return Err(format!("its pickle calls {}", function.kind()));
        };
        let given = self.arguments(arguments).ok_or("its pickle calls without arguments")?;
        match (name, given) {
            (Name::OrderedDict, []) => Ok(self.dict()),
            (Name::Parameter, &[tensor @ Object::Tensor(_), ..]) => Ok(tensor),
            (
                Name::Tensor,
                &[Object::Storage(at), Object::Int(offset), ref shape, ref strides, ..],
            ) => match self.storages[at as usize].element {
                Element::Typed(dtype) => self.tensor(at, dtype, offset, *shape, *strides),
                Element::Bytes => Err("a tensor without dtype lies in an untyped storage".into()),
            },
            (
                Name::TensorWithDtype,
                &[
                    Object::Storage(at),
                    Object::Int(offset),
                    ref shape,
                    ref strides,
                    _,
                    _,
                    Object::Name(Name::Dtype(dtype)),
                    ..,
                ],
            ) => match self.storages[at as usize].element {
                Element::Typed(other) if other != dtype => {
                    Err(format!("a tensor of {dtype} lies in a storage of {other}"))
                }
                _ => self.tensor(at, dtype, offset, *shape, *strides),
            },
            _ => Err(format!("its pickle calls {name:?} with arguments that torch does not write")),
        }
    }

    fn tensor(
        &mut self,
        storage: u32,
        dtype: DType,
        offset: i64,
        shape: Object<'a>,
        strides: Object<'a>,
    ) -> Result<Object<'a>, String> {
        let (Object::Tuple(s0, s1), Object::Tuple(t0, t1)) = (shape, strides) else {
            return Err("a tensor has no tuples of sizes and strides".into());
        };
        let offset = usize::try_from(offset).map_err(|_| "a tensor begins before its storage")?;
        let rank = s1 - s0;
        if rank != t1 - t0 || rank as usize > MAX_RANK {
            return Err(format!(
                "a tensor has {rank} sizes and {} strides; as many of both, at most {MAX_RANK}, are read",
                t1 - t0
            ));
        }
        let tensor = Tensor { storage, dtype, offset, shape: (s0, s1), strides: (t0, t1) };
        self.tensors.push(tensor);
        Ok(Object::Tensor(self.tensors.len() as u32 - 1))
    }

    /// `("storage", type, key, location, elements)`
    fn storage(&mut self, id: Object<'a>) -> Result<Object<'a>, String> {
        let Some(
            &[
                Object::Text("storage"),
                Object::Name(Name::Storage(element)),
                Object::Text(key),
                Object::Text(_),
                Object::Int(elements),
            ],
        ) = self.arguments(id)
        else {
            return Err("its pickle refers to something outside that is not a storage".into());
        };
        let elements = usize::try_from(elements).map_err(|_| "a storage has a negative size")?;
        self.storages.push(Storage { element, key, elements });
        Ok(Object::Storage(self.storages.len() as u32 - 1))
    }

    fn sizes(&self, (start, end): (u32, u32)) -> Result<Vec<usize>, String> {
        let size = |object: &Object<'_>| match object {
            Object::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        };
        self.items[start as usize..end as usize]
            .iter()
            .map(size)
            .collect::<Option<_>>()
            .ok_or_else(|| "its sizes or strides are not non-negative integers".into())
    }
}

/// The names that may stand in a pickle.
fn known(module: &str, name: &str) -> Result<Name, String> {
    let typed = |dtype| Name::Storage(Element::Typed(dtype));
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Name::OrderedDict,
        ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Name::Tensor,
        ("torch._utils", "_rebuild_tensor_v3") => Name::TensorWithDtype,
        ("torch._utils", "_rebuild_parameter") => Name::Parameter,
        ("torch", "DoubleStorage") => typed(DType::F64),
        ("torch", "FloatStorage") => typed(DType::F32),
        ("torch", "HalfStorage") => typed(DType::F16),
        ("torch", "BFloat16Storage") => typed(DType::BF16),
        ("torch", "LongStorage") => typed(DType::I64),
        ("torch", "IntStorage") => typed(DType::I32),
        ("torch", "ShortStorage") => typed(DType::I16),
        ("torch", "CharStorage") => typed(DType::I8),
        ("torch", "ByteStorage") => typed(DType::U8),
        ("torch", "BoolStorage") => typed(DType::Bool),
        ("torch.storage", "UntypedStorage") => Name::Storage(Element::Bytes),
        ("torch", "float8_e4m3fn") => Name::Dtype(DType::F8E4M3),
        ("torch", "float8_e5m2") => Name::Dtype(DType::F8E5M2),
        ("torch", "uint16") => Name::Dtype(DType::U16),
        ("torch", "uint32") => Name::Dtype(DType::U32),
        ("torch", "uint64") => Name::Dtype(DType::U64),
        _ => {
            return Err(format!(
                "its pickle names {}.{}, which a state dict of tensors has no use for (nothing was executed)",
                brief(module),
                brief(name)
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(pickle: &[u8]) -> String {
        state_dict(pickle).unwrap_err()
    }

    #[test]
    fn code_is_named_and_not_run() {
        assert!(error(b"cposix\nsystem\n(X\x02\0\0\0lstR.").contains("posix.system"));
        assert!(error(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.").contains("builtins.eval"));
        assert!(error(b"ios\nsystem\n.").contains("opcode 0x69"));
        assert!(error(b"ccollections\nOrderedDict\n(NtR.").contains("OrderedDict"));
    }

    #[test]
    fn malformed_pickles_are_refused() {
        for (pickle, expected) in [
            (&b""[..], "truncated"),
            (b"}", "truncated"),
            (b".", "empty stack"),
            (b"N.", "holds None"),
            (b"(.", "empty stack"),
            (b"(}.}", "holds"),
            (b"t", "lacks a mark"),
            (b"(u", "items of nothing"),
            (b"}(Nu", "without a value"),
            (b"}NNs", "not a text"),
            (b"]NNs", "an item of a list"),
            (b"}X\x01\0\0\0aNs.", "`a` holds None"),
            (b"h\x01", "does not hold"),
            (b"X\xff\xff\xff\xffa", "truncated"),
            (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa", "truncated"),
            (b"X\x01\0\0\0\xff", "UTF-8"),
            (b"\x80\x09", "protocol 9"),
            (b"NQ", "not a storage"),
            (b"\x85", "empty stack"),
        ] {
            let found = match state_dict(pickle) {
                Ok(tensors) => format!("holds {tensors:?}"),
                Err(error) => error,
            };
            assert!(found.contains(expected), "{pickle:?}: {found}");
        }
        assert_eq!(state_dict(b"}.").unwrap(), []);
    }

    /// A memo that doubles a tuple at every step stays as small as its opcodes.
    #[test]
    fn references_do_not_multiply() {
        let mut pickle = b"Nq\0".to_vec();
        for _ in 0..10_000 {
            pickle.extend(b"h\0h\0\x86q\0");
        }
        pickle.push(b'.');
        assert!(error(&pickle).contains("a tuple"));
    }
}
