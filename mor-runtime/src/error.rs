//! [`RuntimeError`]: what can go wrong while a model is loaded or run.

use std::path::PathBuf;

use mor_kernels::KernelError;
use mor_model::ModelError;

/// Result of a fallible runtime operation.
pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

/// An error of the runtime. Messages say where, what was found, what was expected and what to do.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The checkpoint or its configuration is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device or a kernel is at fault.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The model does not fit the adapter's memory.
    #[error(
        "the model needs {needed} bytes on \"{adapter}\", which has {available}: {weights} for weights, {kv} for K/V of {positions} positions, {activations} for activations; use --dtype f16, --quantize q8 or q4, a shorter context or another --device"
    )]
    DoesNotFit {
        /// Adapter name.
        adapter: String,
        /// Bytes in all.
        needed: u64,
        /// Bytes of the largest device-local heap.
        available: u64,
        /// Bytes of weights.
        weights: u64,
        /// Bytes of caches.
        kv: u64,
        /// Longest sequence.
        positions: usize,
        /// Bytes of everything else.
        activations: u64,
    },
    /// A token id outside the vocabulary.
    #[error("{at}: token id {token} is out of range; the vocabulary has {vocab_size} entries (0..{last})")]
    TokenOutOfRange {
        /// Where the id stands, for example `prompt[3]`.
        at: String,
        /// The id.
        token: i64,
        /// Vocabulary size.
        vocab_size: usize,
        /// Largest id.
        last: usize,
    },
    /// A sequence that does not fit the context.
    #[error("{what} has {found} tokens, but the model's context holds {limit}; {advice}")]
    TooLong {
        /// The prompt, the document, prompt plus new tokens.
        what: &'static str,
        /// Its length in tokens.
        found: usize,
        /// `max_position_embeddings`.
        limit: usize,
        /// What to do.
        advice: &'static str,
    },
    /// A sequence that needs more K/V memory than the session has.
    #[error(
        "a sequence of {context} tokens needs {needed} bytes of K/V pages where the session has {available}; give the session more K/V memory, or ask for fewer tokens"
    )]
    NeverFits {
        /// Tokens of the sequence at its end.
        context: usize,
        /// Bytes of the kind of pages that do not suffice.
        needed: u64,
        /// Bytes of such pages that there are.
        available: u64,
    },
    /// A sequence that is longer than the caches of those that run, which cannot be made anew now.
    #[error(
        "a sequence of {context} tokens is longer than the {positions} that the caches in use were made for; wait until the others have ended, or give the session max_context from the start"
    )]
    Busy {
        /// Tokens of the sequence at its end.
        context: usize,
        /// Tokens of the longest sequence.
        positions: usize,
    },
    /// An empty prompt for a model without an end-of-text token.
    #[error(
        "the prompt is empty and the model's config names no eos_token_id to start from; give a prompt or --prompt-tokens"
    )]
    EmptyPrompt,
    /// A parameter outside its range.
    #[error("{name} is {found}, expected {expected}")]
    Parameter {
        /// Parameter name.
        name: &'static str,
        /// What was given.
        found: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// A tokenizer that cannot be read.
    #[error("{path}: not a usable tokenizer: {reason}; expected a Hugging Face tokenizer.json")]
    Tokenizer {
        /// File.
        path: PathBuf,
        /// The parser's words.
        reason: String,
    },
    /// A tokenizer that knows more tokens than the model embeds.
    #[error("{path}: the tokenizer has {tokenizer} entries, but the model embeds {model}; it belongs to another model")]
    TokenizerVocabulary {
        /// File.
        path: PathBuf,
        /// Tokenizer entries.
        tokenizer: usize,
        /// `vocab_size`.
        model: usize,
    },
    /// A chat template that cannot be read.
    #[error(
        "{path}: not a usable chat template: {reason}; expected a Jinja template in chat_template.jinja, or in chat_template of tokenizer_config.json"
    )]
    ChatTemplate {
        /// File.
        path: PathBuf,
        /// What is wrong with it, with its line.
        reason: String,
    },
    /// A conversation that the model's chat template does not take.
    #[error("{path}: the chat template refuses the conversation: {reason}")]
    Conversation {
        /// File of the template.
        path: PathBuf,
        /// The template's words.
        reason: String,
    },
    /// Text given to a model that has no tokenizer.
    #[error("the model has no tokenizer.json, so text cannot be encoded; give token ids with --prompt-tokens")]
    NoTokenizer,
    /// A routing that the operation does not allow.
    #[error("top-k routing looks at the whole sequence and {reason}; use causal routing")]
    TopK {
        /// Why not here.
        reason: &'static str,
    },
}
