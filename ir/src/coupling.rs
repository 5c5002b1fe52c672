//! The coupling table: which axes of which tensors are one and the same dimension.
//!
//! A dimension of the model (its hidden width, a block's FFN, its heads) appears as an axis of several
//! tensors. What cuts it must cut all of them, what rotates it must rotate all of them, each on its own
//! side. What the axes of a linear are follows from its role, in one place (`couplings`); from there come the dimensions
//! with their members, the inputs that linears share, the folds, and the splits of tensor parallelism, so nobody who
//! reads them looks at names or keeps a list of its own.

use serde::{Deserialize, Serialize};

use crate::{
    AttentionShape, Block, ChannelMap, Fold, InputGroup, ModelGraph, Norm, Producer, Role, Site,
};

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

/// A dimension, whichever block it is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Vocab,
    Hidden,
    Ffn,
    KvGroup,
    Head,
    ValueChannel,
}

impl Kind {
    const fn of(name: DimName) -> Self {
        match name {
            DimName::Vocab => Self::Vocab,
            DimName::Hidden => Self::Hidden,
            DimName::Ffn(_) => Self::Ffn,
            DimName::KvGroup(_) => Self::KvGroup,
            DimName::Head(_) => Self::Head,
            DimName::ValueChannel(_) => Self::ValueChannel,
        }
    }
}

/// An axis of a linear seen as a dimension.
#[derive(Debug, Clone, Copy)]
struct Seen {
    kind: Kind,
    /// How often the dimension is repeated along the axis, and elements of an index.
    repeat: (usize, usize),
    /// A scale of what is made arrives at the reader as that scale: nothing bends it on the way.
    scales: bool,
}

/// THE table: what the rows of a linear make and what its columns read. Everything that knows which linears belong
/// together comes from here: dimensions, inputs that several linears share, folds, and how ranks split a linear.
fn couplings(role: Role, attention: Option<AttentionShape>) -> (Vec<Seen>, Vec<Seen>) {
    let one = AttentionShape { heads: 1, kv_heads: 1, head_dim: 1 };
    let AttentionShape { heads, kv_heads, head_dim } = attention.unwrap_or(one);
    let group = heads / kv_heads.max(1) * head_dim;
    let seen = |kind, repeat| Seen { kind, repeat, scales: false };
    let scales = |kind, repeat| Seen { kind, repeat, scales: true };
    let hidden = || vec![seen(Kind::Hidden, (1, 1))];
    match role {
        Role::Query => {
            let rows = vec![seen(Kind::KvGroup, (1, group)), seen(Kind::Head, (1, head_dim))];
            (rows, hidden())
        }
        Role::Key => (vec![seen(Kind::KvGroup, (1, head_dim))], hidden()),
        Role::Value => {
            let groups = seen(Kind::KvGroup, (1, head_dim));
            (vec![groups, scales(Kind::ValueChannel, (kv_heads, 1))], hidden())
        }
        Role::AttentionOutput => {
            let columns = vec![
                seen(Kind::KvGroup, (1, group)),
                seen(Kind::Head, (1, head_dim)),
                seen(Kind::ValueChannel, (heads, 1)),
            ];
            (hidden(), columns)
        }
        Role::Gate => (vec![seen(Kind::Ffn, (1, 1))], hidden()),
        Role::Up => (vec![scales(Kind::Ffn, (1, 1))], hidden()),
        Role::Down => (hidden(), vec![seen(Kind::Ffn, (1, 1))]),
        Role::Head => (vec![seen(Kind::Vocab, (1, 1))], hidden()),
    }
}

/// How tensor-parallel ranks split a linear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Rows: each rank makes some channels or heads.
    Rows,
    /// Rows that are key/value heads, repeated where there are fewer of them than ranks.
    KvRows,
    /// Columns: each rank reads the channels or heads that it made.
    Columns,
    /// Rows of the vocabulary, which runtimes pad.
    Vocab,
}

impl Split {
    /// Of a linear: along the dimension that is not the stream's.
    pub fn of(role: Role) -> Self {
        let (rows, columns) = couplings(role, None);
        let makes = |kind| rows.iter().any(|seen| seen.kind == kind);
        if makes(Kind::Vocab) {
            Self::Vocab
        } else if columns.iter().any(|seen| seen.kind != Kind::Hidden) {
            Self::Columns
        } else if makes(Kind::KvGroup) && !makes(Kind::Head) {
            Self::KvRows
        } else {
            Self::Rows
        }
    }
}

impl Block {
    /// A block whose inputs and folds follow from the roles of its linears, in data order: neighbours that read the same
    /// dimension share an input; the n-th input that is the stream comes from the n-th norm, any other from the linear
    /// whose rows are its channels. `foldable` is false where the norm must not be scaled, as before a tied head.
    pub fn coupled(
        index: usize,
        prefix: String,
        (sites, norms): (Vec<Site>, Vec<Norm>),
        attention: Option<AttentionShape>,
        foldable: bool,
    ) -> Self {
        let axes: Vec<_> = sites.iter().map(|site| couplings(site.role, attention)).collect();
        let reads = |site: usize| axes[site].1[0].kind;
        let mut inputs: Vec<InputGroup> = Vec::new();
        for (at, site) in sites.iter().enumerate() {
            match inputs.last_mut() {
                Some(input) if reads(input.sites[0]) == reads(at) => input.sites.push(at),
                _ => inputs.push(InputGroup {
                    name: match site.role {
                        Role::Query | Role::Key | Role::Value => "attention input",
                        Role::AttentionOutput => "attention output",
                        Role::Gate | Role::Up => "mlp input",
                        Role::Down => "mlp activation",
                        Role::Head => "head input",
                    },
                    width: site.in_features,
                    sites: vec![at],
                }),
            }
        }
        let mut norm = 0;
        let mut fold = |(at, input): (usize, &InputGroup)| {
            let reader = input.sites[0];
            if reads(reader) == Kind::Hidden {
                norm += 1;
                let (producer, map) = (Producer::Norm(norm - 1), ChannelMap::Identity);
                return Some(Fold { producer, input: at, map });
            }
            axes[reader].1.iter().find_map(|read| {
                let makes = |seen: &&Seen| seen.kind == read.kind && seen.scales;
                let made = |site: usize| Some((site, axes[site].0.iter().find(makes)?));
                let (site, made) = (0..sites.len()).find_map(made)?;
                let map = match (read.kind, attention) {
                    (Kind::ValueChannel, Some(AttentionShape { head_dim, .. })) => {
                        let repeat = read.repeat.0 / made.repeat.0.max(1);
                        ChannelMap::GroupedHeads { head_dim, repeat }
                    }
                    _ => ChannelMap::Identity,
                };
                Some(Fold { producer: Producer::Rows(site), input: at, map })
            })
        };
        let folds = inputs.iter().enumerate().filter_map(&mut fold).collect();
        let folds = if foldable { folds } else { Vec::new() };
        Self { index, prefix, sites, norms, inputs, folds, attention }
    }

    /// Channels of its MLP; none in the epilogue.
    fn ffn(&self) -> usize {
        let reader = self.reader_of(DimName::Ffn(self.index));
        reader.map_or(0, |at| self.sites[at].in_features)
    }

    /// The linear whose columns are a dimension of this block.
    pub fn reader_of(&self, dim: DimName) -> Option<usize> {
        let kind = Kind::of(dim);
        self.sites.iter().position(|site| {
            couplings(site.role, self.attention).1.iter().any(|seen| seen.kind == kind)
        })
    }

    /// The linears whose rows are a dimension of this block.
    pub fn makers_of(&self, dim: DimName) -> Vec<usize> {
        let kind = Kind::of(dim);
        let makes = |site: &Site| {
            couplings(site.role, self.attention).0.iter().any(|seen| seen.kind == kind)
        };
        (0..self.sites.len()).filter(|&at| makes(&self.sites[at])).collect()
    }
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

impl ModelGraph {
    /// The sizes that may change.
    pub fn sizes(&self) -> Sizes {
        let first = self.blocks.first();
        let attention = first.and_then(|block| block.attention);
        let ffn = first.map(Block::ffn);
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
        let mut vocab = vec![member(self.embedding.clone(), 0, ONE, Side::Makes)];
        let mut hidden = vec![member(self.embedding.clone(), 1, ONE, Side::Makes)];
        let mut dims = Vec::new();
        for block in self.all_blocks() {
            let scaled = |norm: &Norm| member(norm.tensor.clone(), 0, ONE, Side::Scales);
            hidden.extend(block.norms.iter().map(scaled));
            let mut own: [Vec<Member>; 4] = Default::default();
            for (at, site) in block.sites.iter().enumerate() {
                if site.role == Role::Head && self.tied {
                    continue;
                }
                let (rows, columns) = couplings(site.role, block.attention);
                let mut put = |kind: Kind, members: Vec<Member>| match kind {
                    Kind::Vocab => vocab.extend(members),
                    Kind::Hidden => hidden.extend(members),
                    Kind::Ffn => own[0].extend(members),
                    Kind::KvGroup => own[1].extend(members),
                    Kind::Head => own[2].extend(members),
                    Kind::ValueChannel => own[3].extend(members),
                };
                for seen in rows {
                    put(seen.kind, made(block, at, seen.repeat));
                }
                for seen in columns {
                    put(seen.kind, vec![read(block, at, seen.repeat)]);
                }
            }
            let Some(shape) = block.attention else { continue };
            let [ffn, groups, heads, values] = own;
            let of = |name, size, members| Dim { name, size, members };
            dims.extend([
                of(DimName::Ffn(block.index), block.ffn(), ffn),
                of(DimName::KvGroup(block.index), shape.kv_heads, groups),
                of(DimName::Head(block.index), shape.heads, heads),
                of(DimName::ValueChannel(block.index), shape.head_dim, values),
            ]);
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

    fn block(heads: usize, kv_heads: usize, head_dim: usize) -> Block {
        let site = |(name, role, out_features, in_features): (&str, Role, usize, usize)| Site {
            name: name.into(),
            role,
            out_features,
            in_features,
            bias: name == "v",
            dtype: attar_tensor::DType::F32,
        };
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let sites = [
            ("q", Role::Query, q, 10),
            ("k", Role::Key, kv, 10),
            ("v", Role::Value, kv, 10),
            ("o", Role::AttentionOutput, 10, q),
            ("gate", Role::Gate, 14, 10),
            ("up", Role::Up, 14, 10),
            ("down", Role::Down, 10, 14),
        ];
        let norms = ["n0", "n1"].map(|n| Norm { tensor: n.into(), width: 10 });
        let sites = sites.into_iter().map(site).collect();
        let attention = Some(AttentionShape { heads, kv_heads, head_dim });
        Block::coupled(0, "b.".into(), (sites, norms.to_vec()), attention, true)
    }

    fn graph(tied: bool) -> ModelGraph {
        let head = Site {
            name: "lm_head".into(),
            role: Role::Head,
            out_features: 20,
            in_features: 10,
            bias: false,
            dtype: attar_tensor::DType::F32,
        };
        let norms = vec![Norm { tensor: "n".into(), width: 10 }];
        ModelGraph {
            family: "llama".into(),
            hidden: 10,
            vocab: 20,
            context: 8,
            blocks: vec![block(6, 2, 4)],
            epilogue: Block::coupled(1, String::new(), (vec![head], norms), None, !tied),
            embedding: "embed".into(),
            tied,
        }
    }

    #[test]
    fn inputs_are_shared_and_folds_go_where_the_dimensions_say() {
        let block = block(6, 2, 4);
        let sites: Vec<_> = block.inputs.iter().map(|input| input.sites.clone()).collect();
        assert_eq!(sites, [vec![0, 1, 2], vec![3], vec![4, 5], vec![6]]);
        let producers: Vec<_> =
            block.folds.iter().map(|fold| (fold.input, &fold.producer)).collect();
        let (norm, rows) = (Producer::Norm, Producer::Rows);
        assert_eq!(producers, [(0, &norm(0)), (1, &rows(2)), (2, &norm(1)), (3, &rows(5))]);
        assert_eq!(block.reader_of(DimName::Ffn(0)), Some(6));
        assert_eq!(block.makers_of(DimName::Head(0)), [0]);
        for tied in [true, false] {
            let graph = graph(tied);
            assert_eq!(graph.epilogue.folds.len(), usize::from(!tied));
            let vocab = graph.dim(DimName::Vocab).unwrap();
            assert_eq!(vocab.members.len(), if tied { 1 } else { 2 });
            assert_eq!(graph.norm_before("lm_head.weight"), (!tied).then_some("n"));
            // Of the stream: the embedding, three norms, seven linears, and the head that is not tied.
            let stream = graph.dim(DimName::Hidden).unwrap().members.len();
            assert_eq!(stream, if tied { 11 } else { 12 });
        }
    }

    /// A fold joins a channel with the one that makes it exactly when both have the same index in every dimension of
    /// heads and of channels that the two linears share.
    #[test]
    fn folds_agree_with_the_members_of_the_dimensions() {
        let graph = graph(false);
        let block = &graph.blocks[0];
        let fold = block.folds.iter().find(|fold| fold.input == 1).unwrap();
        let (mut pairs, mut joined) = (0, 0);
        for dim in [DimName::KvGroup(0), DimName::ValueChannel(0)] {
            let dim = graph.dim(dim).unwrap();
            let of = |tensor: &str| dim.members.iter().find(|m| m.tensor == tensor).unwrap();
            for column in 0..24 {
                let row = fold.map.producer_of(column);
                let made = of("v.weight").index(row, dim.size);
                assert_eq!(of("o.weight").index(column, dim.size), made, "{column}");
                pairs += 1;
                joined = joined.max(row + 1);
            }
        }
        assert_eq!((pairs, joined), (48, 8));
        let down = block.folds.iter().find(|fold| fold.input == 3).unwrap();
        assert_eq!(down.map, ChannelMap::Identity);
    }

    #[test]
    fn ranks_split_along_what_is_not_the_stream() {
        let of = |roles: &[Role]| roles.iter().map(|&role| Split::of(role)).collect::<Vec<_>>();
        use Role::{AttentionOutput, Down, Gate, Head, Key, Query, Up, Value};
        assert_eq!(of(&[Query, Gate, Up]), [Split::Rows; 3]);
        assert_eq!(of(&[Key, Value]), [Split::KvRows; 2]);
        assert_eq!(of(&[AttentionOutput, Down]), [Split::Columns; 2]);
        assert_eq!(Split::of(Head), Split::Vocab);
    }
}
