//! block_rate TYPE ROWS COLUMNS WEIGHT.f32 [IMPORTANCE.f32]: seconds and weighted squared error of the search for a
//! block type on raw little-endian floats; one line of JSON. `bench/block_search.py` compares it with ggml's.
#![allow(clippy::print_stdout, reason = "an example prints its result")]

use std::{error::Error, fs, time::Instant};

use attar_tensor::{BlockType, block_search};

fn floats(path: &str) -> Result<Vec<f32>, Box<dyn Error>> {
    let number = |b: &[u8]| f32::from_le_bytes(b.try_into().unwrap_or_default());
    Ok(fs::read(path)?.chunks_exact(4).map(number).collect())
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, rows, columns, weight, importance @ ..] = args.as_slice() else {
        return Err("block_rate TYPE ROWS COLUMNS WEIGHT.f32 [IMPORTANCE.f32]".into());
    };
    let block = BlockType::from_name(name).ok_or("unknown type")?;
    let (rows, columns): (usize, usize) = (rows.parse()?, columns.parse()?);
    let weight = floats(weight)?;
    let importance = importance.first().map(|path| floats(path)).transpose()?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let begun = Instant::now();
    let found =
        pool.install(|| block_search::search(block, &weight, rows, columns, importance.as_deref()));
    let seconds = begun.elapsed().as_secs_f64();
    let (mut weighted, mut plain) = (0.0f64, 0.0f64);
    let values = found.dequantize();
    for (row, w) in values.outer_iter().zip(weight.chunks_exact(columns)) {
        for (c, (a, b)) in row.iter().zip(w).enumerate() {
            let e = f64::from(a - b).powi(2);
            plain += e;
            weighted += e * importance.as_ref().map_or(1.0, |h| f64::from(h[c]));
        }
    }
    println!("{{\"seconds\": {seconds}, \"weighted\": {weighted}, \"plain\": {plain}}}");
    Ok(())
}
