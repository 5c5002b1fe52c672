//! `attar inspect`.

use serde_json::json;

use crate::{Error, args::Inspect, packed::Opened};

pub(crate) fn inspect(args: &Inspect) -> Result<bool, Error> {
    let model = Opened::open(&args.path)?;
    let spec = &model.decoder.spec;
    let headers = &model.headers();
    let bytes: usize = headers.iter().map(attar_tensor::TensorHeader::bytes).sum();
    let mut schemes = Vec::new();
    for site in model.linears() {
        let label = model.packed(site)?.map(|packed| packed.scheme.label());
        schemes.push((site.name.clone(), label));
    }
    if args.json {
        let tensors: Vec<_> = headers
            .iter()
            .map(|h| {
                json!({"name": h.name, "dtype": h.dtype.safetensors_name(), "shape": h.shape, "bytes": h.bytes()})
            })
            .collect();
        let sites: Vec<_> =
            schemes.iter().map(|(name, label)| json!({"site": name, "scheme": label})).collect();
        say!(
            "{}",
            serde_json::to_string_pretty(&json!({
                "family": spec.family, "layers": spec.layers, "hidden": spec.hidden,
                "vocab": spec.vocab, "context": spec.context, "tied": spec.tied,
                "layout": model.layout(), "bits_per_weight": model.bits_per_weight(),
                "bytes": bytes, "tensors": tensors, "sites": sites,
            }))?
        );
        return Ok(true);
    }
    say!(
        "{}: {} layers, hidden {}, {} / {} heads of {}, vocabulary {}, context {}{}",
        spec.family,
        spec.layers,
        spec.hidden,
        spec.heads,
        spec.kv_heads,
        spec.head_dim,
        spec.vocab,
        spec.context,
        if spec.tied { ", tied embedding" } else { "" }
    );
    say!(
        "layout {}, {:.3} bits per weight, {} tensors, {:.2} MB",
        model.layout().unwrap_or("dense"),
        model.bits_per_weight(),
        headers.len(),
        bytes as f64 / 1e6
    );
    let width = headers.iter().map(|h| h.name.len()).max().unwrap_or(0);
    for h in headers {
        let shape = format!("{:?}", h.shape);
        say!("{:<width$}  {:<5} {:<16} {:>12}", h.name, h.dtype, shape, h.bytes());
    }
    for (site, label) in &schemes {
        if let Some(label) = label {
            say!("{site}: {label}");
        }
    }
    Ok(true)
}
