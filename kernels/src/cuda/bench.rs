//! How fast the kernels are on a GPU, beside its copy bandwidth and cuBLAS, all measured in one run by graph replay.
//!
//! Weights are rotated: as many copies as take more than four times the second-level cache, one launch each per replay, so that
//! no product finds its weights in the cache.

use attar_tensor::rng::Rng;
use cudarc::cublas::sys as cublas;

use super::device::{Device, DeviceLinear};
use super::driver::{CudaError, Gpu, GpuBuffer};
use super::geometry::{CopyArgument, Half, MatmulLaunch, copy_launch};
use super::packed::{CudaWeights, Places, ScaleKind};

/// Replays of a graph; the median counts.
const REPEATS: usize = 15;
/// Launches of a graph at most.
const LAUNCHES: usize = 256;

/// One product, timed.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Timing {
    /// Kernel.
    pub kernel: String,
    /// Bits per code.
    pub bits: u8,
    /// Type of activations.
    pub half: Half,
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight.
    pub columns: usize,
    /// Tokens.
    pub m: usize,
    /// Seconds of one product.
    pub seconds: f64,
    /// Bytes of weights that it reads, scales included.
    pub weight_bytes: usize,
}

impl Timing {
    /// Weight bytes per second.
    pub fn bandwidth(&self) -> f64 {
        self.weight_bytes as f64 / self.seconds
    }

    /// Floating point operations per second, two for each weight and token.
    pub fn flops(&self) -> f64 {
        2.0 * (self.rows * self.columns * self.m) as f64 / self.seconds
    }
}

/// Weights of random codes, f16 scales, every bit pattern valid: for timing, without a quantizer.
pub fn random_weights(bits: u8, (rows, columns): (usize, usize), group: usize) -> CudaWeights {
    let places = Places::new(columns, columns / group, None);
    let padded = rows.next_multiple_of(super::packed::BLOCK_ROWS);
    let mut rng = Rng::new(1);
    let words = padded / 32 * places.chunks * 64 * usize::from(bits);
    // A block repeats: a device does not compress.
    let block: Vec<u32> = (0..words.min(1 << 16)).map(|_| rng.below(1 << 32) as u32).collect();
    let codes = block.iter().copied().cycle().take(words).flat_map(u32::to_le_bytes).collect();
    let scale = half::f16::from_f32(0.01).to_le_bytes();
    let scales = scale.repeat(places.padded_groups() * padded);
    let scale_kind = ScaleKind::F16;
    CudaWeights { bits, rows, columns, places, codes, scale_kind, scales, zeros: None }
}

/// Bytes per second that the device reads and writes when a kernel copies (the driver's own copies are slower: 2.8 TB/s where
/// this reaches 4.1 on an H200); half of them are read. The ceiling of everything that streams.
///
/// # Errors
/// Whatever the driver says.
pub fn copy_bandwidth(gpu: &Gpu) -> Result<f64, CudaError> {
    let bytes = (1usize << 30).min(gpu.info().memory_bytes / 8) & !0x3fff;
    let (from, to) = (gpu.zeros(bytes)?, gpu.zeros(bytes)?);
    let launch = copy_launch(bytes);
    let argument = CopyArgument { pointers: [0; 2], units: bytes as i64 / 16 };
    let copy = || gpu.launch(&launch, bytemuck::bytes_of(&argument), &[(0, &from), (8, &to)]);
    copy()?;
    gpu.wait()?;
    let seconds = gpu.time(REPEATS, || (0..4).try_for_each(|_| copy()))?;
    Ok(8.0 * bytes as f64 / seconds)
}

/// Copies of something of `bytes` that together take more than four times the second-level cache.
fn copies(gpu: &Gpu, bytes: usize) -> usize {
    (4 * gpu.info().l2_bytes / bytes.max(1) + 2).clamp(2, LAUNCHES)
}

/// Activations around one, as bits of `half`.
fn activations(half: Half, count: usize) -> Vec<u16> {
    let mut rng = Rng::new(2);
    let block: Vec<u16> =
        (0..count.min(1 << 16)).map(|_| half.round(rng.uniform() - 0.5)).collect();
    block.iter().copied().cycle().take(count).collect()
}

/// Times `m` tokens with every kernel that multiplies so many, the chosen one first.
///
/// # Errors
/// Whatever the driver says.
pub fn time_linear(
    gpu: &Gpu,
    weights: &CudaWeights,
    half: Half,
    m: usize,
) -> Result<Vec<Timing>, CudaError> {
    let first = DeviceLinear::upload(gpu, weights)?;
    let mut linears = vec![first];
    for _ in 1..copies(gpu, weights.bytes()) {
        let first = &linears[0];
        let copy = |buffer: &GpuBuffer| -> Result<GpuBuffer, CudaError> {
            let to = gpu.zeros(buffer.bytes())?;
            gpu.copy(buffer, &to)?;
            Ok(to)
        };
        let (codes, scales) = (copy(&first.codes)?, copy(&first.scales)?);
        let zeros = first.zeros.as_ref().map(&copy).transpose()?;
        let order = first.order.as_ref().map(&copy).transpose()?;
        linears.push(DeviceLinear { codes, scales, zeros, order, ..*first });
    }
    let places = weights.places.places();
    let x = gpu.upload(bytemuck::cast_slice(&activations(half, m * places)))?;
    let out = gpu.zeros(2 * m * weights.rows)?;
    let one = |launch: MatmulLaunch| {
        let workspace = linears[0].workspace(gpu, &launch)?;
        let multiply = |linear: &DeviceLinear<GpuBuffer>| {
            linear.matmul(gpu, &launch, &workspace, (&x, &out, m))
        };
        // Once outside of the recording: attributes of the function are set here.
        multiply(&linears[0])?;
        gpu.wait()?;
        let rounds = (32 / linears.len()).max(1);
        let all = || (0..rounds).try_for_each(|_| linears.iter().try_for_each(&multiply));
        let seconds = gpu.time(REPEATS, all)?;
        Ok(Timing {
            kernel: launch.launch.symbol.clone(),
            bits: weights.bits,
            half,
            rows: weights.rows,
            columns: weights.columns,
            m,
            seconds: seconds / (rounds * linears.len()) as f64,
            weight_bytes: weights.bytes(),
        })
    };
    linears[0].matmul_launches(half, m).into_iter().map(one).collect()
}

/// Times cuBLAS on dense bf16 weights of this shape, f32 sums; an error text when there is no cuBLAS.
///
/// # Errors
/// Whatever the driver or cuBLAS says.
pub fn time_cublas(
    gpu: &Gpu,
    (rows, columns): (usize, usize),
    m: usize,
) -> Result<Timing, CudaError> {
    let failed = |call: &'static str, message: String| CudaError::Driver { call, message };
    // SAFETY: only tries to load the library.
    if !unsafe { cublas::is_culib_present() } {
        return Err(failed("cuBLAS", "libcublas.so.12 cannot be loaded".to_owned()));
    }
    let check = |call, status: cublas::cublasStatus_t| match status {
        cublas::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        other => Err(failed(call, format!("{other:?}"))),
    };
    let bytes = 2 * rows * columns;
    let mut weights = Vec::new();
    for _ in 0..copies(gpu, bytes).min(gpu.info().memory_bytes / 2 / bytes).max(1) {
        weights.push(gpu.upload(bytemuck::cast_slice(&activations(Half::Bf16, rows * columns)))?);
    }
    let x = gpu.upload(bytemuck::cast_slice(&activations(Half::Bf16, m * columns)))?;
    let out = gpu.zeros(2 * m * rows)?;
    let workspace = gpu.zeros(32 << 20)?;
    let mut handle = std::ptr::null_mut();
    // SAFETY: the context of `gpu` is current after its uploads; the workspace outlives the handle.
    unsafe {
        check("cublasCreate", cublas::cublasCreate_v2(&raw mut handle))?;
        check("cublasSetStream", cublas::cublasSetStream_v2(handle, gpu.stream().cast()))?;
        let (address, size) = (workspace.address() as *mut std::ffi::c_void, workspace.bytes());
        check("cublasSetWorkspace", cublas::cublasSetWorkspace_v2(handle, address, size))?;
    }
    let (one, zero) = (1.0f32, 0.0f32);
    let multiply = |weight: &GpuBuffer| {
        let half = cublas::cudaDataType::CUDA_R_16BF;
        let (n, m, k) = (rows as i32, m as i32, columns as i32);
        // SAFETY: column-major `out [rows, m] = weight [columns, rows]ᵀ · x [columns, m]` within live buffers of these sizes.
        let status = unsafe {
            cublas::cublasGemmEx(
                handle,
                cublas::cublasOperation_t::CUBLAS_OP_T,
                cublas::cublasOperation_t::CUBLAS_OP_N,
                n,
                m,
                k,
                (&raw const one).cast(),
                weight.address() as *const std::ffi::c_void,
                half,
                k,
                x.address() as *const std::ffi::c_void,
                half,
                k,
                (&raw const zero).cast(),
                out.address() as *mut std::ffi::c_void,
                half,
                n,
                cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        check("cublasGemmEx", status)
    };
    let timed = (|| {
        multiply(&weights[0])?;
        gpu.wait()?;
        let rounds = (32 / weights.len()).max(1);
        let seconds = gpu.time(REPEATS, || {
            (0..rounds).try_for_each(|_| weights.iter().try_for_each(&multiply))
        })?;
        Ok(seconds / (rounds * weights.len()) as f64)
    })();
    // SAFETY: created above and used by nobody any more.
    unsafe { cublas::cublasDestroy_v2(handle) };
    Ok(Timing {
        kernel: "cublas bf16".to_owned(),
        bits: 16,
        half: Half::Bf16,
        rows,
        columns,
        m,
        seconds: timed?,
        weight_bytes: bytes,
    })
}
