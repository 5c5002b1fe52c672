//! Toy graph, fake passes and layouts.
