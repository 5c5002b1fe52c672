//! Metadata values.

/// The kind of a value, with its number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Unsigned 8 bits.
    U8 = 0,
    /// Signed 8 bits.
    I8 = 1,
    /// Unsigned 16 bits.
    U16 = 2,
    /// Signed 16 bits.
    I16 = 3,
    /// Unsigned 32 bits.
    U32 = 4,
    /// Signed 32 bits.
    I32 = 5,
    /// 32-bit float.
    F32 = 6,
    /// One byte, 0 or 1.
    Bool = 7,
    /// UTF-8 text.
    String = 8,
    /// A list.
    Array = 9,
    /// Unsigned 64 bits.
    U64 = 10,
    /// Signed 64 bits.
    I64 = 11,
    /// 64-bit float.
    F64 = 12,
}

impl Kind {
    pub(super) const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    /// Bytes of a number; the least that a text or list takes.
    pub(super) const fn least_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

/// A list.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Texts.
    Strings(Vec<String>),
    /// Lists.
    Arrays(Vec<Array>),
    /// Numbers as they lie in the file.
    Numbers {
        /// Their kind.
        kind: Kind,
        /// Little-endian bytes.
        bytes: Vec<u8>,
    },
}

impl Array {
    /// 32-bit floats.
    pub fn f32(values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::Numbers { kind: Kind::F32, bytes }
    }

    /// Signed 32-bit integers.
    pub fn i32(values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::Numbers { kind: Kind::I32, bytes }
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        match self {
            Self::Strings(items) => items.len(),
            Self::Arrays(items) => items.len(),
            Self::Numbers { kind, bytes } => bytes.len() / kind.least_bytes(),
        }
    }

    /// True without items.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Integers of any width, when it is a list of them.
    pub fn integers(&self) -> Option<Vec<i64>> {
        let Self::Numbers { kind, bytes } = self else { return None };
        let each = bytes.chunks_exact(kind.least_bytes());
        each.map(|bytes| number(*kind, bytes).integer()).collect()
    }

    /// Floats, when it is a list of 32-bit ones.
    pub fn floats(&self) -> Option<Vec<f32>> {
        match self {
            Self::Numbers { kind: Kind::F32, bytes } => Some(
                bytes
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
            ),
            _ => None,
        }
    }
}

/// One value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "each is its kind")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// The number of this kind in exactly its bytes; `Bool` is any non-zero byte.
pub(super) fn number(kind: Kind, bytes: &[u8]) -> Value {
    let mut wide = [0u8; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    let bits = u64::from_le_bytes(wide);
    match kind {
        Kind::U8 => Value::U8(bits as u8),
        Kind::I8 => Value::I8(bits as i8),
        Kind::U16 => Value::U16(bits as u16),
        Kind::I16 => Value::I16(bits as i16),
        Kind::I32 => Value::I32(bits as i32),
        Kind::F32 => Value::F32(f32::from_bits(bits as u32)),
        Kind::Bool => Value::Bool(bits != 0),
        Kind::U64 => Value::U64(bits),
        Kind::I64 => Value::I64(bits as i64),
        Kind::F64 => Value::F64(f64::from_bits(bits)),
        Kind::U32 | Kind::String | Kind::Array => Value::U32(bits as u32),
    }
}

impl Value {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::U8(_) => Kind::U8,
            Self::I8(_) => Kind::I8,
            Self::U16(_) => Kind::U16,
            Self::I16(_) => Kind::I16,
            Self::U32(_) => Kind::U32,
            Self::I32(_) => Kind::I32,
            Self::F32(_) => Kind::F32,
            Self::Bool(_) => Kind::Bool,
            Self::String(_) => Kind::String,
            Self::Array(_) => Kind::Array,
            Self::U64(_) => Kind::U64,
            Self::I64(_) => Kind::I64,
            Self::F64(_) => Kind::F64,
        }
    }

    /// An integer of any width that fits.
    pub fn integer(&self) -> Option<i64> {
        Some(match self {
            Self::U8(v) => i64::from(*v),
            Self::I8(v) => i64::from(*v),
            Self::U16(v) => i64::from(*v),
            Self::I16(v) => i64::from(*v),
            Self::U32(v) => i64::from(*v),
            Self::I32(v) => i64::from(*v),
            Self::U64(v) => i64::try_from(*v).ok()?,
            Self::I64(v) => *v,
            _ => return None,
        })
    }

    /// A float of either width.
    pub fn float(&self) -> Option<f64> {
        match self {
            Self::F32(v) => Some(f64::from(*v)),
            Self::F64(v) => Some(*v),
            _ => None,
        }
    }

    /// A text.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// A list.
    pub fn array(&self) -> Option<&Array> {
        match self {
            Self::Array(array) => Some(array),
            _ => None,
        }
    }
}

impl std::fmt::Display for Value {
    /// Short, for people: lists as their length.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::U8(v) => write!(f, "{v}"),
            Self::I8(v) => write!(f, "{v}"),
            Self::U16(v) => write!(f, "{v}"),
            Self::I16(v) => write!(f, "{v}"),
            Self::U32(v) => write!(f, "{v}"),
            Self::I32(v) => write!(f, "{v}"),
            Self::F32(v) => write!(f, "{v}"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::U64(v) => write!(f, "{v}"),
            Self::I64(v) => write!(f, "{v}"),
            Self::F64(v) => write!(f, "{v}"),
            Self::String(text) => f.write_str(&crate::brief(text)),
            Self::Array(array) => write!(f, "list of {}", array.len()),
        }
    }
}

/// Keys and values in the order of the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(pub Vec<(String, Value)>);

impl Metadata {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Adds a key at the end.
    pub fn put(&mut self, key: impl Into<String>, value: Value) {
        self.0.push((key.into(), value));
    }

    /// An unsigned 32-bit number.
    pub fn put_u32(&mut self, key: impl Into<String>, value: usize) {
        self.put(key, Value::U32(u32::try_from(value).unwrap_or(u32::MAX)));
    }

    /// A 32-bit float.
    pub fn put_f32(&mut self, key: impl Into<String>, value: f64) {
        self.put(key, Value::F32(value as f32));
    }

    /// A text.
    pub fn put_text(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.put(key, Value::String(value.into()));
    }
}
