//! The one error type of this crate.

use std::path::PathBuf;

/// Everything that can be wrong with a model directory, a configuration or a request.
///
/// A message names the place, what was found, what was expected and, where that is not plain from
/// the rest, what to do. Input from outside never panics; a panic is a defect of this crate.
#[non_exhaustive]
#[derive(thiserror::Error, Debug)]
pub enum ModelError {
    /// The operating system refused a file.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },

    /// A JSON file is not valid JSON, or its top level is not an object.
    #[error("{origin}: not a JSON object: {source}")]
    JsonSyntax {
        /// File, or the name the caller gave the text.
        origin: String,
        /// Position and cause.
        #[source]
        source: serde_json::Error,
    },

    /// A required field is absent.
    #[error("{origin}: {field} is missing, expected {expected}")]
    ConfigMissing {
        /// Where the configuration comes from.
        origin: String,
        /// Dotted field name, for example `mor.mode`.
        field: String,
        /// Accepted values.
        expected: String,
    },

    /// A field has a value outside its domain.
    #[error("{origin}: {field} is {found}, expected {expected}")]
    ConfigValue {
        /// Where the configuration comes from.
        origin: String,
        /// Dotted field name.
        field: String,
        /// The value, as JSON.
        found: String,
        /// Accepted values.
        expected: String,
    },

    /// The `mor` object has a field this crate does not know, and guessing would change the model.
    #[error("{origin}: {field} is not a known field, expected one of {known}")]
    ConfigUnknownField {
        /// Where the configuration comes from.
        origin: String,
        /// Dotted field name.
        field: String,
        /// Known fields.
        known: String,
    },

    /// Two settings exclude each other.
    #[error("{origin}: {field} = {found} contradicts {other} = {other_found}: {rule}")]
    ConfigConflict {
        /// Where the configuration comes from.
        origin: String,
        /// First field.
        field: &'static str,
        /// Its value.
        found: String,
        /// Second field.
        other: &'static str,
        /// Its value.
        other_found: String,
        /// The rule that is broken and how to satisfy it.
        rule: &'static str,
    },

    /// The shared layers do not split into equal recursions.
    #[error(
        "{origin}: num_hidden_layers = {num_hidden_layers} leaves {shared} shared layers with mor.sharing = {sharing}, \
         expected a positive multiple of mor.num_recursion = {num_recursions}; layers are never dropped to make it fit"
    )]
    LayersNotDivisible {
        /// Where the configuration comes from.
        origin: String,
        /// Effective depth.
        num_hidden_layers: usize,
        /// Layers left after removing the unshared first and last layer.
        shared: usize,
        /// Sharing strategy.
        sharing: crate::SharingStrategy,
        /// Number of recursions.
        num_recursions: usize,
    },

    /// A model directory holds no weights in a supported format.
    #[error(
        "{}: found neither model.safetensors nor model.safetensors.index.json; `mor convert` makes a model folder of \
         pytorch_model.bin or its shards",
        dir.display()
    )]
    NoWeights {
        /// Model directory.
        dir: PathBuf,
    },

    /// A safetensors header is malformed.
    #[error("{file}: malformed safetensors header: {source}; the file is damaged or not a safetensors file")]
    SafetensorsHeader {
        /// Weight file.
        file: String,
        /// Cause.
        #[source]
        source: safetensors::SafeTensorError,
    },

    /// A safetensors file is shorter or longer than its header says.
    #[error(
        "{file}: holds {found_bytes} bytes, its header describes {expected_bytes}; copy or download the file again"
    )]
    FileLength {
        /// Weight file.
        file: String,
        /// Length of the file.
        found_bytes: u64,
        /// Least length the header asks for.
        expected_bytes: u64,
    },

    /// A shard index has no usable `weight_map`.
    #[error("{file}: weight_map is {found}, expected an object from tensor name to shard file name")]
    ShardIndex {
        /// Index file.
        file: String,
        /// What is there instead.
        found: String,
    },

    /// A shard index names a file outside the model directory.
    #[error("{file}: tensor {name} is in shard {shard:?}, expected a plain file name beside the index")]
    ShardPath {
        /// Index file.
        file: String,
        /// Tensor.
        name: String,
        /// Shard as written.
        shard: String,
    },

    /// A shard lacks a tensor the index promises.
    #[error("{file}: tensor {name} is missing, although the shard index places it there")]
    ShardTensorMissing {
        /// Shard file.
        file: String,
        /// Tensor.
        name: String,
    },

    /// Two shards hold the same tensor.
    #[error("tensor {name} is in both {first} and {second}, expected it once; remove the stale shard")]
    DuplicateTensor {
        /// Tensor.
        name: String,
        /// First shard.
        first: String,
        /// Second shard.
        second: String,
    },

    /// A file holds a tensor the configuration has no place for.
    #[error(
        "{file}: tensor {name} has no place in a {mode} model with {sharing} sharing; \
         check mor.mode, mor.sharing, mor.num_recursion, mor.router_type, mor.sampling, mor.balancing, mor.lora and \
         mor.recursion_encoding"
    )]
    UnknownTensor {
        /// Weight file.
        file: String,
        /// Tensor.
        name: String,
        /// Mode of the configuration.
        mode: crate::Mode,
        /// Sharing of the configuration.
        sharing: crate::SharingStrategy,
    },

    /// A tensor the configuration asks for is absent.
    #[error("{origin}: tensor {name} {expected:?} is missing, and no tied name stands in for it")]
    MissingTensor {
        /// Model directory or source of the bytes.
        origin: String,
        /// Tensor.
        name: String,
        /// Shape it should have.
        expected: Vec<usize>,
    },

    /// A tied group is written in part, and the rest cannot be derived.
    #[error(
        "{origin}: tensor {missing} is missing while {present} of the same tied group is present{}; \
         write the group once under the name of its first layer, or under every name",
        if *differs { " and differs from the first layer's" } else { "" }
    )]
    TiedGroupIncomplete {
        /// Model directory or source of the bytes.
        origin: String,
        /// Absent name.
        missing: String,
        /// Present name of the same group.
        present: String,
        /// Whether the present copy differs from the group's first layer, so that `missing` is ambiguous.
        differs: bool,
    },

    /// A tensor has the wrong shape.
    #[error("{file}: tensor {name} has shape {found:?}, expected {expected:?} from the configuration")]
    TensorShape {
        /// Weight file.
        file: String,
        /// Tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape from the configuration.
        expected: Vec<usize>,
    },

    /// A tensor has an element type that the configuration does not give it.
    #[error("{file}: tensor {name} has element type {found}, expected {expected}")]
    TensorDtype {
        /// Weight file.
        file: String,
        /// Tensor.
        name: String,
        /// Type in the file.
        found: String,
        /// Accepted types.
        expected: &'static str,
    },

    /// A weight is NaN or infinite.
    #[error("{file}: tensor {name} has {value} at element {index}, expected finite values; the checkpoint is damaged")]
    NonFinite {
        /// Weight file.
        file: String,
        /// Tensor.
        name: String,
        /// Flat row-major element index.
        index: usize,
        /// The value.
        value: f32,
    },

    /// A checkpoint that is to be quantised is quantised already.
    #[error("the checkpoint is quantised as {found} already; load it as it is, or quantise the one it was made from")]
    AlreadyQuantized {
        /// Its form.
        found: crate::Quantization,
    },

    /// A weight is too large to be quantised.
    #[error(
        "tensor {name} has {value} at element {index}, expected at most 65504 in size, the largest f16; it cannot be \
         quantised"
    )]
    NotQuantizable {
        /// Tensor.
        name: String,
        /// Flat row-major element index.
        index: usize,
        /// The value.
        value: f32,
    },

    /// A weight has no finite value in the type that it is to be stored in.
    #[error("tensor {name} has {value} at element {index}, which {dtype} does not have; use another type")]
    NotRepresentable {
        /// Tensor.
        name: String,
        /// Flat row-major element index.
        index: usize,
        /// The value.
        value: f32,
        /// The type asked for.
        dtype: crate::Dtype,
    },

    /// A quantised checkpoint that is to be converted.
    #[error("the checkpoint is quantised as {found}, expected floats; convert the one it was made from")]
    QuantizedSource {
        /// Its form.
        found: crate::Quantization,
    },

    /// A file of `torch.save` that cannot be read.
    #[error("{file}: {problem}")]
    TorchFile {
        /// Weight file.
        file: String,
        /// What was found and what was expected.
        problem: String,
    },

    /// A file is not YAML, or its top level is no mapping.
    #[error("{origin}: not a YAML mapping: {problem}")]
    YamlSyntax {
        /// File.
        origin: String,
        /// Position and cause.
        problem: String,
    },

    /// A folder cannot be converted as asked.
    #[error("{origin}: {problem}")]
    Convert {
        /// Folder or file.
        origin: String,
        /// What was found, what was expected, what to do.
        problem: String,
    },

    /// A model cannot be had from the Hugging Face Hub.
    #[cfg(feature = "hub")]
    #[error("{model}: {problem}")]
    Hub {
        /// The model as it was named.
        model: String,
        /// What happened, and what to do.
        problem: String,
    },

    /// A folder cannot be written where it should be.
    #[error("{}: {problem}", path.display())]
    NewFolder {
        /// The folder to write.
        path: PathBuf,
        /// What is in the way.
        problem: String,
    },

    /// The operating system refused to write a file.
    #[error("cannot write {}: {source}", path.display())]
    WriteFile {
        /// File or directory.
        path: PathBuf,
        /// Cause.
        #[source]
        source: std::io::Error,
    },

    /// Weights cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// File.
        path: PathBuf,
        /// Cause.
        #[source]
        source: safetensors::SafeTensorError,
    },

    /// A token id is outside the vocabulary.
    #[error(
        "token {token} at position {position} is outside the vocabulary, expected an id below vocab_size = {vocab_size}"
    )]
    TokenOutOfRange {
        /// Token id.
        token: u32,
        /// Position in the sequence.
        position: usize,
        /// Vocabulary size.
        vocab_size: usize,
    },

    /// A request needs at least one token.
    #[error("{what} is empty, expected at least one token")]
    EmptyTokens {
        /// The request part.
        what: &'static str,
    },

    /// Top-k routing was asked for a sequence that is already under way.
    #[error(
        "top-k routing sees the whole sequence, but {cached} tokens are already cached; \
         start from an empty cache or use causal routing"
    )]
    TopKNeedsWholeSequence {
        /// Tokens already cached.
        cached: usize,
    },

    /// Depths that the model cannot be held to.
    #[error("{name} is {found}, expected {expected}")]
    DepthControl {
        /// Field of [`DepthControl`](crate::DepthControl).
        name: &'static str,
        /// Its value.
        found: String,
        /// Accepted values.
        expected: String,
    },

    /// A golden case lacks a tensor or holds it with another type.
    #[cfg(feature = "oracle")]
    #[error("{file}: golden tensor {name} is missing or not {expected}")]
    GoldenTensor {
        /// File of the case.
        file: String,
        /// Tensor.
        name: String,
        /// Expected element type.
        expected: &'static str,
    },
}
