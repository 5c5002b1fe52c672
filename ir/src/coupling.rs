//! The coupling table: which axes of which tensors are one and the same dimension.
//!
//! A dimension of the model (its hidden width, a block's FFN, its heads) appears as an axis of several
//! tensors. What cuts it must cut all of them, what rotates it must rotate all of them, each on its own
//! side. The table is computed from a [`ModelGraph`]'s roles, so nobody who reads it looks at names.

use serde::{Deserialize, Serialize};

use crate::{Block, ModelGraph, Producer, Role};

/// A dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DimName {
    /// Rows of embedding and output head.
    Vocab,
    /// Channels of the residual stream.
    Hidden,
    /// Channels of a block's MLP.
    Ffn(usize),
    /// Key/value heads of a block, each with the query heads that read it.
    KvGroup(usize),
    /// Query heads of a block.
    Head(usize),
    /// Channels inside the value heads of a block.
    ValueChannel(usize),
}

impl DimName {
    /// The block that it belongs to; `None` for dimensions of the whole model.
    pub const fn block(self) -> Option<usize> {
        match self {
            Self::Vocab | Self::Hidden => None,
            Self::Ffn(block)
            | Self::KvGroup(block)
            | Self::Head(block)
            | Self::ValueChannel(block) => Some(block),
        }
    }
}

impl std::fmt::Display for DimName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vocab => f.write_str("vocabulary"),
            Self::Hidden => f.write_str("hidden"),
            Self::Ffn(block) => write!(f, "ffn[{block}]"),
            Self::KvGroup(block) => write!(f, "kv_group[{block}]"),
            Self::Head(block) => write!(f, "head[{block}]"),
            Self::ValueChannel(block) => write!(f, "value_channel[{block}]"),
        }
    }
}

/// What a tensor does with a dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Its values are made along it: rows of a linear, its bias, columns of the embedding.
    Makes,
    /// It is read along it: columns of a linear.
    Reads,
    /// Each element multiplies one channel: the weight of a norm.
    Scales,
}

/// One axis of one tensor that is a dimension. The axis has `outer · size · stride` elements; element
/// `(o · size + i) · stride + s` belongs to index `i`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Full tensor name.
    pub tensor: String,
    /// The axis, outermost first.
    pub axis: usize,
    /// How often the dimension is repeated along the axis.
    pub outer: usize,
    /// Elements of one index.
    pub stride: usize,
    /// What the tensor does with it.
    pub side: Side,
}

impl Member {
    /// The index that an element of the axis belongs to, for a dimension of `size`.
    pub const fn index(&self, element: usize, size: usize) -> usize {
        element / self.stride % size
    }

    /// Places along the axis of the indices `kept`, in the axis's own order, for a dimension of `size`.
    pub fn places(&self, size: usize, kept: &[usize]) -> Vec<usize> {
        let mut places = Vec::with_capacity(self.outer * kept.len() * self.stride);
        for outer in 0..self.outer {
            for &index in kept {
                let start = (outer * size + index) * self.stride;
                places.extend(start..start + self.stride);
            }
        }
        places
    }
}

/// A dimension with everything that has to agree on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Dim {
    /// Its name.
    pub name: DimName,
    /// Number of indices.
    pub size: usize,
    /// Every axis that is it.
    pub members: Vec<Member>,
}

/// Sizes that a pass on the whole model may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Decoder blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of every block's MLP.
    pub ffn: usize,
    /// Query heads of every block.
    pub heads: usize,
    /// Key/value heads of every block.
    pub kv_heads: usize,
    /// Output head and embedding share one tensor.
    pub tied: bool,
}

impl Sizes {
    /// The size of a dimension after the change; vocabulary and value channels never change.
    pub const fn of(&self, name: DimName, before: usize) -> usize {
        match name {
            DimName::Vocab | DimName::ValueChannel(_) => before,
            DimName::Hidden => self.hidden,
            DimName::Ffn(_) => self.ffn,
            DimName::KvGroup(_) => self.kv_heads,
            DimName::Head(_) => self.heads,
        }
    }
}

fn member(tensor: String, axis: usize, (outer, stride): (usize, usize), side: Side) -> Member {
    Member { tensor, axis, outer, stride, side }
}

/// Rows of a site and its bias.
fn made(block: &Block, site: usize, repeat: (usize, usize)) -> Vec<Member> {
    let site = &block.sites[site];
    let mut all = vec![member(format!("{}.weight", site.name), 0, repeat, Side::Makes)];
    if site.bias {
        all.push(member(format!("{}.bias", site.name), 0, repeat, Side::Makes));
    }
    all
}

fn read(block: &Block, site: usize, repeat: (usize, usize)) -> Member {
    member(format!("{}.weight", block.sites[site].name), 1, repeat, Side::Reads)
}

fn of_role(block: &Block, role: Role) -> Option<usize> {
    block.sites.iter().position(|site| site.role == role)
}

impl ModelGraph {
    /// The sizes that may change.
    pub fn sizes(&self) -> Sizes {
        let first = self.blocks.first();
        let attention = first.and_then(|block| block.attention);
        let ffn =
            first.and_then(|block| Some(block.sites[of_role(block, Role::Down)?].in_features));
        Sizes {
            layers: self.blocks.len(),
            hidden: self.hidden,
            ffn: ffn.unwrap_or(0),
            heads: attention.map_or(0, |a| a.heads),
            kv_heads: attention.map_or(0, |a| a.kv_heads),
            tied: self.tied,
        }
    }

    /// The coupling table. A tied output head is the embedding's tensor and stands there once.
    pub fn dims(&self) -> Vec<Dim> {
        const ONE: (usize, usize) = (1, 1);
        let head = format!("{}.weight", self.epilogue.sites[0].name);
        let mut vocab = vec![member(self.embedding.clone(), 0, ONE, Side::Makes)];
        let mut hidden = vec![member(self.embedding.clone(), 1, ONE, Side::Makes)];
        let mut dims = Vec::new();
        for block in &self.blocks {
            hidden.extend(
                block.norms.iter().map(|norm| member(norm.tensor.clone(), 0, ONE, Side::Scales)),
            );
            let (mut ffn, mut groups, mut heads, mut values) = (vec![], vec![], vec![], vec![]);
            let shape = block.attention.expect("decoder blocks have attention");
            let (dim, repeat) = (shape.head_dim, shape.heads / shape.kv_heads);
            for (at, site) in block.sites.iter().enumerate() {
                match site.role {
                    Role::Query => {
                        groups.extend(made(block, at, (1, repeat * dim)));
                        heads.extend(made(block, at, (1, dim)));
                    }
                    Role::Key => groups.extend(made(block, at, (1, dim))),
                    Role::Value => {
                        groups.extend(made(block, at, (1, dim)));
                        values.extend(made(block, at, (shape.kv_heads, 1)));
                    }
                    Role::AttentionOutput => {
                        groups.push(read(block, at, (1, repeat * dim)));
                        heads.push(read(block, at, (1, dim)));
                        values.push(read(block, at, (shape.heads, 1)));
                    }
                    Role::Gate | Role::Up => ffn.extend(made(block, at, ONE)),
                    Role::Down => ffn.push(read(block, at, ONE)),
                    Role::Head => {}
                }
                match site.role {
                    Role::AttentionOutput | Role::Down => hidden.extend(made(block, at, ONE)),
                    Role::Head => {}
                    _ => hidden.push(read(block, at, ONE)),
                }
            }
            let width = of_role(block, Role::Down).map_or(0, |at| block.sites[at].in_features);
            let of = |name, size, members| Dim { name, size, members };
            dims.extend([
                of(DimName::Ffn(block.index), width, ffn),
                of(DimName::KvGroup(block.index), shape.kv_heads, groups),
                of(DimName::Head(block.index), shape.heads, heads),
                of(DimName::ValueChannel(block.index), dim, values),
            ]);
        }
        hidden.push(member(self.epilogue.norms[0].tensor.clone(), 0, ONE, Side::Scales));
        if !self.tied {
            hidden.push(member(head.clone(), 1, ONE, Side::Reads));
            vocab.push(member(head, 0, ONE, Side::Makes));
        }
        dims.push(Dim { name: DimName::Hidden, size: self.hidden, members: hidden });
        dims.push(Dim { name: DimName::Vocab, size: self.vocab, members: vocab });
        dims
    }

    /// One dimension of the table.
    pub fn dim(&self, name: DimName) -> Option<Dim> {
        self.dims().into_iter().find(|dim| dim.name == name)
    }

    /// Norm tensor whose weight scales what the linear `tensor` reads, when a fold says so.
    pub fn norm_before(&self, tensor: &str) -> Option<&str> {
        let site = tensor.strip_suffix(".weight")?;
        self.all_blocks().find_map(|block| {
            let at = block.sites.iter().position(|known| known.name == site)?;
            let input = block.input_of(at);
            block.folds.iter().find_map(|fold| match fold.producer {
                Producer::Norm(norm) if fold.input == input => {
                    Some(block.norms[norm].tensor.as_str())
                }
                _ => None,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_found_on_every_axis() {
        let heads = member("q".into(), 0, (1, 2), Side::Makes);
        assert_eq!(heads.places(3, &[0, 2]), [0, 1, 4, 5]);
        let channels = member("v".into(), 0, (2, 1), Side::Makes);
        assert_eq!(channels.places(3, &[0, 2]), [0, 2, 3, 5]);
        for member in [heads, channels] {
            for index in 0..3 {
                let places = member.places(3, &[index]);
                assert!(places.iter().all(|&place| member.index(place, 3) == index));
            }
        }
    }
}
