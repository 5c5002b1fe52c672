//! Every tensor type of ggml with its true block size: what `ggml_blck_size` and `ggml_type_size` say
//! (`tests/golden/ggml` holds their answers).

use attar_tensor::{BlockType, DType};

/// A tensor type by its number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GgmlType(pub u32);

/// Number, name, elements of a block, bytes of a block.
const TABLE: &[(u32, &str, usize, usize)] = &[
    (0, "f32", 1, 4),
    (1, "f16", 1, 2),
    (2, "q4_0", 32, 18),
    (3, "q4_1", 32, 20),
    (6, "q5_0", 32, 22),
    (7, "q5_1", 32, 24),
    (8, "q8_0", 32, 34),
    (9, "q8_1", 32, 36),
    (10, "q2_k", 256, 84),
    (11, "q3_k", 256, 110),
    (12, "q4_k", 256, 144),
    (13, "q5_k", 256, 176),
    (14, "q6_k", 256, 210),
    (15, "q8_k", 256, 292),
    (16, "iq2_xxs", 256, 66),
    (17, "iq2_xs", 256, 74),
    (18, "iq3_xxs", 256, 98),
    (19, "iq1_s", 256, 50),
    (20, "iq4_nl", 32, 18),
    (21, "iq3_s", 256, 110),
    (22, "iq2_s", 256, 82),
    (23, "iq4_xs", 256, 136),
    (24, "i8", 1, 1),
    (25, "i16", 1, 2),
    (26, "i32", 1, 4),
    (27, "i64", 1, 8),
    (28, "f64", 1, 8),
    (29, "iq1_m", 256, 56),
    (30, "bf16", 1, 2),
    (34, "tq1_0", 256, 54),
    (35, "tq2_0", 256, 66),
    (39, "mxfp4", 32, 17),
    (40, "nvfp4", 64, 36),
    (41, "q1_0", 128, 18),
    (42, "q2_0", 64, 18),
];

impl GgmlType {
    /// 32-bit floats.
    pub const F32: Self = Self(0);
    /// 16-bit floats.
    pub const F16: Self = Self(1);
    /// bfloat16.
    pub const BF16: Self = Self(30);

    fn row(self) -> Option<&'static (u32, &'static str, usize, usize)> {
        TABLE.iter().find(|row| row.0 == self.0)
    }

    /// Name in lower case; `None` for numbers that this build does not know.
    pub fn name(self) -> Option<&'static str> {
        self.row().map(|row| row.1)
    }

    /// Elements and bytes of a block; `None` for numbers that this build does not know.
    pub fn block_size(self) -> Option<(usize, usize)> {
        self.row().map(|row| (row.2, row.3))
    }

    /// The type of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == name).map(|row| Self(row.0))
    }

    /// Bytes of a row, or `None` when the type is unknown or its blocks do not divide the row.
    pub fn row_bytes(self, elements: usize) -> Option<usize> {
        let (size, bytes) = self.block_size()?;
        if elements.is_multiple_of(size) { (elements / size).checked_mul(bytes) } else { None }
    }

    /// The block type, for those whose codes are understood.
    pub fn block(self) -> Option<BlockType> {
        BlockType::from_name(self.name()?)
    }

    /// The number of a block type.
    pub fn of_block(block: BlockType) -> Self {
        Self::from_name(block.name()).expect("every block type is in the table")
    }

    /// The element type, for plain numbers.
    pub fn dtype(self) -> Option<DType> {
        Some(match self.0 {
            0 => DType::F32,
            1 => DType::F16,
            24 => DType::I8,
            25 => DType::I16,
            26 => DType::I32,
            27 => DType::I64,
            28 => DType::F64,
            30 => DType::BF16,
            _ => return None,
        })
    }

    /// The number of an element type; `None` for those that ggml has not.
    pub fn of_dtype(dtype: DType) -> Option<Self> {
        Some(Self(match dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::I8 => 24,
            DType::I16 => 25,
            DType::I32 => 26,
            DType::I64 => 27,
            DType::F64 => 28,
            DType::BF16 => 30,
            _ => return None,
        }))
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "type {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_ggml() {
        let golden = include_bytes!("../../../tests/golden/ggml/tensors.safetensors");
        let file = safetensors::SafeTensors::deserialize(golden).unwrap();
        let data = file.tensor("types").unwrap().data().to_vec();
        let numbers: Vec<usize> = data
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()) as usize)
            .collect();
        let theirs: Vec<_> = numbers.chunks_exact(3).map(|row| (row[0], row[1], row[2])).collect();
        let ours: Vec<_> = TABLE.iter().map(|row| (row.0 as usize, row.2, row.3)).collect();
        assert_eq!(ours, theirs);
        for block in BlockType::ALL {
            let ggml = GgmlType::of_block(block);
            assert_eq!(ggml.block_size(), Some((block.size(), block.bytes())));
            assert_eq!(ggml.block(), Some(block));
        }
        assert_eq!(GgmlType(31).row_bytes(32), None);
        assert_eq!(GgmlType(31).to_string(), "type 31");
    }
}
