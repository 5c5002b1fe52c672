//! C interface of the CPU kernels. `include/attar_kernels.h` is its documentation and contract; every
//! function here is one of its declarations. No panic crosses the border: it becomes `ATTAR_INTERNAL`.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char, c_int, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr, slice,
};

use attar_kernels::{Activations, Prepared, layout};
use attar_tensor::{DType, Granularity, PackedLinear, QuantScheme, ScaleGrid, Tensor};

const ABI_VERSION: u32 = 1;
/// Names the library in its own bytes, so that who copies the file can tell what it is without loading it.
#[used]
#[unsafe(no_mangle)]
pub static ATTAR_KERNELS_BUILD: [u8; MARK.len()] = {
    let mut mark = [0; MARK.len()];
    mark.copy_from_slice(MARK.as_bytes());
    mark
};
const MARK: &str = concat!("attar_kernels abi 1 version ", env!("CARGO_PKG_VERSION"));
/// Dimensions of a tensor, rows and columns of a weight at most: products cannot overflow.
const MOST: u64 = 1 << 31;

/// `attar_status`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// `ATTAR_OK`
    Ok = 0,
    /// `ATTAR_INVALID`
    Invalid = 1,
    /// `ATTAR_LAYOUT`
    Layout = 2,
    /// `ATTAR_INTERNAL`
    Internal = 3,
}

/// `attar_linear_spec`.
#[repr(C)]
#[derive(Debug)]
pub struct Spec {
    layout: *const c_char,
    bits: u32,
    group_size: i32,
    symmetric: u32,
    out_features: u64,
    in_features: u64,
}

/// `attar_part`.
#[repr(C)]
#[derive(Debug)]
pub struct Part {
    suffix: *const c_char,
    dtype: *const c_char,
    shape: *const u64,
    rank: usize,
    data: *const c_void,
    bytes: usize,
}

/// `attar_linear`.
#[derive(Debug)]
pub struct Linear(Box<dyn Prepared>);

struct Failure(Status, String);

fn invalid(reason: impl Into<String>) -> Failure {
    Failure(Status::Invalid, reason.into())
}

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

fn remember(reason: &str) {
    let text: Vec<u8> = reason.bytes().filter(|&byte| byte != 0).collect();
    LAST_ERROR.set(CString::new(text).unwrap_or_default());
}

/// Runs a call, remembers why it failed, and keeps panics on this side.
fn guard(call: impl FnOnce() -> Result<(), Failure>) -> Status {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(())) => {
            remember("");
            Status::Ok
        }
        Ok(Err(Failure(status, reason))) => {
            remember(&reason);
            status
        }
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            remember(text.unwrap_or("panic without a message"));
            Status::Internal
        }
    }
}

/// # Safety
/// Null, or a string that ends with a zero byte and lives through the call.
unsafe fn text<'a>(pointer: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if pointer.is_null() {
        return Err(invalid(format!("{what} is null")));
    }
    // SAFETY: not null; the rest is this function's own condition.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| invalid(format!("{what} is not UTF-8")))
}

fn size(value: u64, what: &str) -> Result<usize, Failure> {
    if value > MOST {
        return Err(invalid(format!("{what} is {value}; at most {MOST} is supported")));
    }
    Ok(value as usize)
}

/// # Safety
/// As the header says of `attar_part`.
unsafe fn tensor(part: &Part, suffix: &str) -> Result<Tensor, Failure> {
    // SAFETY: this function's own condition.
    let dtype = unsafe { text(part.dtype, "dtype of a part") }?;
    let dtype = DType::from_safetensors_name(dtype)
        .ok_or_else(|| invalid(format!("{suffix}: dtype `{dtype}` is unknown")))?;
    if part.rank > 8 || (part.rank > 0 && part.shape.is_null()) {
        return Err(invalid(format!("{suffix}: shape is null or has more than 8 dimensions")));
    }
    let mut shape = Vec::with_capacity(part.rank);
    if part.rank > 0 {
        // SAFETY: not null, and the caller says that it holds `rank` numbers.
        for &dim in unsafe { slice::from_raw_parts(part.shape, part.rank) } {
            shape.push(size(dim, "a dimension")?);
        }
    }
    let bytes = if part.bytes == 0 {
        Vec::new()
    } else if part.data.is_null() || isize::try_from(part.bytes).is_err() {
        return Err(invalid(format!("{suffix}: data is null or beyond the address space")));
    } else {
        // SAFETY: not null, and the caller says that `bytes` bytes lie there; bytes need no alignment.
        unsafe { slice::from_raw_parts(part.data.cast::<u8>(), part.bytes) }.to_vec()
    };
    Tensor::new(dtype, shape, bytes).map_err(|error| invalid(format!("{suffix}: {error}")))
}

/// `attar_abi_version`.
#[unsafe(no_mangle)]
pub extern "C" fn attar_abi_version() -> u32 {
    ABI_VERSION
}

/// `attar_last_error`.
#[unsafe(no_mangle)]
pub extern "C" fn attar_last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

/// `attar_set_threads`.
#[unsafe(no_mangle)]
pub extern "C" fn attar_set_threads(threads: usize) -> Status {
    guard(|| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().map_err(|error| invalid(format!("threads: {error}")))
    })
}

/// `attar_linear_prepare`.
///
/// # Safety
/// Pointers are null (refused) or as the header describes them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn attar_linear_prepare(
    spec: *const Spec,
    parts: *const Part,
    n_parts: usize,
    activations: c_int,
    linear: *mut *mut Linear,
) -> Status {
    guard(|| {
        if spec.is_null() || linear.is_null() || (parts.is_null() && n_parts > 0) || n_parts > 64 {
            return Err(invalid("spec, parts or linear is null, or there are more than 64 parts"));
        }
        // SAFETY: not null; the caller gives a place for one pointer.
        unsafe { *linear = ptr::null_mut() };
        // SAFETY: not null; the caller gives a spec that lives through the call.
        let spec = unsafe { &*spec };
        // SAFETY: the header's condition on the string.
        let name = unsafe { text(spec.layout, "layout") }?;
        // Block types are whole tensors of GGUF files, and W8A8 says what activations are: both need another
        // description than this one.
        let affine = |layout: &&'static dyn attar_kernels::Layout| {
            layout.block_type().is_none() && layout.id().0 != "compressed-tensors-int"
        };
        let layout = layout(name).filter(affine).ok_or_else(|| {
            let known: Vec<_> =
                attar_kernels::LAYOUTS.iter().copied().filter(affine).map(|l| l.id().0).collect();
            invalid(format!("layout `{name}` is unknown; this library has {}", known.join(", ")))
        })?;
        let granularity = match spec.group_size {
            -1 => Granularity::Channel,
            size @ 1.. => Granularity::Group(size.unsigned_abs() as usize),
            other => return Err(invalid(format!("group_size is {other}; give -1 or more than 0"))),
        };
        if ![2, 3, 4, 8].contains(&spec.bits) {
            return Err(invalid(format!("bits is {}; 2, 3, 4 and 8 exist", spec.bits)));
        }
        let mut packed = PackedLinear {
            layout: layout.id(),
            scheme: QuantScheme {
                bits: spec.bits as u8,
                granularity,
                symmetric: spec.symmetric != 0,
                scale_grid: ScaleGrid::F32,
                zero_min: layout.zero_min(),
                activations: attar_tensor::ActivationScheme::Float,
            },
            out_features: size(spec.out_features, "out_features")?,
            in_features: size(spec.in_features, "in_features")?,
            parts: Vec::new(),
        };
        let parts = match n_parts {
            0 => &[][..],
            // SAFETY: not null, and the caller says that there are so many.
            n => unsafe { slice::from_raw_parts(parts, n) },
        };
        for part in parts {
            // SAFETY: the header's condition on the string.
            let given = unsafe { text(part.suffix, "suffix of a part") }?;
            let suffix = attar_kernels::layout::SUFFIXES.iter().find(|&&known| known == given);
            let suffix = suffix.ok_or_else(|| {
                invalid(format!("`{given}` is no part of a packed linear in any layout"))
            })?;
            // SAFETY: the header's condition on parts.
            packed.parts.push((suffix, unsafe { tensor(part, suffix) }?));
        }
        let activations = match activations {
            0 => Activations::F32,
            1 => Activations::Int8,
            other => return Err(invalid(format!("activations is {other}; 0 and 1 exist"))),
        };
        let (_, prepared) = attar_kernels::select_kernel(&packed, activations)
            .map_err(|error| Failure(Status::Layout, error.to_string()))?;
        // SAFETY: not null; the caller gives a place for one pointer.
        unsafe { *linear = Box::into_raw(Box::new(Linear(prepared))) };
        Ok(())
    })
}

/// `attar_linear_matmul`.
///
/// # Safety
/// `linear` comes from [`attar_linear_prepare`]; `x` and `y` hold the numbers that the header names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn attar_linear_matmul(
    linear: *const Linear,
    x: *const f32,
    m: usize,
    y: *mut f32,
) -> Status {
    guard(|| {
        if linear.is_null() {
            return Err(invalid("linear is null"));
        }
        if m == 0 {
            return Ok(());
        }
        if m as u64 > MOST || x.is_null() || y.is_null() {
            return Err(invalid(format!("x or y is null, or m is over {MOST}")));
        }
        // SAFETY: not null, and made by `attar_linear_prepare`, whose result is never written to.
        let linear = unsafe { &*linear };
        let (inputs, outputs) = (linear.0.in_features(), linear.0.out_features());
        if m.checked_mul(4 * inputs.max(outputs)).is_none_or(|bytes| bytes > isize::MAX as usize) {
            return Err(invalid(format!("{m} rows are beyond the address space")));
        }
        // SAFETY: the caller gives m * in_features numbers to read ...
        let x = unsafe { slice::from_raw_parts(x, m * inputs) };
        // SAFETY: ... and m * out_features to write, which do not overlap x.
        let y = unsafe { slice::from_raw_parts_mut(y, m * outputs) };
        linear.0.matmul(x, m, y);
        Ok(())
    })
}

/// `attar_linear_resident_bytes`.
///
/// # Safety
/// Null, or from [`attar_linear_prepare`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn attar_linear_resident_bytes(linear: *const Linear) -> usize {
    // SAFETY: null, or made by `attar_linear_prepare`.
    unsafe { linear.as_ref() }.map_or(0, |linear| linear.0.resident_bytes())
}

/// `attar_linear_free`.
///
/// # Safety
/// Null, or from [`attar_linear_prepare`] and not freed before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn attar_linear_free(linear: *mut Linear) {
    if !linear.is_null() {
        // SAFETY: made by `Box::into_raw` in `attar_linear_prepare`, and freed once.
        drop(unsafe { Box::from_raw(linear) });
    }
}
