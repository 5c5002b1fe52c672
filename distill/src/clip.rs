//! Clipping of gradients by their common norm (Pascanu et al. 2012, arXiv:1211.5063): all tensors of a step are
//! scaled by `min(1, limit / ‖g‖)`, `‖g‖` over all of them, f64 in a fixed order.

use attar_tensor::linalg::sum_sq;

/// Elements summed in f32 before they go to f64.
const CHUNK: usize = 4096;

/// `‖g‖` over all tensors.
pub fn norm<'a>(gradients: impl IntoIterator<Item = &'a [f32]>) -> f64 {
    let chunks = gradients.into_iter().flat_map(|gradient| gradient.chunks(CHUNK));
    chunks.map(|chunk| f64::from(sum_sq(chunk))).sum::<f64>().sqrt()
}

/// Scales `gradients` so that their common norm is at most `limit`, and returns what it was before.
pub fn clip_norm(gradients: &mut [&mut [f32]], limit: f64) -> f64 {
    let norm = norm(gradients.iter().map(|gradient| &**gradient));
    if norm > limit {
        let scale = (limit / norm) as f32;
        gradients.iter_mut().flat_map(|gradient| gradient.iter_mut()).for_each(|g| *g *= scale);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gradients_are_shortened_together_and_short_ones_left_alone() {
        let (mut a, mut b) = (vec![3.0f32], vec![0.0f32, 4.0]);
        assert!((clip_norm(&mut [&mut a, &mut b], 10.0) - 5.0).abs() < 1e-9);
        assert_eq!((a[0], b[1]), (3.0, 4.0));
        assert!((clip_norm(&mut [&mut a, &mut b], 1.0) - 5.0).abs() < 1e-9);
        assert!((a[0] - 0.6).abs() < 1e-6 && (b[1] - 0.8).abs() < 1e-6);
        assert!((norm([a.as_slice(), &b]) - 1.0).abs() < 1e-6);
        let long = vec![0.5f32; 3 * CHUNK + 1];
        let wanted = (0.25 * long.len() as f64).sqrt();
        assert!((norm([long.as_slice()]) - wanted).abs() < 1e-3);
    }
}
