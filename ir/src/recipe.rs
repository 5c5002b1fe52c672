//! The file the user writes: TOML, unknown keys refused.

/// Why a recipe could not be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The TOML is not well-formed or a value has the wrong type.
    #[error("{path}: {reason}")]
    Invalid {
        /// Key path, e.g. `step[1].scheme.bits`.
        path: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A key that nobody reads.
    #[error("{path}: unknown key `{key}`{}", suggestion.as_ref().map_or_else(String::new, |s| format!("; did you mean `{s}`?")))]
    UnknownKey {
        /// Path of the table.
        path: String,
        /// The key.
        key: String,
        /// The nearest known key.
        suggestion: Option<String>,
    },
}
