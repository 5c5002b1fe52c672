//! Loss curves of trainings, drawn into the report.

use std::fmt::Write;

use attar_ir::{ModelEntry, TrainingReport};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 60.0;

/// Every training of a run: its numbers, and the curve of its loss.
pub(crate) fn trainings(out: &mut String, entries: &[ModelEntry]) -> std::fmt::Result {
    for entry in entries {
        if let Some(training) = &entry.training {
            write!(
                out,
                "<h2>Training</h2><p>{}: {} in {} steps on {} tokens, {} values trained.",
                crate::html::escape(&entry.step),
                crate::html::escape(&training.loss),
                training.steps,
                training.tokens,
                training.trained
            )?;
            curve(out, training)?;
        }
    }
    Ok(())
}

fn curve(out: &mut String, training: &TrainingReport) -> std::fmt::Result {
    let points = &training.curve;
    let (Some(&(last, end)), Some(&(_, start))) = (points.last(), points.first()) else {
        return Ok(());
    };
    let low = points.iter().fold(f64::INFINITY, |low, point| low.min(point.1));
    let high = points.iter().fold(f64::NEG_INFINITY, |high, point| high.max(point.1));
    let span = (high - low).max(1e-9);
    let x = |step: usize| LEFT + (WIDTH - LEFT - 10.0) * step as f64 / last.max(1) as f64;
    let y = |loss: f64| 10.0 + (HEIGHT - 40.0) * (high - loss) / span;
    write!(out, "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"loss by step\">")?;
    for loss in [high, f64::midpoint(high, low), low] {
        write!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{0:.1}\" y2=\"{0:.1}\" stroke=\"#e4e8ee\"/>\
             <text x=\"{1}\" y=\"{2:.1}\" font-size=\"12\" text-anchor=\"end\" fill=\"#5b6878\">{loss:.4}</text>",
            y(loss),
            LEFT - 6.0,
            y(loss) + 4.0
        )?;
    }
    let line: Vec<String> =
        points.iter().map(|&(step, loss)| format!("{:.1},{:.1}", x(step), y(loss))).collect();
    write!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#4269d0\" stroke-width=\"2\"/>\
         <text x=\"{LEFT}\" y=\"{:.1}\" font-size=\"12\" fill=\"#5b6878\">loss by step, mean of {} points: {start:.4} at first, \
         {end:.4} at step {last}</text></svg>",
        line.join(" "),
        HEIGHT - 8.0,
        points.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_has_a_point_for_each_mean_and_none_is_drawn_without() {
        let mut entry = ModelEntry { step: "step[1] (<distill>)".into(), ..Default::default() };
        let mut out = String::new();
        trainings(&mut out, std::slice::from_ref(&entry)).unwrap();
        assert!(out.is_empty());
        let curve = vec![(2, 3.0), (4, 2.0), (6, 1.0)];
        entry.training = Some(TrainingReport {
            loss: "forward_kl".into(),
            steps: 6,
            tokens: 600,
            trained: 9,
            curve,
        });
        trainings(&mut out, &[entry]).unwrap();
        assert!(out.contains("&lt;distill&gt;") && out.contains("6 steps on 600 tokens"));
        assert!(out.contains("points=\"336.7,10.0 613.3,100.0 890.0,190.0\""), "{out}");
    }
}
