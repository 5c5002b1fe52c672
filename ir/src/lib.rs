//! Intent: what the model is, what will be done to it, and the proof that it makes sense.
//!
//! A [`ModelGraph`] says which linears a checkpoint has, which of them read the same activations, and
//! which neighbours a scale can be folded into. A [`recipe::Recipe`] says what the user wants. A
//! [`plan::PassGraph`] brings both together and [`plan::PassGraph::check`] either proves that every
//! pass will find the forms and statistics it needs and that every layout can carry the result, or
//! lists everything that is wrong. Nothing here reads a weight.

pub mod coupling;
pub mod form;
pub mod graph;
pub mod ledger;
pub mod limits;
pub mod model_pass;
pub mod pass;
pub mod plan;
pub mod recipe;
pub mod slopes;
pub mod state;
pub mod stats;
pub mod target;
pub mod train;
pub mod training;
pub mod weight;

pub use coupling::{Dim, DimName, Member, Side, Sizes, Split};
pub use form::{Form, FormChange, FormSet, Numeric, Rank, Sparsity};
pub use graph::{
    AttentionShape, Block, ChannelMap, Fold, InputGroup, ModelGraph, Norm, Producer, Role, Site,
};
pub use limits::{Budget, Limits, Measured};
pub use model_pass::{
    Choose, Cut, CutBlocks, Loss, ModelContext, ModelEntry, ModelPass, ModelPassDef, ReadTensor,
    Selection, Survey, Transform, Work,
};
pub use pass::{
    Contract, Cost, Event, Pass, PassContext, PassDef, PassError, PassReport, SiteReport, Target,
    Touches, Upstream, check_finite, relative,
};
pub use plan::{PassGraph, Plan, PlanErrors};
pub use slopes::{SlopeBy, SlopeQuery, Slopes};
pub use state::{BlockState, LinearState};
pub use stats::{BlockGradients, BlockStats, Given, InputStats, Needs, SiteGradient};
pub use train::{Saved, Train, TrainProgress, TrainSession, TrainingReport};
pub use training::{BlockFunction, BlockValues, Progress, Teacher, Training, Wanted};
pub use weight::{Corrected, Factors, Weight};
