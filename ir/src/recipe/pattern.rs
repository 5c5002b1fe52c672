//! Patterns of site names, and the nearest name to a misspelt one.

/// True when `pattern` (`*`: any characters, `?`: one character) matches the whole of `name` or the part
/// behind any of its dots: `mlp.*`, `*.q_proj` and `layers.0.*` match sites of
/// `model.layers.0.mlp.up_proj`'s kind.
pub fn matches(pattern: &str, name: &str) -> bool {
    let starts = std::iter::once(0).chain(name.match_indices('.').map(|(at, _)| at + 1));
    starts.into_iter().any(|start| glob(pattern.as_bytes(), &name.as_bytes()[start..]))
}

/// As [`fn@matches`], but the output head is selected only by a pattern that names it: `*` means the
/// linears of the decoder blocks.
pub fn selects(pattern: &str, name: &str) -> bool {
    matches(pattern, name) && (name != "lm_head" || pattern.starts_with("lm_head"))
}

/// The candidate that is spelt most like `word`, when any is close.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    const CLOSE: f64 = 0.5;
    // The beginning of a name is nearer than its length says: `group` means `group_size`.
    const PREFIX: f64 = 0.6;
    let mut best = None;
    let mut best_score = CLOSE;
    for candidate in candidates {
        let mut score = strsim::normalized_damerau_levenshtein(word, candidate);
        if word.len() > 2 && candidate.starts_with(word) {
            score = score.max(PREFIX);
        }
        if score > best_score {
            best = Some(candidate);
            best_score = score;
        }
    }
    best
}

/// Glob with backtracking to the last star: O(pattern · text).
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_whole_names_and_suffixes_at_dots() {
        let up = "model.layers.0.mlp.up_proj";
        for pattern in [
            "*",
            "mlp.*",
            "*.up_proj",
            "up_proj",
            "layers.0.*",
            "layers.?.mlp.*",
            "model.layers.0.mlp.up_proj",
            "*mlp*",
            "mlp.*_proj",
        ] {
            assert!(matches(pattern, up), "{pattern}");
        }
        for pattern in ["lp.*", "mlp", "layers.1.*", "*.up", "", "up_proj?"] {
            assert!(!matches(pattern, up), "{pattern}");
        }
    }

    #[test]
    fn the_head_must_be_named() {
        assert!(selects("lm_head", "lm_head") && selects("lm_head*", "lm_head"));
        assert!(!selects("*", "lm_head") && !selects("*head", "lm_head"));
    }

    #[test]
    fn the_nearest_name_is_close_or_none() {
        assert_eq!(nearest("schem", ["pass", "scheme", "sites"]), Some("scheme"));
        assert_eq!(nearest("group", ["bits", "group_size"]), Some("group_size"));
        assert_eq!(nearest("zzzz", ["pass", "scheme"]), None);
    }
}
