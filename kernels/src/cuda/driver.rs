//! A GPU through its driver, which is looked for at run time: this binary is built without CUDA and runs without a GPU.
//!
//! Everything is launched on one stream. An error that a kernel causes shows at the next [`Gpu::wait`] or download.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_void};

use cudarc::driver::sys::{self, CUresult};

use super::device::Device;
use super::geometry::{Generation, Launch};
use super::images::{images, suitable};

/// Why a GPU cannot be used, or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    /// There is no driver library.
    #[error(
        "no NVIDIA driver: libcuda.so.1 (nvcuda.dll) cannot be loaded; install the driver, or make \
         it visible to this container"
    )]
    NoDriver,
    /// The driver sees no GPU.
    #[error("the NVIDIA driver finds no GPU ({0})")]
    NoDevice(String),
    /// The GPU has no bf16 tensor cores and no asynchronous copies.
    #[error("{name} has compute capability {major}.{minor}; the kernels need 8.0 or later")]
    TooOld {
        /// Name of the device.
        name: String,
        /// Generation.
        major: i32,
        /// Version of it.
        minor: i32,
    },
    /// Neither machine code nor PTX could be loaded.
    #[error(
        "the driver (CUDA {driver}) of {name} takes none of the kernel images: {reasons}; a driver of \
         CUDA 12.0 or later takes them"
    )]
    NoImage {
        /// Name of the device.
        name: String,
        /// CUDA version of the driver.
        driver: String,
        /// What it said to each.
        reasons: String,
    },
    /// Not enough memory.
    #[error("the GPU has no {bytes} bytes left ({free} are free)")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// A kernel that no image holds.
    #[error("no kernel {0}")]
    NoKernel(String),
    /// The driver refused a call; a kernel may have failed before.
    #[error("{call}: {message}")]
    Driver {
        /// Which call.
        call: &'static str,
        /// What the driver says.
        message: String,
    },
}

/// What is known of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct GpuInfo {
    /// As the driver names it.
    pub name: String,
    /// Generation.
    pub major: i32,
    /// Version of it.
    pub minor: i32,
    /// CUDA version of the driver.
    pub driver: String,
    /// Image that was loaded: `sm_90a` and so on, or `ptx`.
    pub image: String,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
    /// Bytes of second-level cache.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: usize,
}

/// A GPU with the kernels loaded.
#[derive(Debug)]
pub struct Gpu {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: RefCell<BTreeMap<String, sys::CUfunction>>,
    info: GpuInfo,
}

/// Memory of a GPU; freed when dropped.
#[derive(Debug)]
pub struct GpuBuffer {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: sys::CUcontext,
}

impl GpuBuffer {
    /// Address on the device.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

fn check(call: &'static str, result: CUresult) -> Result<(), CudaError> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Driver { call, message: message(result) })
}

/// What the driver says about a result.
fn message(result: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the driver was loaded, since it answered; the text is static.
    let known = unsafe { sys::cuGetErrorString(result, &raw mut text) } == CUresult::CUDA_SUCCESS;
    if !known || text.is_null() {
        return format!("{result:?}");
    }
    // SAFETY: a string of the driver that ends with 0 and lives as long as the program.
    let text = unsafe { CStr::from_ptr(text) };
    format!("{} ({result:?})", text.to_string_lossy())
}

/// Calls a function of the driver by its name and turns its result into one of ours.
macro_rules! call {
    ($function:ident($($argument:expr),* $(,)?)) => {
        check(stringify!($function), sys::$function($($argument),*))
    };
}

impl Gpu {
    /// Opens the first GPU (of those that `CUDA_VISIBLE_DEVICES` shows) and loads the kernels.
    ///
    /// # Errors
    /// No driver, no GPU, one that is too old, a driver that is too old for the kernels.
    pub fn open() -> Result<Self, CudaError> {
        // SAFETY: only tries to load the library. Asked first, because cudarc panics where there is none.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        let (mut count, mut device, mut version) = (0, 0, 0);
        // SAFETY: pointers to locals; every call is checked before what it wrote is used.
        unsafe {
            call!(cuInit(0)).map_err(|error| CudaError::NoDevice(error.to_string()))?;
            call!(cuDriverGetVersion(&raw mut version))?;
            call!(cuDeviceGetCount(&raw mut count))?;
            if count == 0 {
                return Err(CudaError::NoDevice("0 devices".to_owned()));
            }
            call!(cuDeviceGet(&raw mut device, 0))?;
        }
        let mut info = GpuInfo::read(device, version)?;
        if (info.major, info.minor) < (8, 0) {
            let GpuInfo { name, major, minor, .. } = info;
            return Err(CudaError::TooOld { name, major, minor });
        }
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the device exists; a context that was retained is released when loading fails or by `drop`.
        unsafe {
            call!(cuDevicePrimaryCtxRetain(&raw mut context, device))?;
            call!(cuCtxSetCurrent(context))?;
        }
        let module = match load(&mut info) {
            Ok(module) => module,
            Err(error) => {
                // SAFETY: retained above, used by nobody.
                unsafe { sys::cuDevicePrimaryCtxRelease_v2(device) };
                return Err(error);
            }
        };
        // SAFETY: the context is current.
        unsafe { call!(cuStreamCreate(&raw mut stream, 0))? };
        Ok(Self { device, context, stream, module, functions: RefCell::default(), info })
    }

    /// What is known of it.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// The stream on which everything is launched.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Waits for everything that was launched.
    ///
    /// # Errors
    /// What a kernel did wrong.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { call!(cuStreamSynchronize(self.stream)) }
    }

    /// Seconds that `work` takes on the GPU: its launches are recorded into a graph once and replayed; the median of
    /// `repeats` replays, without what the host does.
    ///
    /// # Errors
    /// Whatever `work` returns, or the driver.
    pub fn time(
        &self,
        repeats: usize,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<f64, CudaError> {
        self.enter()?;
        let graph = Graph::record(self.stream, work)?;
        let (start, end) = (Event::new()?, Event::new()?);
        let mut seconds = Vec::with_capacity(repeats);
        for repeat in 0..repeats + 2 {
            let mut milliseconds = 0.0f32;
            // SAFETY: stream, graph and events are alive; the time is written before it is read.
            unsafe {
                call!(cuEventRecord(start.0, self.stream))?;
                call!(cuGraphLaunch(graph.replay, self.stream))?;
                call!(cuEventRecord(end.0, self.stream))?;
                call!(cuEventSynchronize(end.0))?;
                call!(cuEventElapsedTime(&raw mut milliseconds, start.0, end.0))?;
            }
            if repeat >= 2 {
                seconds.push(f64::from(milliseconds) * 1e-3);
            }
        }
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[seconds.len() / 2])
    }

    /// Copies one buffer into another of at least its size, on the device.
    ///
    /// # Errors
    /// Whatever the driver says.
    pub fn copy(&self, from: &GpuBuffer, to: &GpuBuffer) -> Result<(), CudaError> {
        assert!(from.bytes <= to.bytes, "a copy fits");
        self.enter()?;
        // SAFETY: both buffers are alive and large enough.
        unsafe { call!(cuMemcpyDtoDAsync_v2(to.address, from.address, from.bytes, self.stream)) }
    }

    /// Makes this GPU's context the thread's.
    fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained as long as `self` lives.
        unsafe { call!(cuCtxSetCurrent(self.context)) }
    }

    fn function(&self, symbol: &str, shared: u32) -> Result<sys::CUfunction, CudaError> {
        let mut function = std::ptr::null_mut();
        if let Some(&known) = self.functions.borrow().get(symbol) {
            function = known;
        } else {
            let name = CString::new(symbol).map_err(|_| CudaError::NoKernel(symbol.to_owned()))?;
            // SAFETY: the module is loaded; the name ends with 0.
            let found =
                unsafe { sys::cuModuleGetFunction(&raw mut function, self.module, name.as_ptr()) };
            if found == CUresult::CUDA_ERROR_NOT_FOUND {
                return Err(CudaError::NoKernel(symbol.to_owned()));
            }
            check("cuModuleGetFunction", found)?;
            self.functions.borrow_mut().insert(symbol.to_owned(), function);
        }
        if shared > 48 << 10 {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            unsafe { call!(cuFuncSetAttribute(function, attribute, shared as i32))? };
        }
        Ok(function)
    }

    fn allocate(&self, bytes: usize) -> Result<GpuBuffer, CudaError> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: the context is current; the address is used only if the call succeeds.
        let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (mut free, mut total) = (0, 0);
            // SAFETY: pointers to locals.
            unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
            return Err(CudaError::OutOfMemory { bytes, free });
        }
        check("cuMemAlloc", result)?;
        Ok(GpuBuffer { address, bytes, context: self.context })
    }
}

impl GpuInfo {
    fn read(device: sys::CUdevice, version: i32) -> Result<Self, CudaError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let attribute = |attribute| -> Result<i32, CudaError> {
            let mut value = 0;
            // SAFETY: the device exists.
            unsafe { call!(cuDeviceGetAttribute(&raw mut value, attribute, device))? };
            Ok(value)
        };
        let mut name = [0u8; 256];
        let mut memory = 0usize;
        // SAFETY: 255 bytes at most are written and the last one stays 0.
        unsafe {
            call!(cuDeviceGetName(name.as_mut_ptr().cast(), 255, device))?;
            call!(cuDeviceTotalMem_v2(&raw mut memory, device))?;
        }
        let name = CStr::from_bytes_until_nul(&name)
            .map_or_else(|_| "a GPU".to_owned(), |name| name.to_string_lossy().into_owned());
        Ok(Self {
            name,
            major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            driver: format!("{}.{}", version / 1000, version % 1000 / 10),
            image: String::new(),
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            memory_bytes: memory,
        })
    }
}

/// Loads the best image that the driver takes, and says which.
fn load(info: &mut GpuInfo) -> Result<sys::CUmodule, CudaError> {
    let images = images();
    let mut reasons = Vec::new();
    for image in suitable(&images, info.major, info.minor) {
        let mut module = std::ptr::null_mut();
        let mut bytes = image.bytes.clone();
        // PTX ends with 0.
        bytes.push(0);
        // SAFETY: a whole cubin, or PTX that ends with 0; the context is current.
        let result = unsafe { sys::cuModuleLoadData(&raw mut module, bytes.as_ptr().cast()) };
        if result == CUresult::CUDA_SUCCESS {
            info.image.clone_from(&image.name);
            return Ok(module);
        }
        reasons.push(format!("{}: {}", image.name, message(result)));
    }
    let (name, driver) = (info.name.clone(), info.driver.clone());
    Err(CudaError::NoImage { name, driver, reasons: reasons.join("; ") })
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: made by `open`; nothing that was launched is waited for by anybody else. Results are of no use here.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuModuleUnload(self.module);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl Drop for GpuBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated in this context; the driver waits for kernels that use it.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            sys::cuMemFree_v2(self.address);
        }
    }
}

/// Launches that are replayed.
struct Graph {
    graph: sys::CUgraph,
    replay: sys::CUgraphExec,
}

impl Graph {
    fn record(
        stream: sys::CUstream,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Self, CudaError> {
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let mut recorded = Self { graph: std::ptr::null_mut(), replay: std::ptr::null_mut() };
        // SAFETY: the stream is alive. Recording ends whatever `work` says; what was made is destroyed by `drop`.
        unsafe {
            call!(cuStreamBeginCapture_v2(stream, mode))?;
            let done = work();
            let ended = call!(cuStreamEndCapture(stream, &raw mut recorded.graph));
            done.and(ended)?;
            call!(cuGraphInstantiateWithFlags(&raw mut recorded.replay, recorded.graph, 0))?;
        }
        Ok(recorded)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `record`; a null handle was never made.
        unsafe {
            if !self.replay.is_null() {
                sys::cuGraphExecDestroy(self.replay);
            }
            if !self.graph.is_null() {
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}

struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Self, CudaError> {
        let mut event = std::ptr::null_mut();
        // SAFETY: a context is current.
        unsafe { call!(cuEventCreate(&raw mut event, 0))? };
        Ok(Self(event))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

impl Device for Gpu {
    type Buffer = GpuBuffer;
    type Error = CudaError;

    fn generation(&self) -> Generation {
        // The kernels of Hopper are in no other image.
        if self.info.image == "sm_90a" { Generation::Hopper } else { Generation::Ampere }
    }

    fn upload(&self, bytes: &[u8]) -> Result<GpuBuffer, CudaError> {
        let buffer = self.allocate(bytes.len())?;
        // SAFETY: the buffer has the size of the slice.
        unsafe { call!(cuMemcpyHtoD_v2(buffer.address, bytes.as_ptr().cast(), bytes.len()))? };
        Ok(buffer)
    }

    fn zeros(&self, bytes: usize) -> Result<GpuBuffer, CudaError> {
        let buffer = self.allocate(bytes)?;
        // SAFETY: the buffer has this size.
        unsafe { call!(cuMemsetD8_v2(buffer.address, 0, bytes))? };
        Ok(buffer)
    }

    fn download(&self, buffer: &GpuBuffer) -> Result<Vec<u8>, CudaError> {
        self.wait()?;
        let mut bytes = vec![0u8; buffer.bytes];
        // SAFETY: the vector has the size of the buffer.
        unsafe { call!(cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), buffer.address, bytes.len()))? };
        Ok(bytes)
    }

    fn launch(
        &self,
        launch: &Launch,
        argument: &[u8],
        links: &[(usize, &GpuBuffer)],
    ) -> Result<(), CudaError> {
        self.enter()?;
        let function = self.function(&launch.symbol, launch.shared)?;
        // Eight-byte words, so that the struct is aligned.
        let mut words = vec![0u64; argument.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut words)[..argument.len()].copy_from_slice(argument);
        for &(offset, buffer) in links {
            words[offset / 8] = buffer.address;
        }
        let [x, y, z] = launch.grid;
        let mut parameters = [words.as_mut_ptr().cast::<c_void>()];
        if launch.cluster == 1 {
            // SAFETY: every kernel takes one struct by value, of which `argument` has the bytes; its pointers are those of
            // live buffers whose sizes the caller derived from the same shapes as the grid.
            return unsafe {
                call!(cuLaunchKernel(
                    function,
                    x,
                    y,
                    z,
                    launch.threads,
                    1,
                    1,
                    launch.shared,
                    self.stream,
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                ))
            };
        }
        let mut cluster = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { pad: [0; 64] },
        };
        let size =
            sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: 1, y: launch.cluster, z: 1 };
        cluster.value.clusterDim = size;
        let configuration = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream,
            attrs: &raw mut cluster,
            numAttrs: 1,
        };
        // SAFETY: as above; the attribute outlives the call.
        unsafe {
            call!(cuLaunchKernelEx(
                &raw const configuration,
                function,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_told_why() {
        match Gpu::open() {
            Ok(gpu) => assert!(!gpu.info().image.is_empty()),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("driver") || text.contains("compute capability"), "{text}");
            }
        }
    }
}
