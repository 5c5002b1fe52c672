//! Gates: a report against a policy. A metric that the policy names but the report lacks is an error,
//! never a pass.

use std::fmt::Write;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Limits, from a TOML file; absent limits are not checked.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// A report or evaluation to compare with; without it ratios use the report's own reference.
    pub baseline: Option<String>,
    /// Largest perplexity over the baseline's.
    pub max_perplexity_ratio: Option<f64>,
    /// Largest mean KL divergence from the original, nats.
    pub max_kl_mean: Option<f64>,
    /// Smallest top-1 agreement with the original.
    pub min_top1_agreement: Option<f64>,
    /// Largest size of the weight files over the baseline's (or the source's).
    pub max_bytes_ratio: Option<f64>,
    /// How well each linear's CPU kernel must have been proved at least, a word of [`KERNEL_STATUS`].
    pub min_kernel_status_cpu: Option<KernelStatus>,
    /// The same of CUDA kernels.
    pub min_kernel_status_cuda: Option<KernelStatus>,
}

/// How well a kernel was proved, worst first; verdicts give the number in this list.
pub const KERNEL_STATUS: [&str; 3] =
    ["unmeasured", "validated on the shim", "validated on hardware"];

/// A word of [`KERNEL_STATUS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum KernelStatus {
    /// Compiled at most.
    #[serde(rename = "unmeasured")]
    Unmeasured,
    /// Run on a CPU in place of the GPU.
    #[serde(rename = "validated on the shim")]
    Shim,
    /// Run where it belongs.
    #[serde(rename = "validated on hardware")]
    Hardware,
}

/// Why a gate could not be judged.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum GateError {
    /// The policy cannot be read.
    #[error("policy: {0}")]
    Policy(String),
    /// A metric is missing.
    #[error("the policy limits {limit}, but {place} has no `{metric}`; {remedy}")]
    Missing {
        /// The policy's key.
        limit: &'static str,
        /// The metric that is needed.
        metric: &'static str,
        /// Report or baseline.
        place: &'static str,
        /// How to get it.
        remedy: &'static str,
    },
    /// Measurements that do not compare.
    #[error(
        "the baseline was measured with {fact} {baseline}, the report with {report}; perplexities \
         compare only on the same windows, so measure both alike"
    )]
    Protocol {
        /// `context`, `score` or `tokens`.
        fact: &'static str,
        /// The baseline's value.
        baseline: String,
        /// The report's value.
        report: String,
    },
}

/// One limit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// The policy's key.
    pub name: &'static str,
    /// Measured.
    pub value: f64,
    /// Allowed.
    pub limit: f64,
    /// Kept.
    pub pass: bool,
}

/// All limits of a policy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Every limit kept.
    pub pass: bool,
    /// One by one.
    pub checks: Vec<Check>,
}

impl Policy {
    /// Reads TOML, or JSON when the text begins with a brace. Memory taken: at most 1024 bytes for each byte
    /// of the text plus 64 KiB.
    ///
    /// # Errors
    /// Unknown keys, wrong types, limits that are not finite, or a policy that limits nothing.
    pub fn parse(text: &str) -> Result<Self, GateError> {
        let policy: Self = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|error| GateError::Policy(error.to_string()))?
        } else {
            toml::from_str(text).map_err(|error| GateError::Policy(error.to_string()))?
        };
        let limits = [
            policy.max_perplexity_ratio,
            policy.max_kl_mean,
            policy.min_top1_agreement,
            policy.max_bytes_ratio,
        ];
        if limits.iter().flatten().any(|limit| !limit.is_finite()) {
            return Err(GateError::Policy("limits must be finite numbers".into()));
        }
        let statuses = [policy.min_kernel_status_cpu, policy.min_kernel_status_cuda];
        if limits.iter().all(Option::is_none) && statuses.iter().all(Option::is_none) {
            return Err(GateError::Policy("limits nothing, so it cannot pass".into()));
        }
        Ok(policy)
    }

    /// Judges a report (of `attar compress` or `attar eval --json`).
    ///
    /// # Errors
    /// When a named metric is missing or contexts differ.
    pub fn judge(&self, report: &Value, baseline: Option<&Value>) -> Result<Verdict, GateError> {
        let number = |value: &Value, key: &str| metric_of(value, key).and_then(Value::as_f64);
        let need = |limit, metric: &'static str| {
            number(report, metric).filter(|v| v.is_finite()).ok_or(GateError::Missing {
                limit,
                metric,
                place: "the report",
                remedy: "measure it with `attar eval PATH --text FILE --reference CHECKPOINT --json`",
            })
        };
        let of_baseline = |limit, metric: &'static str, own: &'static str| {
            let found = match baseline {
                Some(baseline) => number(baseline, metric),
                None => number(report, own),
            };
            let (metric, place) =
                if baseline.is_some() { (metric, "the baseline") } else { (own, "the report") };
            found.filter(|v| v.is_finite() && *v > 0.0).ok_or(GateError::Missing {
                limit,
                metric,
                place,
                remedy: "name a `baseline` report in the policy or evaluate with --reference",
            })
        };
        let mut checks = Vec::new();
        if let Some(limit) = self.max_perplexity_ratio {
            let value = need("max_perplexity_ratio", "perplexity")?;
            if let Some(baseline) = baseline {
                same_protocol(report, baseline)?;
            }
            let base = of_baseline("max_perplexity_ratio", "perplexity", "reference_perplexity")?;
            let value = value / base;
            checks.push(Check { name: "max_perplexity_ratio", value, limit, pass: value <= limit });
        }
        if let Some(limit) = self.max_kl_mean {
            let value = need("max_kl_mean", "kl_mean")?;
            checks.push(Check { name: "max_kl_mean", value, limit, pass: value <= limit });
        }
        if let Some(limit) = self.min_top1_agreement {
            let value = need("min_top1_agreement", "top1_agreement")?;
            checks.push(Check { name: "min_top1_agreement", value, limit, pass: value >= limit });
        }
        if let Some(limit) = self.max_bytes_ratio {
            let value = need("max_bytes_ratio", "file_bytes")?
                / of_baseline("max_bytes_ratio", "file_bytes", "source_bytes")?;
            checks.push(Check { name: "max_bytes_ratio", value, limit, pass: value <= limit });
        }
        for (name, metric, limit) in [
            ("min_kernel_status_cpu", "kernel_status_cpu", self.min_kernel_status_cpu),
            ("min_kernel_status_cuda", "kernel_status_cuda", self.min_kernel_status_cuda),
        ] {
            let Some(limit) = limit else { continue };
            let value = number(report, metric).ok_or(GateError::Missing {
                limit: name,
                metric,
                place: "the report",
                remedy: "put kernels into the artifact with `attar emit PATH` and judge its directory; \
                         a linear without a kernel of this backend has no status",
            })?;
            let limit = f64::from(limit as u8);
            checks.push(Check { name, value, limit, pass: value >= limit });
        }
        Ok(Verdict { pass: checks.iter().all(|check| check.pass), checks })
    }
}

/// A metric of a report of `attar compress` (under `eval`) or of `attar eval`.
fn metric_of<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    value.get("eval").and_then(|eval| eval.get(key)).or_else(|| value.get(key))
}

/// Refuses perplexities of other windows. A fact that one side does not state is not compared.
fn same_protocol(report: &Value, baseline: &Value) -> Result<(), GateError> {
    for fact in ["context", "score", "tokens"] {
        if let (Some(b), Some(r)) = (metric_of(baseline, fact), metric_of(report, fact))
            && b != r
        {
            let (baseline, report) = (b.to_string(), r.to_string());
            return Err(GateError::Protocol { fact, baseline, report });
        }
    }
    Ok(())
}

impl Verdict {
    /// A table for people.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{:<23} {:>10} {:>10}  result", "limit", "measured", "allowed");
        for c in &self.checks {
            let word = if c.pass { "ok" } else { "FAILED" };
            let _ = writeln!(out, "{:<23} {:>10.4} {:>10.4}  {word}", c.name, c.value, c.limit);
        }
        let _ = write!(out, "{}", if self.pass { "gate passed" } else { "gate FAILED" });
        out
    }

    /// JUnit XML, one test case per limit.
    pub fn junit(&self) -> String {
        let failures = self.checks.iter().filter(|check| !check.pass).count();
        let mut out = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"attar gate\" tests=\"{}\" failures=\"{failures}\">\n",
            self.checks.len()
        );
        for c in &self.checks {
            if c.pass {
                let _ = writeln!(out, "  <testcase name=\"{}\"/>", c.name);
            } else {
                let _ = writeln!(
                    out,
                    "  <testcase name=\"{}\"><failure message=\"measured {}, allowed {}\"/></testcase>",
                    c.name, c.value, c.limit
                );
            }
        }
        out.push_str("</testsuite>\n");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn limits_are_kept_broken_or_unjudgeable() {
        let policy = Policy::parse("max_perplexity_ratio = 1.05\nmax_kl_mean = 0.1").unwrap();
        let report = |ppl: f64| json!({"eval": {"perplexity": ppl, "reference_perplexity": 10.0, "kl_mean": 0.05, "context": 256}});
        assert!(policy.judge(&report(10.4), None).unwrap().pass);
        let verdict = policy.judge(&report(10.6), None).unwrap();
        assert!(!verdict.pass && verdict.junit().contains("failures=\"1\""));
        assert!(verdict.table().contains("FAILED"));
        let without = json!({"perplexity": 10.0});
        assert!(matches!(policy.judge(&without, None), Err(GateError::Missing { .. })));
        let baseline = json!({"perplexity": 10.0, "context": 512});
        assert!(matches!(
            policy.judge(&report(1.0), Some(&baseline)),
            Err(GateError::Protocol { fact: "context", .. })
        ));
        let nan =
            json!({"eval": {"perplexity": 10.0, "reference_perplexity": 10.0, "kl_mean": null}});
        assert!(policy.judge(&nan, None).is_err());
        assert!(Policy::parse("").is_err());
    }

    #[test]
    fn kernels_are_judged_by_how_well_they_were_proved() {
        let policy = Policy::parse("min_kernel_status_cpu = 'validated on the shim'").unwrap();
        for (value, pass) in [(0.0, false), (1.0, true), (2.0, true)] {
            let verdict = policy.judge(&json!({"kernel_status_cpu": value}), None).unwrap();
            assert_eq!(verdict.pass, pass, "{}", KERNEL_STATUS[value as usize]);
        }
        let error = policy.judge(&json!({"kernel_status_cuda": 2.0}), None).unwrap_err();
        assert!(error.to_string().contains("attar emit"), "{error}");
        assert!(Policy::parse("min_kernel_status_cuda = 'fast'").is_err());
    }

    #[test]
    fn policies_are_toml_or_json_and_refuse_unknown_keys() {
        let toml = Policy::parse("min_top1_agreement = 0.9").unwrap();
        assert_eq!(Policy::parse("{\"min_top1_agreement\": 0.9}").unwrap(), toml);
        for text in ["max_kl = 1.0", "{\"max_kl\": 1.0}"] {
            let error = Policy::parse(text).unwrap_err().to_string();
            assert!(error.contains("max_kl") && error.contains("max_kl_mean"), "{error}");
        }
        assert!(Policy::parse("max_kl_mean = \"low\"").is_err());
        assert!(Policy::parse("max_kl_mean = nan").is_err());
    }

    #[test]
    fn each_limit_is_judged_on_its_own_side() {
        let report = json!({"file_bytes": 250, "source_bytes": 1000, "top1_agreement": 0.95});
        let judge = |text: &str| Policy::parse(text).unwrap().judge(&report, None);
        assert!(judge("max_bytes_ratio = 0.25").unwrap().pass);
        assert!(!judge("max_bytes_ratio = 0.24").unwrap().pass);
        assert!(judge("min_top1_agreement = 0.95").unwrap().pass);
        assert!(!judge("min_top1_agreement = 0.96").unwrap().pass);
        assert!(judge("max_kl_mean = 9.0").is_err());
        let baseline = json!({"file_bytes": 0});
        let policy = Policy::parse("max_bytes_ratio = 1.0").unwrap();
        assert!(policy.judge(&report, Some(&baseline)).is_err());
    }
}
