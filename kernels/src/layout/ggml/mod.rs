//! The block types of ggml (llama.cpp): a linear is one tensor of blocks, rows after rows.
//!
//! Each type is one file with its bit diagram, `Bits::pack` and `Bits::unpack`; this file makes layouts of
//! them. A layout here carries a [`BlockQuantized`] of its own type exactly. The types with one scale per 32
//! weights and no minimum (q4_0, q5_0, q8_0) also carry affine weights whose `code − zero` fits their codes:
//! symmetric ones of as many bits or fewer, asymmetric ones of fewer bits, groups that are multiples of 32
//! (the scale is repeated); nothing is rounded.
//!
//! Multi-byte numbers are little-endian; `code[i]` counts within a block.

use attar_tensor::blocks::{Levels, sub_block};
use attar_tensor::compare::Tolerance;
use attar_tensor::{
    BlockQuantized, BlockType, DType, LayoutError, LayoutId, LayoutSpec, LinearSpec, Mat,
    PackedLinear, PartHeader, QuantScheme, QuantizedLinear, ScaleGrid, Tensor,
};
use half::f16;
use rayon::prelude::*;

use super::{Layout, check_multiple, check_quantized, groups, part, weights_only};
use crate::cpu::BlockKernel;
use crate::spec::Kernel;

mod bits;
mod iq4_nl;
mod iq4_xs;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
#[cfg(test)]
mod tests;

/// The same weights in another order of sums.
pub const MAX_NMSE_BLOCKS: f64 = 1e-10;

/// Suffix of the one part.
pub const BLOCKS: &str = "blocks";

/// One block taken apart.
#[derive(Debug, Clone)]
pub(crate) struct Parts {
    /// The first [`BlockType::size`] count.
    codes: [u8; 256],
    d: f16,
    dmin: f16,
    /// The first [`BlockType::subs`] count.
    sub_scales: [i8; 16],
    sub_mins: [u8; 16],
}

impl Parts {
    const ZERO: Self = Self {
        codes: [0; 256],
        d: f16::ZERO,
        dmin: f16::ZERO,
        sub_scales: [0; 16],
        sub_mins: [0; 16],
    };
}

/// Where the bits of a block sit. `bytes` has [`BlockType::bytes`].
pub(crate) trait Bits {
    /// The type.
    const BLOCK: BlockType;
    /// Writes every byte.
    fn pack(block: &Parts, bytes: &mut [u8]);
    /// The exact inverse of [`Bits::pack`]; every byte pattern has one.
    fn unpack(bytes: &[u8], block: &mut Parts);
}

/// A block type as a layout.
#[derive(Debug, Clone, Copy)]
pub struct Ggml {
    block: BlockType,
    pack: fn(&Parts, &mut [u8]),
    unpack: fn(&[u8], &mut Parts),
}

impl Ggml {
    const fn of<B: Bits>() -> Self {
        Self { block: B::BLOCK, pack: B::pack, unpack: B::unpack }
    }

    /// Every block type, in the order of [`BlockType::ALL`].
    pub const ALL: [Self; 12] = [
        Self::of::<q8_0::Q80>(),
        Self::of::<q6_k::Q6K>(),
        Self::of::<q5_k::Q5K>(),
        Self::of::<q5_1::Q51>(),
        Self::of::<q5_0::Q50>(),
        Self::of::<q4_k::Q4K>(),
        Self::of::<q4_1::Q41>(),
        Self::of::<q4_0::Q40>(),
        Self::of::<iq4_xs::Iq4Xs>(),
        Self::of::<iq4_nl::Iq4Nl>(),
        Self::of::<q3_k::Q3K>(),
        Self::of::<q2_k::Q2K>(),
    ];

    /// The layout of a type.
    pub fn new(block: BlockType) -> &'static Self {
        static ALL: [Ggml; 12] = Ggml::ALL;
        ALL.iter().find(|layout| layout.block == block).expect("every type is listed")
    }

    /// Dequantizes whole blocks into `out`, as ggml does to the bit.
    pub fn dequantize_blocks(&self, bytes: &[u8], out: &mut [f32]) {
        let mut parts = Parts::ZERO;
        let (size, sub) = (self.block.size(), self.block.sub_size());
        let minimum = self.block.minimum();
        for (bytes, out) in bytes.chunks_exact(self.block.bytes()).zip(out.chunks_exact_mut(size)) {
            (self.unpack)(bytes, &mut parts);
            let (d, dmin) = (parts.d.to_f32(), parts.dmin.to_f32());
            for (at, (out, codes)) in
                out.chunks_exact_mut(sub).zip(parts.codes.chunks_exact(sub)).enumerate()
            {
                let scale = match self.block.sub_scale_range() {
                    Some(_) => d * f32::from(parts.sub_scales[at]),
                    None => d,
                };
                let min = match minimum {
                    attar_tensor::blocks::Minimum::None => 0.0,
                    attar_tensor::blocks::Minimum::Added => -dmin,
                    attar_tensor::blocks::Minimum::Subtracted { .. } => {
                        dmin * f32::from(parts.sub_mins[at])
                    }
                };
                sub_block(self.block, scale, min, codes, out);
            }
        }
    }

    /// The bytes of the one part, checked against the shape.
    pub(crate) fn bytes<'a>(&self, packed: &'a PackedLinear) -> Result<&'a [u8], LayoutError> {
        if packed.layout != self.id() {
            return Err(LayoutError::Layout {
                expected: self.id().0.to_owned(),
                got: packed.layout,
            });
        }
        check_multiple(self.id(), "in_features", packed.in_features, self.block.size())?;
        let row = packed.in_features / self.block.size() * self.block.bytes();
        Ok(part(packed, BLOCKS, &[DType::U8], &[packed.out_features, row])?.bytes())
    }

    /// Why an affine scheme is not carried.
    fn refuse(&self, linear: &LinearSpec) -> Option<LayoutError> {
        let scheme = linear.scheme;
        let refuse = |reason| {
            Some(LayoutError::Scheme { layout: self.id(), scheme: scheme.label(), reason })
        };
        if let Some(block) = scheme.block() {
            return if block == self.block { None } else { refuse("that is another block type") };
        }
        if !self.block.is_affine() || self.block.sub_scale_range().is_some() {
            return refuse(
                "it has its own grid of scales; leave `scheme` away (preset `rtn`), so that the pass uses it",
            );
        }
        let needed = scheme.bits + u8::from(!scheme.symmetric);
        if needed > self.block.bits() {
            return refuse(
                "its codes are too narrow; asymmetric codes need one bit more than symmetric ones",
            );
        }
        let group = scheme.group_size(linear.in_features);
        if !group.is_multiple_of(self.block.size()) {
            return refuse(
                "it has one scale for every 32 columns; use a group size that is a multiple of 32",
            );
        }
        None
    }
}

impl LayoutSpec for Ggml {
    fn id(&self) -> LayoutId {
        LayoutId(self.block.name())
    }

    fn parts(&self, linear: &LinearSpec) -> Result<Vec<PartHeader>, LayoutError> {
        weights_only(self.id(), linear.scheme)?;
        if let Some(error) = self.refuse(linear) {
            return Err(error);
        }
        check_multiple(self.id(), "in_features", linear.in_features, self.block.size())?;
        let row = linear.in_features / self.block.size() * self.block.bytes();
        let shape = vec![linear.out_features, row];
        Ok(vec![PartHeader { suffix: BLOCKS, dtype: DType::U8, shape }])
    }

    fn scale_dtype(&self, _: DType) -> DType {
        DType::F16
    }

    fn block_type(&self) -> Option<BlockType> {
        Some(self.block)
    }

    fn own_scheme(&self, in_features: usize) -> Option<QuantScheme> {
        let fits = |block: BlockType| in_features.is_multiple_of(block.size());
        let stand_in = self.block.fallback().filter(|&other| !fits(self.block) && fits(other));
        Some(stand_in.unwrap_or(self.block).scheme())
    }

    /// Runtimes of this container multiply by each tensor on its own.
    fn fuses_siblings(&self) -> bool {
        false
    }
}

impl Layout for Ggml {
    fn pack(&self, weight: &QuantizedLinear, source: DType) -> Result<PackedLinear, LayoutError> {
        self.parts(&super::spec_of(weight, source))?;
        self.pack_blocks(&self.blocks_of(weight)?)
    }

    /// Only for types whose weights are `(code − zero) · scale`; see [`Layout::unpack_blocks`].
    fn unpack(&self, packed: &PackedLinear) -> Result<QuantizedLinear, LayoutError> {
        let blocks = self.unpack_blocks(packed)?;
        let Levels::Linear { zero } = self.block.levels() else { return Err(self.not_affine()) };
        if !self.block.is_affine() {
            return Err(self.not_affine());
        }
        let subs = blocks.codes.len() / self.block.sub_size();
        let scale = |at| blocks.scale_min(at / self.block.subs(), at % self.block.subs()).0;
        let mut scheme = self.block.scheme();
        scheme.scale_grid =
            if self.block.sub_scale_range().is_some() { ScaleGrid::F32 } else { ScaleGrid::F16 };
        Ok(QuantizedLinear {
            scheme,
            out_features: blocks.out_features,
            in_features: blocks.in_features,
            scales: (0..subs).map(scale).collect(),
            zeros: vec![zero as u16; subs],
            codes: blocks.codes,
            g_idx: None,
        })
    }

    fn pack_blocks(&self, weight: &BlockQuantized) -> Result<PackedLinear, LayoutError> {
        if weight.block != self.block {
            let got = LayoutId(weight.block.name());
            return Err(LayoutError::Layout { expected: self.id().0.to_owned(), got });
        }
        weight.check()?;
        let (block, blocks) = (self.block, weight.blocks());
        let row = blocks * block.bytes();
        let mut bytes = vec![0u8; weight.out_features * row];
        let (size, subs) = (block.size(), block.subs());
        bytes.par_chunks_mut(row.max(1)).enumerate().for_each(|(at, bytes)| {
            let mut parts = Parts::ZERO;
            for (b, bytes) in bytes.chunks_exact_mut(block.bytes()).enumerate() {
                let at = at * blocks + b;
                parts.codes[..size].copy_from_slice(&weight.codes[at * size..(at + 1) * size]);
                parts.d = weight.d[at];
                if let Some(&dmin) = weight.dmin.get(at) {
                    parts.dmin = dmin;
                }
                let place = at * subs..(at + 1) * subs;
                if let Some(scales) = weight.sub_scales.get(place.clone()) {
                    parts.sub_scales[..subs].copy_from_slice(scales);
                }
                if let Some(mins) = weight.sub_mins.get(place) {
                    parts.sub_mins[..subs].copy_from_slice(mins);
                }
                (self.pack)(&parts, bytes);
            }
        });
        let tensor = Tensor::new(DType::U8, vec![weight.out_features, row], bytes)
            .expect("bytes were counted by the shape");
        Ok(PackedLinear {
            layout: self.id(),
            scheme: block.scheme(),
            out_features: weight.out_features,
            in_features: weight.in_features,
            parts: vec![(BLOCKS, tensor)],
        })
    }

    fn unpack_blocks(&self, packed: &PackedLinear) -> Result<BlockQuantized, LayoutError> {
        let bytes = self.bytes(packed)?;
        let (size, subs) = (self.block.size(), self.block.subs());
        let mut out = BlockQuantized::zeros(self.block, packed.out_features, packed.in_features);
        let mut parts = Parts::ZERO;
        for (at, bytes) in bytes.chunks_exact(self.block.bytes()).enumerate() {
            (self.unpack)(bytes, &mut parts);
            out.codes[at * size..(at + 1) * size].copy_from_slice(&parts.codes[..size]);
            out.d[at] = parts.d;
            if let Some(dmin) = out.dmin.get_mut(at) {
                *dmin = parts.dmin;
            }
            let place = at * subs..(at + 1) * subs;
            if let Some(scales) = out.sub_scales.get_mut(place.clone()) {
                scales.copy_from_slice(&parts.sub_scales[..subs]);
            }
            if let Some(mins) = out.sub_mins.get_mut(place) {
                mins.copy_from_slice(&parts.sub_mins[..subs]);
            }
        }
        Ok(out)
    }

    /// An affine weight in blocks, when this type carries it exactly.
    fn blocks_of(&self, weight: &QuantizedLinear) -> Result<BlockQuantized, LayoutError> {
        let (layout, n) = (self.id(), weight.in_features);
        self.parts(&super::spec_of(weight, DType::F16))?;
        check_quantized(layout, weight, 0..=u16::from(weight.scheme.max_code()) + 1)?;
        if weight.g_idx.is_some() {
            return Err(LayoutError::ColumnOrder { layout });
        }
        let groups = groups(weight.scheme, n)?;
        let group = n / groups.max(1);
        let mut out = BlockQuantized::zeros(self.block, weight.out_features, n);
        let (size, mid) = (self.block.size(), i32::from(self.block.max_code() / 2) + 1);
        for (at, d) in out.d.iter_mut().enumerate() {
            let (row, column) = (at * size / n, at * size % n);
            let place = row * groups + column / group;
            let (scale, zero) = (weight.scales[place], i32::from(weight.zeros[place]));
            *d = f16::from_f32(scale);
            if d.to_f32().to_bits() != scale.to_bits() || !scale.is_finite() {
                let (group, dtype) = (column / group, DType::F16);
                return Err(LayoutError::Scale { layout, row, group, scale, dtype });
            }
            let span = at * size..(at + 1) * size;
            for (i, (to, &code)) in
                out.codes[span.clone()].iter_mut().zip(&weight.codes[span]).enumerate()
            {
                let level = i32::from(code) - zero + mid;
                *to = u8::try_from(level).ok().filter(|&c| c <= self.block.max_code()).ok_or(
                    LayoutError::Code { row, column: column + i, code, max: self.block.max_code() },
                )?;
            }
        }
        Ok(out)
    }

    fn dequantize(&self, packed: &PackedLinear) -> Result<Mat, LayoutError> {
        let bytes = self.bytes(packed)?;
        let mut weight = Mat::zeros((packed.out_features, packed.in_features));
        let out = weight.as_slice_mut().expect("a fresh matrix is contiguous");
        let row = self.block.row_bytes(packed.in_features).unwrap_or(0).max(1);
        out.par_chunks_mut(packed.in_features.max(1))
            .zip(bytes.par_chunks(row))
            .for_each(|(out, bytes)| self.dequantize_blocks(bytes, out));
        Ok(weight)
    }

    fn kernels(&self) -> Vec<Box<dyn Kernel>> {
        // Those of types that tiles do not hold support nothing here.
        let mut kernels: Vec<Box<dyn Kernel>> = vec![Box::new(BlockKernel)];
        kernels.extend(crate::cpu::kernels());
        kernels
    }

    fn tolerance(&self) -> Tolerance {
        Tolerance { max_nmse: MAX_NMSE_BLOCKS }
    }
}

impl Ggml {
    fn not_affine(&self) -> LayoutError {
        LayoutError::Scheme {
            layout: self.id(),
            scheme: self.block.name().to_owned(),
            reason: "its weights are not integers times a scale",
        }
    }
}
