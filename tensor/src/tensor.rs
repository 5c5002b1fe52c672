//! Storage: raw little-endian bytes with a dtype and a shape.

use std::borrow::Cow;

use half::{bf16, f16, slice::HalfFloatSliceExt};

use crate::{DType, Mat, linalg::vectorize};

/// A tensor that owns its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A tensor whose bytes may be borrowed from a mapped file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorView<'a> {
    dtype: DType,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

/// The bytes do not fit dtype and shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    /// Wrong number of bytes.
    #[error("a {dtype} tensor of shape {shape:?} takes {expected} bytes, got {got}")]
    Length {
        /// Element type.
        dtype: DType,
        /// Shape.
        shape: Vec<usize>,
        /// Bytes that dtype and shape call for.
        expected: usize,
        /// Bytes given.
        got: usize,
    },
    /// The dtype cannot be read as f32.
    #[error("a {0} tensor cannot be read as f32")]
    NotFloat(DType),
    /// The shape is not a matrix.
    #[error("expected a matrix, got shape {0:?}")]
    NotMatrix(Vec<usize>),
}

fn check(dtype: DType, shape: &[usize], got: usize) -> Result<(), TensorError> {
    let expected = shape
        .iter()
        .try_fold(dtype.size(), |bytes, &dim| bytes.checked_mul(dim))
        .unwrap_or(usize::MAX);
    if expected == got {
        Ok(())
    } else {
        Err(TensorError::Length { dtype, shape: shape.to_vec(), expected, got })
    }
}

impl Tensor {
    /// Takes ownership of little-endian bytes.
    ///
    /// # Errors
    /// [`TensorError::Length`] when dtype and shape do not call for exactly these bytes.
    pub fn new(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<Self, TensorError> {
        check(dtype, &shape, bytes.len())?;
        Ok(Self { dtype, shape, bytes })
    }

    /// Stores f32 values in `dtype` (F32, F16 or BF16), rounding to nearest even.
    ///
    /// # Errors
    /// [`TensorError::NotFloat`] for other dtypes, [`TensorError::Length`] when the count is wrong.
    pub fn from_f32(dtype: DType, shape: Vec<usize>, values: &[f32]) -> Result<Self, TensorError> {
        let bytes = match dtype {
            DType::F32 => bytemuck::cast_slice(values).to_vec(),
            DType::F16 => {
                let mut out = vec![f16::ZERO; values.len()];
                out.convert_from_f32_slice(values);
                bytemuck::cast_slice(&out).to_vec()
            }
            DType::BF16 => {
                let mut out = vec![bf16::ZERO; values.len()];
                out.convert_from_f32_slice(values);
                bytemuck::cast_slice(&out).to_vec()
            }
            other => return Err(TensorError::NotFloat(other)),
        };
        Self::new(dtype, shape, bytes)
    }

    /// Stores i32 values.
    ///
    /// # Errors
    /// [`TensorError::Length`] when the count is wrong.
    pub fn from_i32(shape: Vec<usize>, values: &[i32]) -> Result<Self, TensorError> {
        Self::new(DType::I32, shape, bytemuck::cast_slice(values).to_vec())
    }

    /// Stores i64 values.
    ///
    /// # Errors
    /// [`TensorError::Length`] when the count is wrong.
    pub fn from_i64(shape: Vec<usize>, values: &[i64]) -> Result<Self, TensorError> {
        Self::new(DType::I64, shape, bytemuck::cast_slice(values).to_vec())
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A borrowed view.
    pub fn view(&self) -> TensorView<'_> {
        TensorView {
            dtype: self.dtype,
            shape: self.shape.clone(),
            bytes: Cow::Borrowed(&self.bytes),
        }
    }
}

impl<'a> TensorView<'a> {
    /// A view of little-endian bytes.
    ///
    /// # Errors
    /// [`TensorError::Length`] when dtype and shape do not call for exactly these bytes.
    pub fn new(
        dtype: DType,
        shape: Vec<usize>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, TensorError> {
        let bytes = bytes.into();
        check(dtype, &shape, bytes.len())?;
        Ok(Self { dtype, shape, bytes })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Little-endian bytes; no alignment is promised.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// One row of a matrix, as `[1, columns]`; `None` when it has no such row.
    pub fn into_row(self, row: usize) -> Option<Self> {
        let &[rows, columns] = self.shape.as_slice() else { return None };
        let size = columns * self.dtype.size();
        let (shape, span) = (vec![1, columns], row * size..(row + 1) * size);
        let bytes = match (row < rows, self.bytes) {
            (false, _) => return None,
            (true, Cow::Borrowed(bytes)) => Cow::Borrowed(&bytes[span]),
            (true, Cow::Owned(bytes)) => Cow::Owned(bytes[span].to_vec()),
        };
        Some(Self { dtype: self.dtype, shape, bytes })
    }

    /// Copies the bytes.
    pub fn to_tensor(&self) -> Tensor {
        Tensor { dtype: self.dtype, shape: self.shape.clone(), bytes: self.bytes.to_vec() }
    }

    /// All elements as f32 (exact for F16, BF16 and F32; F64 is rounded).
    ///
    /// # Errors
    /// [`TensorError::NotFloat`] for integer and 8-bit dtypes.
    pub fn to_f32(&self) -> Result<Vec<f32>, TensorError> {
        let mut out = vec![0.0; self.bytes.len() / self.dtype.size()];
        self.copy_to_f32(0, &mut out)?;
        Ok(out)
    }

    /// Elements `start..start + out.len()` as f32.
    ///
    /// # Errors
    /// [`TensorError::NotFloat`] for integer and 8-bit dtypes.
    ///
    /// # Panics
    /// When the range reaches past the end.
    pub fn copy_to_f32(&self, start: usize, out: &mut [f32]) -> Result<(), TensorError> {
        let size = self.dtype.size();
        let bytes = &self.bytes[start * size..(start + out.len()) * size];
        match self.dtype {
            DType::F32 => match bytemuck::try_cast_slice::<u8, f32>(bytes) {
                Ok(values) => out.copy_from_slice(values),
                Err(_) => {
                    for (out, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                        *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    }
                }
            },
            DType::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
                Ok(values) => values.convert_to_f32_slice(out),
                Err(_) => {
                    for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                        *out = f16::from_le_bytes([b[0], b[1]]).to_f32();
                    }
                }
            },
            DType::BF16 => vectorize(
                #[inline(always)]
                || {
                    for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                        *out = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                    }
                },
            ),
            DType::F64 => {
                for (out, b) in out.iter_mut().zip(bytes.chunks_exact(8)) {
                    let b: [u8; 8] = b.try_into().expect("chunks are eight bytes");
                    *out = f64::from_le_bytes(b) as f32;
                }
            }
            other => return Err(TensorError::NotFloat(other)),
        }
        Ok(())
    }

    /// A matrix `[rows, columns]` in f32.
    ///
    /// # Errors
    /// [`TensorError::NotMatrix`] when the rank is not two, [`TensorError::NotFloat`] as
    /// [`TensorView::to_f32`].
    pub fn to_mat(&self) -> Result<Mat, TensorError> {
        let &[rows, columns] = self.shape.as_slice() else {
            return Err(TensorError::NotMatrix(self.shape.clone()));
        };
        Ok(Mat::from_shape_vec((rows, columns), self.to_f32()?)
            .expect("to_f32 returns one value per element"))
    }

    /// All elements of an integer tensor as i64 (I8, U8, I16, U16, I32, U32, I64).
    pub fn to_i64(&self) -> Option<Vec<i64>> {
        let size = self.dtype.size();
        let convert: fn(&[u8]) -> i64 = match self.dtype {
            DType::U8 => |b| i64::from(b[0]),
            DType::I8 => |b| i64::from(b[0].cast_signed()),
            DType::U16 => |b| i64::from(u16::from_le_bytes([b[0], b[1]])),
            DType::I16 => |b| i64::from(i16::from_le_bytes([b[0], b[1]])),
            DType::U32 => |b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            DType::I32 => |b| i64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            DType::I64 => |b| i64::from_le_bytes(b.try_into().expect("chunks are eight bytes")),
            _ => return None,
        };
        Some(self.bytes.chunks_exact(size).map(convert).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_checked() {
        assert!(Tensor::new(DType::F32, vec![2, 3], vec![0; 24]).is_ok());
        assert!(Tensor::new(DType::F32, vec![2, 3], vec![0; 23]).is_err());
        assert!(TensorView::new(DType::F32, vec![usize::MAX, 8], &[0u8; 8][..]).is_err());
    }

    #[test]
    fn half_types_read_exactly_even_unaligned() {
        let values = [0.5f32, -1.25, 3.0, 65504.0, 1.0e-3];
        for dtype in [DType::F16, DType::BF16, DType::F32] {
            let tensor = Tensor::from_f32(dtype, vec![5], &values).unwrap();
            let again = Tensor::from_f32(dtype, vec![5], &tensor.view().to_f32().unwrap()).unwrap();
            assert_eq!(tensor, again);
            let mut shifted = vec![0u8];
            shifted.extend_from_slice(tensor.bytes());
            let view = TensorView::new(dtype, vec![5], &shifted[1..]).unwrap();
            assert_eq!(view.to_f32().unwrap(), tensor.view().to_f32().unwrap());
        }
    }
}
