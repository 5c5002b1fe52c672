//! The repacking kernels: an artifact's own bytes on the device become the packed form there.

use bytemuck::{Pod, Zeroable};

use super::device::{Device, DeviceLinear};
use super::geometry::Launch;
use super::packed::{BLOCK_ROWS, CHUNK, Places, ScaleKind, zero_bytes};
use attar_tensor::{LayoutError, PackedLinear};

/// Argument of the repacking kernels, `AttarRepack` of `device/repack.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct RepackArgument {
    /// codes, zeros, scales, order, and the packed codes, scales, zeros.
    pub pointers: [u64; 7],
    /// Rows of the weight.
    pub rows: i32,
    /// Columns of the weight.
    pub columns: i32,
    /// Groups of the weight.
    pub groups: i32,
    /// Chunks of a row.
    pub chunks: i32,
    /// Half chunks of a group.
    pub group_halves: i32,
    /// Size of a scale.
    pub scale_bytes: i32,
    /// Added to stored zero points.
    pub zero_offset: i32,
    /// Nothing.
    pub unused: i32,
}

/// Argument of `attar_order`, `AttarOrder` of `device/repack.cuh`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct OrderArgument {
    /// g_idx, order.
    pub pointers: [u64; 2],
    /// Columns of the weight.
    pub columns: i32,
    /// Chunks of a row.
    pub chunks: i32,
    /// Half chunks of a group.
    pub group_halves: i32,
    /// Nothing.
    pub unused: i32,
}

/// How the repacking kernels read a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Repack {
    /// As symbols write the layout.
    pub name: &'static str,
    /// Suffix of the codes.
    pub codes: &'static str,
    /// Suffix of the zero points.
    pub zeros: &'static str,
    /// Suffix of the scales.
    pub scales: &'static str,
    /// Suffix of the order of columns.
    pub g_idx: &'static str,
    /// Added to stored zero points.
    pub zero_offset: i32,
}

/// Of a layout by its name; `None` when no kernel reads it.
pub fn repack_of(layout: &str) -> Option<Repack> {
    let gptq = Repack {
        name: "gptq",
        codes: "qweight",
        zeros: "qzeros",
        scales: "scales",
        g_idx: "g_idx",
        zero_offset: 1,
    };
    match layout {
        "gptq" => Some(gptq),
        "gptq_v2" => Some(Repack { zero_offset: 0, ..gptq }),
        "awq" => Some(Repack { name: "awq", zero_offset: 0, ..gptq }),
        "compressed-tensors" => Some(Repack {
            name: "ct",
            codes: "weight_packed",
            zeros: "weight_zero_point",
            scales: "weight_scale",
            g_idx: "weight_g_idx",
            zero_offset: 0,
        }),
        _ => None,
    }
}

impl Repack {
    /// The kernel that packs codes: 8 warps of a block take a block of rows and a chunk each.
    pub fn codes_launch(&self, bits: u8, rows: usize, chunks: usize) -> Launch {
        let items = rows.div_ceil(BLOCK_ROWS) * chunks;
        Launch {
            symbol: format!("attar_repack_{}_w{bits}_codes", self.name),
            grid: [items.div_ceil(8) as u32, 1, 1],
            threads: 256,
            shared: 0,
            cluster: 1,
        }
    }

    /// The kernel that lays out scales and zero points.
    pub fn groups_launch(&self, bits: u8, rows: usize, places: &Places) -> Launch {
        let items = rows.next_multiple_of(BLOCK_ROWS) * places.padded_groups();
        Launch {
            symbol: format!("attar_repack_{}_w{bits}_groups", self.name),
            grid: [items.div_ceil(256) as u32, 1, 1],
            threads: 256,
            shared: 0,
            cluster: 1,
        }
    }
}

/// The kernel that sorts columns by group.
pub fn order_launch(chunks: usize) -> Launch {
    let grid = [(chunks * CHUNK).div_ceil(256) as u32, 1, 1];
    Launch { symbol: "attar_order".to_owned(), grid, threads: 256, shared: 0, cluster: 1 }
}

/// Why a linear could not be repacked on a device.
#[derive(Debug, thiserror::Error)]
pub enum RepackError<E: std::error::Error> {
    /// The bytes are not what the layout says, or no kernel reads it.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The device failed.
    #[error("{0}")]
    Device(E),
}

/// Uploads the artifact's own bytes and packs them on the device.
///
/// # Errors
/// Parts that are missing, a layout that no kernel reads, whatever the device says.
pub fn repack<D: Device>(
    device: &D,
    packed: &PackedLinear,
) -> Result<DeviceLinear<D::Buffer>, RepackError<D::Error>> {
    // Also checks every part's type and shape, on which the kernels rely.
    let weight = crate::layout::unpack(packed)?;
    let unknown = || LayoutError::Layout {
        expected: "gptq, gptq_v2, awq, compressed-tensors".to_owned(),
        got: packed.layout,
    };
    let reader = repack_of(packed.layout.0).ok_or_else(unknown)?;
    let part = |suffix: &'static str| {
        packed.part(suffix).ok_or(LayoutError::Missing { layout: packed.layout, suffix })
    };
    let scales = part(reader.scales)?;
    let scale_kind = ScaleKind::of(scales.dtype()).ok_or_else(unknown)?;
    let bits = packed.scheme.bits;
    let (rows, columns, groups) = (packed.out_features, packed.in_features, weight.groups());
    let places = Places::new(columns, groups, weight.g_idx.as_deref());
    let padded = rows.next_multiple_of(BLOCK_ROWS) * places.padded_groups();
    let middle = u16::from(packed.scheme.mid_code());
    let symmetric = packed.scheme.symmetric && weight.zeros.iter().all(|&zero| zero == middle);
    let run = || -> Result<DeviceLinear<D::Buffer>, D::Error> {
        let order = match (&places.order, &weight.g_idx) {
            (None, _) => None,
            // Sorted on the device, from the artifact's own numbers.
            (Some(order), Some(g_idx)) => {
                let g_idx = device.upload(bytemuck::cast_slice(g_idx))?;
                let out = device.zeros(4 * order.len())?;
                let argument = OrderArgument {
                    pointers: [0; 2],
                    columns: columns as i32,
                    chunks: places.chunks as i32,
                    group_halves: places.group_halves as i32,
                    unused: 0,
                };
                let links = [(0, &g_idx), (8, &out)];
                device.launch(
                    &order_launch(places.chunks),
                    bytemuck::bytes_of(&argument),
                    &links,
                )?;
                Some(out)
            }
            (Some(order), None) => Some(device.upload(bytemuck::cast_slice(order))?),
        };
        let linear = DeviceLinear {
            bits,
            rows,
            columns,
            chunks: places.chunks,
            group_halves: places.group_halves,
            scale_kind,
            codes: device
                .zeros(rows.div_ceil(BLOCK_ROWS) * places.chunks * 256 * usize::from(bits))?,
            scales: device.zeros(padded * scale_kind.bytes())?,
            zeros: if symmetric { None } else { Some(device.zeros(padded * zero_bytes(bits))?) },
            order,
            generation: device.generation(),
        };
        let from_codes = device.upload(packed.part(reader.codes).map_or(&[], |p| p.bytes()))?;
        let from_scales = device.upload(scales.bytes())?;
        let from_zeros = packed.part(reader.zeros).map(|part| device.upload(part.bytes()));
        let from_zeros = from_zeros.transpose()?;
        let argument = RepackArgument {
            pointers: [0; 7],
            rows: rows as i32,
            columns: columns as i32,
            groups: groups as i32,
            chunks: places.chunks as i32,
            group_halves: places.group_halves as i32,
            scale_bytes: scale_kind.bytes() as i32,
            zero_offset: reader.zero_offset,
            unused: 0,
        };
        let mut links =
            vec![(0, &from_codes), (16, &from_scales), (32, &linear.codes), (40, &linear.scales)];
        links.extend(from_zeros.as_ref().map(|zeros| (8, zeros)));
        links.extend(linear.order.as_ref().map(|order| (24, order)));
        links.extend(linear.zeros.as_ref().map(|zeros| (48, zeros)));
        let argument = bytemuck::bytes_of(&argument);
        device.launch(&reader.codes_launch(bits, rows, places.chunks), argument, &links)?;
        device.launch(&reader.groups_launch(bits, rows, &places), argument, &links)?;
        Ok(linear)
    };
    part(reader.codes)?;
    run().map_err(RepackError::Device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cases;
    use crate::cuda::{CudaWeights, shim};
    use crate::layout::LAYOUTS;

    #[test]
    fn the_device_packs_the_same_bytes_as_the_host() {
        let Some(device) = shim::kernels() else { return };
        let mut packed_any = [0; 4];
        for case in cases::all() {
            let weight = case.weight();
            for (at, layout) in LAYOUTS.iter().enumerate().take(4) {
                let mut weight = weight.clone();
                weight.scheme.scale_grid = layout.scale_grid(case.source);
                // A layout that cannot store the case refuses it.
                let Ok(packed) = layout.pack(&weight, case.source) else { continue };
                packed_any[at] += 1;
                let host = CudaWeights::new(&packed).unwrap();
                let linear = repack(&device, &packed).unwrap();
                let got = |buffer| device.download(buffer).unwrap();
                assert!(got(&linear.codes) == host.codes, "{case} {}: codes", layout.id());
                assert!(got(&linear.scales) == host.scales, "{case} {}: scales", layout.id());
                let zeros = linear.zeros.as_ref().map(got);
                assert!(zeros == host.zeros, "{case} {}: zeros", layout.id());
                let order = linear.order.as_ref().map(got);
                let want = host.places.order.as_ref().map(|o| bytemuck::cast_slice(o).to_vec());
                assert!(order == want, "{case} {}: order", layout.id());
            }
        }
        assert!(packed_any.iter().all(|&count| count > 5), "{packed_any:?}");
    }
}
