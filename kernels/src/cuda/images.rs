//! The kernels as text and as the machine code that stands in this binary.
//!
//! `kernels/cuda/build.sh` compiles the text into `kernels/cuda/attar.images`: `ATTARCU1`, the FNV-1a hash of the text (u64), the
//! number of images (u64), their names (8 bytes) and sizes (u64), then one zstd stream of all of them. It is compressed because
//! one kernel per width, type and tile makes megabytes of code that repeats itself; a program pays for it when it first
//! opens a GPU.

use std::io::Read;

/// What `kernels/cuda/build.sh` made.
static IMAGES: &[u8] = include_bytes!("../../cuda/attar.images");

/// Machine code for one architecture, or PTX.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `sm_80` and so on, or `ptx`.
    pub name: String,
    /// An ELF file, or text.
    pub bytes: Vec<u8>,
}

/// Device code with its includes put in: what NVRTC takes as it is, without headers.
pub fn source() -> String {
    let mut text = String::new();
    for line in include_str!("device/attar.cu").split_inclusive('\n') {
        let include = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix("\"\n"));
        text.push_str(include.map_or(line, included));
    }
    text
}

/// Headers that `device/attar.cu` includes.
fn included(path: &str) -> &'static str {
    match path {
        "ptx.cuh" => include_str!("device/ptx.cuh"),
        "codes.cuh" => include_str!("device/codes.cuh"),
        "matmul.cuh" => include_str!("device/matmul.cuh"),
        "decode.cuh" => include_str!("device/decode.cuh"),
        "gemm.cuh" => include_str!("device/gemm.cuh"),
        "hopper_ptx.cuh" => include_str!("device/hopper_ptx.cuh"),
        "hopper.cuh" => include_str!("device/hopper.cuh"),
        "stream.cuh" => include_str!("device/stream.cuh"),
        "arrange.cuh" => include_str!("device/arrange.cuh"),
        "repack.cuh" => include_str!("device/repack.cuh"),
        "../../layout/gptq/repack.cuh" => include_str!("../layout/gptq/repack.cuh"),
        "../../layout/awq/repack.cuh" => include_str!("../layout/awq/repack.cuh"),
        "../../layout/ct_packed/repack.cuh" => include_str!("../layout/ct_packed/repack.cuh"),
        _ => unreachable!("every include of attar.cu is named here: {path}"),
    }
}

/// 64-bit FNV-1a.
pub fn hash(text: &str) -> u64 {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    text.bytes().fold(0xcbf2_9ce4_8422_2325, step)
}

fn word(at: usize) -> u64 {
    u64::from_le_bytes(IMAGES[at..at + 8].try_into().expect("eight bytes were cut"))
}

/// Hash of the text that the images were made of.
pub fn images_hash() -> u64 {
    word(8)
}

/// All images of this binary.
///
/// # Panics
/// When the binary's own bytes are damaged.
pub fn images() -> Vec<Image> {
    let count = word(16) as usize;
    let mut stream = ruzstd::decoding::StreamingDecoder::new(&IMAGES[24 + 16 * count..])
        .expect("the images of this binary are a zstd stream");
    let image = |i: usize| {
        let at = 24 + 16 * i;
        let name = IMAGES[at..at + 8].iter().take_while(|&&byte| byte != 0);
        let mut bytes = vec![0; word(at + 8) as usize];
        stream.read_exact(&mut bytes).expect("the stream holds every image");
        Image { name: name.map(|&byte| char::from(byte)).collect(), bytes }
    };
    (0..count).map(image).collect()
}

/// Images that a device of this compute capability can run, best first: the machine code of its own architecture, of an older
/// one of the same generation, then PTX, which the driver compiles.
pub fn suitable(images: &[Image], major: i32, minor: i32) -> Vec<&Image> {
    let mut cubins: Vec<(i32, &Image)> = Vec::new();
    for image in images {
        let Some(name) = image.name.strip_prefix("sm_") else { continue };
        let specific = name.ends_with('a');
        let Ok(number) = name.trim_end_matches('a').parse::<i32>() else { continue };
        let fits = number / 10 == major
            && if specific { number % 10 == minor } else { number % 10 <= minor };
        if fits {
            cubins.push((number, image));
        }
    }
    cubins.sort_by_key(|&(number, _)| std::cmp::Reverse(number));
    let ptx = images.iter().filter(|image| image.name == "ptx" && (major, minor) >= (8, 0));
    cubins.into_iter().map(|(_, image)| image).chain(ptx).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_belong_to_these_sources() {
        assert_eq!(&IMAGES[..8], b"ATTARCU1");
        assert_eq!(
            hash(&source()),
            images_hash(),
            "the CUDA sources changed: run kernels/cuda/build.sh and commit what it makes"
        );
        let report = include_str!("../../cuda/report.txt");
        assert!(report.contains(&format!("{:016x}", images_hash())));
    }

    #[test]
    fn images_are_whole_and_devices_find_theirs() {
        let images = images();
        let names: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
        assert_eq!(names, ["sm_80", "sm_86", "sm_89", "sm_90a", "ptx"]);
        for image in &images {
            let start: &[u8] = if image.name == "ptx" { b"//" } else { b"\x7fELF" };
            assert!(image.bytes.starts_with(start), "{}", image.name);
            let has = |name: &str| {
                image.bytes.windows(name.len()).any(|window| window == name.as_bytes())
            };
            assert!(has("attar_decode_w4_f16_8") && has("attar_gemm_w8_bf16_128"));
        }
        let best = |major, minor| suitable(&images, major, minor).first().map(|i| i.name.clone());
        assert_eq!(best(8, 0).as_deref(), Some("sm_80"));
        assert_eq!(best(8, 7).as_deref(), Some("sm_86"));
        assert_eq!(best(8, 9).as_deref(), Some("sm_89"));
        assert_eq!(best(9, 0).as_deref(), Some("sm_90a"));
        assert_eq!(best(12, 0).as_deref(), Some("ptx"));
        assert_eq!(best(7, 5), None);
    }
}
