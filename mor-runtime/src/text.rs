//! [`Tokenizer`] and [`TextStream`]: from text to token ids, and from a stream of ids back to text.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use mor_model::ModelError;
use tokenizers::DecoderWrapper;

use crate::error::{Result, RuntimeError};

/// What a decoder shows where bytes are not a character.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// The text side of a model: a Hugging Face `tokenizer.json`. Clones share it.
///
/// ```no_run
/// use mor_runtime::Tokenizer;
///
/// let tokenizer = Tokenizer::from_file("model/tokenizer.json", 4096)?;
/// let ids = tokenizer.encode("Once upon a time")?;
/// assert_eq!(tokenizer.decode(&ids), "Once upon a time");
/// # Ok::<(), mor_runtime::RuntimeError>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    shared: Arc<Shared>,
}

struct Shared {
    inner: tokenizers::Tokenizer,
    origin: String,
    num_entries: usize,
    /// Bytes of every id, where the decoder only joins bytes; special tokens have none.
    token_bytes: Option<Vec<Box<[u8]>>>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("origin", &self.shared.origin)
            .field("num_entries", &self.shared.num_entries)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json` for a model that embeds `vocab_size` tokens.
    ///
    /// # Errors
    /// [`ModelError::Io`] for an unreadable file, else as [`Tokenizer::from_bytes`].
    pub fn from_file(path: impl AsRef<Path>, vocab_size: usize) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        Self::from_bytes(&bytes, &path.display().to_string(), vocab_size)
    }

    /// Reads the content of a `tokenizer.json`; `origin` names it in messages.
    ///
    /// # Errors
    /// [`RuntimeError::Tokenizer`] for content that is not a tokenizer, [`RuntimeError::TokenizerVocabulary`] for one
    /// with ids the model does not embed.
    pub fn from_bytes(bytes: &[u8], origin: &str, vocab_size: usize) -> Result<Self> {
        let refuse = |reason: String| RuntimeError::Tokenizer { path: origin.into(), reason };
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| refuse(error.to_string()))?;
        // Settings for training batches that some files carry; a prompt must neither be cut nor filled up.
        inner.with_truncation(None).map_err(|error| refuse(error.to_string()))?;
        inner.with_padding(None);
        // The largest id decides, not the number of entries: ids may have gaps.
        let num_entries = inner.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if num_entries == 0 {
            return Err(refuse("the vocabulary is empty".to_owned()));
        }
        if num_entries > vocab_size {
            return Err(RuntimeError::TokenizerVocabulary {
                path: origin.into(),
                tokenizer: num_entries,
                model: vocab_size,
            });
        }
        let token_bytes = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
            .then(|| (0..num_entries as u32).map(|id| byte_level_bytes(&inner, id)).collect());
        let shared = Shared { inner, origin: origin.to_owned(), num_entries, token_bytes };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Token ids of `text`. Nothing is added around it, but the text of a special token, for example
    /// `<|endoftext|>`, becomes that token.
    ///
    /// # Errors
    /// [`RuntimeError::Tokenizer`] when the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        match self.shared.inner.encode_fast(text, false) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(error) => {
                Err(RuntimeError::Tokenizer { path: self.shared.origin.clone().into(), reason: error.to_string() })
            }
        }
    }

    /// Text of `ids`. Special tokens and ids without an entry are left out; bytes that are no UTF-8 become `U+FFFD`.
    pub fn decode(&self, ids: &[u32]) -> String {
        match &self.shared.token_bytes {
            Some(table) => {
                let bytes: Vec<u8> = ids.iter().flat_map(|&id| bytes_of(table, id)).copied().collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            // Decoders only rearrange text; the error type is there for user-defined ones.
            None => self.shared.inner.decode(ids, true).unwrap_or_default(),
        }
    }

    /// Id of the token written `text`, `None` when there is none.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.shared.inner.token_to_id(text)
    }

    /// One more than the largest id.
    pub fn num_entries(&self) -> usize {
        self.shared.num_entries
    }
}

fn bytes_of(table: &[Box<[u8]>], id: u32) -> &[u8] {
    table.get(id as usize).map_or(&[], |bytes| bytes)
}

/// Bytes that token `id` stands for under a byte-level decoder.
fn byte_level_bytes(tokenizer: &tokenizers::Tokenizer, id: u32) -> Box<[u8]> {
    let Some(token) = tokenizer.id_to_token(id) else {
        return Box::default();
    };
    if tokenizer.get_added_vocabulary().is_special_token(&token) {
        return Box::default();
    }
    // A token with any other character is an added one, written as it is.
    let bytes: Option<Box<[u8]>> = token.chars().map(byte_of_char).collect();
    bytes.unwrap_or_else(|| token.into_bytes().into())
}

/// Inverse of GPT-2's table of printable stand-ins: printable Latin-1 bytes stand for themselves, the other 68 are
/// numbered upwards from `U+0100`.
fn byte_of_char(character: char) -> Option<u8> {
    let code = u32::from(character);
    let printable = |code: &u32| matches!(code, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match code {
        0x100.. => (0..=0xff_u32).filter(|code| !printable(code)).nth(code as usize - 0x100).map(|byte| byte as u8),
        _ => printable(&code).then_some(code as u8),
    }
}

/// What one more token adds to the text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Piece {
    /// Text to show now; empty while a character is incomplete or a stop text may have begun.
    pub text: String,
    /// Whether a stop text appeared; it and what follows are not part of the text.
    pub stopped: bool,
}

/// Turns token ids into text one by one.
///
/// Bytes of an incomplete character are held back until it is whole, and text that may be the beginning of a stop text
/// until that is decided. The pieces and [`TextStream::finish`] together are what [`Tokenizer::decode`] gives, up to
/// the first stop text.
///
/// ```no_run
/// use mor_runtime::{TextStream, Tokenizer};
///
/// let tokenizer = Tokenizer::from_file("model/tokenizer.json", 4096)?;
/// let mut stream = TextStream::new(&tokenizer, &["\n".to_owned()]);
/// for id in tokenizer.encode("Once upon a time\nthere was")? {
///     let piece = stream.push(id);
///     print!("{}", piece.text);
///     if piece.stopped {
///         break;
///     }
/// }
/// print!("{}", stream.finish());
/// # Ok::<(), mor_runtime::RuntimeError>(())
/// ```
#[derive(Debug)]
pub struct TextStream {
    characters: Characters,
    stop: StopTexts,
}

impl TextStream {
    /// Starts a text that ends where one of `stop` appears. An empty stop text is ignored.
    pub fn new(tokenizer: &Tokenizer, stop: &[String]) -> Self {
        let tokenizer = tokenizer.clone();
        let characters = if tokenizer.shared.token_bytes.is_some() {
            Characters::Bytes { tokenizer, pending: Vec::new() }
        } else {
            Characters::Window { tokenizer, ids: Vec::new(), context_ids: 0, context_bytes: 0 }
        };
        let texts = stop.iter().filter(|text| !text.is_empty()).cloned().collect();
        Self { characters, stop: StopTexts { texts, held: String::new(), stopped: false } }
    }

    /// Adds a token. After a stop text nothing more comes.
    pub fn push(&mut self, token: u32) -> Piece {
        if self.stop.stopped {
            return Piece { text: String::new(), stopped: true };
        }
        let text = self.characters.push(token);
        self.stop.push(&text)
    }

    /// The end: what was held back, with `U+FFFD` for a character that never became whole. Empty after a stop text.
    pub fn finish(mut self) -> String {
        if self.stop.stopped {
            return String::new();
        }
        let rest = self.characters.finish();
        self.stop.held.push_str(&rest);
        self.stop.held
    }
}

/// From ids to whole characters.
#[derive(Debug)]
enum Characters {
    /// Byte-level tokens: exact, whatever the boundaries.
    Bytes {
        tokenizer: Tokenizer,
        /// Beginning of a character, at most three bytes.
        pending: Vec<u8>,
    },
    /// Any other decoder: a few tokens are decoded together with those before them, because what a token looks like
    /// may depend on its neighbours (a leading space, a character spread over byte tokens).
    Window {
        tokenizer: Tokenizer,
        /// Tokens shown last, then those not shown yet.
        ids: Vec<u32>,
        /// How many of `ids` have been shown.
        context_ids: usize,
        /// Length of the text of those.
        context_bytes: usize,
    },
}

/// Undecided tokens after which a replacement character is taken for what it is: a character has at most four bytes.
const MAX_UNDECIDED: usize = 8;

impl Characters {
    fn push(&mut self, token: u32) -> String {
        match self {
            Characters::Bytes { tokenizer, pending } => {
                let table = tokenizer.shared.token_bytes.as_deref().unwrap_or_default();
                pending.extend_from_slice(bytes_of(table, token));
                let (text, used) = whole_characters(pending);
                pending.drain(..used);
                text
            }
            Characters::Window { tokenizer, ids, context_ids, context_bytes } => {
                ids.push(token);
                let text = tokenizer.decode(ids);
                let undecided = text.ends_with(REPLACEMENT) && ids.len() - *context_ids < MAX_UNDECIDED;
                let new = text.get(*context_bytes..).unwrap_or_default();
                // Tokens without text stay: as the only context they would lose the next word's leading space.
                if undecided || new.is_empty() {
                    return String::new();
                }
                let new = new.to_owned();
                ids.drain(..*context_ids);
                *context_ids = ids.len();
                *context_bytes = tokenizer.decode(ids).len();
                new
            }
        }
    }

    fn finish(&self) -> String {
        match self {
            Characters::Bytes { pending, .. } => String::from_utf8_lossy(pending).into_owned(),
            Characters::Window { tokenizer, ids, context_bytes, .. } => {
                tokenizer.decode(ids).get(*context_bytes..).unwrap_or_default().to_owned()
            }
        }
    }
}

/// Decodes `bytes` up to an incomplete character at their end; returns the text and how many bytes it covers.
fn whole_characters(bytes: &[u8]) -> (String, usize) {
    let mut text = String::new();
    let mut used = 0;
    loop {
        match std::str::from_utf8(&bytes[used..]) {
            Ok(rest) => {
                text.push_str(rest);
                return (text, bytes.len());
            }
            Err(error) => {
                let valid = used + error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[used..valid]));
                let Some(invalid) = error.error_len() else {
                    return (text, valid);
                };
                text.push(REPLACEMENT);
                used = valid + invalid;
            }
        }
    }
}

/// Watches a growing text for stop texts.
#[derive(Debug)]
struct StopTexts {
    texts: Vec<String>,
    /// End of the text that may be the beginning of a stop text.
    held: String,
    stopped: bool,
}

impl StopTexts {
    fn push(&mut self, text: &str) -> Piece {
        self.held.push_str(text);
        // The stop text that completes first wins, so that the result does not depend on how tokens cut the text.
        let hit = self.texts.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        if let Some((_, start)) = hit.min() {
            self.stopped = true;
            self.held.truncate(start);
            return Piece { text: std::mem::take(&mut self.held), stopped: true };
        }
        let shown = self.held.len() - self.undecided_bytes();
        let rest = self.held.split_off(shown);
        Piece { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Length of the longest end of the text that begins a stop text.
    fn undecided_bytes(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let most = held.len().min(stop.len() - 1);
            (1..=most).rev().find(|&length| stop.as_bytes().starts_with(&held[held.len() - length..])).unwrap_or(0)
        };
        // Never inside a character: a match starts where the stop text does, which is a first byte.
        self.texts.iter().map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tinystories-mor-expert-5m/tokenizer.json");
        Tokenizer::from_file(path, 4096).unwrap()
    }

    /// A tokenizer in the manner of SentencePiece: a leading space per word and byte tokens for the rest.
    fn sentencepiece() -> Tokenizer {
        let json = r#"{
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null,
            "added_tokens": [{ "id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                               "normalized": false, "special": true }],
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "_" }, "content": " " },
                { "type": "ByteFallback" }, { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 } ] },
            "model": { "type": "BPE", "vocab": { "<s>": 0, "_one": 1, "_two": 2, "<0xC3>": 3, "<0xA9>": 4, "_": 5 },
                       "merges": [] }
        }"#;
        Tokenizer::from_bytes(json.as_bytes(), "test", 6).unwrap()
    }

    /// Everything a stream shows, and whether it stopped.
    fn stream(tokenizer: &Tokenizer, ids: &[u32], stop: &[&str]) -> (String, bool) {
        let stop: Vec<String> = stop.iter().map(|&text| text.to_owned()).collect();
        let mut stream = TextStream::new(tokenizer, &stop);
        let mut text = String::new();
        let mut stopped = false;
        for &id in ids {
            let piece = stream.push(id);
            assert!(!piece.text.contains(REPLACEMENT), "an incomplete character was shown: {piece:?}");
            text.push_str(&piece.text);
            stopped |= piece.stopped;
        }
        text.push_str(&stream.finish());
        (text, stopped)
    }

    #[test]
    fn encodes_without_additions_and_decodes_back() {
        let tokenizer = tokenizer();
        let text = "Once upon a time, there was a little";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(ids, [505, 478, 259, 425, 12, 412, 290, 259, 413]);
        assert_eq!(tokenizer.decode(&ids), text);
        assert!(tokenizer.encode("").unwrap().is_empty());
        assert_eq!(tokenizer.num_entries(), 4096);
        assert_eq!(tokenizer.token_id("<|endoftext|>"), Some(0));
        assert_eq!(tokenizer.token_id("no such token"), None);
    }

    #[test]
    fn special_tokens_are_read_in_prompts_and_left_out_of_text() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("one<|endoftext|>two").unwrap();
        assert!(ids.contains(&0));
        assert_eq!(tokenizer.decode(&ids), "onetwo");
        assert_eq!(stream(&tokenizer, &ids, &[]), ("onetwo".to_owned(), false));
        assert_eq!(tokenizer.decode(&[5000, u32::MAX]), "", "ids without an entry have no text");
    }

    #[test]
    fn the_byte_table_agrees_with_the_tokenizers_own_decoder() {
        let tokenizer = tokenizer();
        for id in 0..4096 {
            assert_eq!(tokenizer.decode(&[id]), tokenizer.shared.inner.decode(&[id], true).unwrap(), "token {id}");
        }
        let mut bytes: Vec<u8> =
            (0..=u32::from('\u{143}')).filter_map(char::from_u32).filter_map(byte_of_char).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>(), "every byte has exactly one stand-in");
        assert_eq!(byte_of_char('\u{144}'), None);
    }

    #[test]
    fn characters_are_shown_whole() {
        let tokenizer = tokenizer();
        let text = "naïve café 日本語 👩‍👩‍👧 \u{10ffff}!";
        let ids = tokenizer.encode(text).unwrap();
        assert!(ids.len() > text.chars().count(), "the test wants characters spread over tokens");
        assert_eq!(stream(&tokenizer, &ids, &[]), (text.to_owned(), false));
    }

    #[test]
    fn broken_bytes_become_replacement_characters() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("日x").unwrap();
        let (cut, x) = (&ids[..ids.len() - 2], ids[ids.len() - 1]);
        let mut stream = TextStream::new(&tokenizer, &[]);
        for &id in cut {
            assert_eq!(stream.push(id).text, "");
        }
        assert_eq!(stream.push(x).text, "\u{fffd}x");
        assert_eq!(stream.finish(), "");
        let mut stream = TextStream::new(&tokenizer, &[]);
        cut.iter().for_each(|&id| assert_eq!(stream.push(id).text, ""));
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(whole_characters(b"a\xff\xe6b\xe6\x97"), ("a\u{fffd}\u{fffd}b".to_owned(), 4));
    }

    #[test]
    fn other_decoders_stream_what_they_decode() {
        let tokenizer = sentencepiece();
        assert_eq!(tokenizer.num_entries(), 6);
        for ids in [&[1, 2, 3, 4, 2][..], &[0, 1, 0, 2], &[3, 4, 3, 4, 1], &[1, 5, 5, 2], &[1, 3, 4, 0]] {
            let (text, _) = stream(&tokenizer, ids, &[]);
            assert_eq!(text, tokenizer.decode(ids), "{ids:?}");
        }
        // Bytes that never become a character do not hold the text back for ever.
        let mut stream = TextStream::new(&tokenizer, &[]);
        let shown: String = [3; 20].iter().map(|&id| stream.push(id).text).collect();
        assert!(!shown.is_empty());
    }

    #[test]
    fn stop_texts_end_the_text_wherever_tokens_cut_it() {
        let tokenizer = tokenizer();
        let ids = tokenizer.encode("Tom ran to the ball. The ball was big. End of it").unwrap();
        let check = |stop: &[&str], text: &str, stopped| {
            assert_eq!(stream(&tokenizer, &ids, stop), (text.to_owned(), stopped), "{stop:?}");
        };
        check(&["all. The b"], "Tom ran to the b", true);
        check(&["Tom"], "", true);
        check(&["was big. E", "big"], "Tom ran to the ball. The ball was ", true);
        check(&["f itx"], "Tom ran to the ball. The ball was big. End of it", false);
        check(&[""], "Tom ran to the ball. The ball was big. End of it", false);
    }

    #[test]
    fn stop_texts_that_may_have_begun_are_held_back() {
        let mut stop = StopTexts { texts: vec!["aab".into(), "é!".into()], held: String::new(), stopped: false };
        let mut push = |text: &str| stop.push(text).text;
        assert_eq!(push("xa"), "x");
        assert_eq!(push("a"), "");
        assert_eq!(push("a"), "a", "the last two letters may still begin the stop text");
        assert_eq!(push("c"), "aac");
        assert_eq!(push("dé"), "d");
        assert_eq!(push("?"), "é?");
        let last = stop.push("zaab and more");
        assert_eq!(last, Piece { text: "z".to_owned(), stopped: true });
    }

    #[test]
    fn the_stop_text_that_completes_first_wins() {
        for pieces in [&["xabcy"][..], &["xa", "b", "c"]] {
            let mut stop = StopTexts { texts: vec!["abc".into(), "b".into()], held: String::new(), stopped: false };
            let shown: String = pieces.iter().map_while(|text| (!stop.stopped).then(|| stop.push(text).text)).collect();
            assert_eq!((shown.as_str(), stop.stopped), ("xa", true), "{pieces:?}");
        }
    }

    #[test]
    fn nothing_comes_after_a_stop_text() {
        let tokenizer = tokenizer();
        let mut stream = TextStream::new(&tokenizer, &["upon".to_owned()]);
        for id in tokenizer.encode("Once upon a time").unwrap() {
            stream.push(id);
        }
        assert_eq!(stream.push(300), Piece { text: String::new(), stopped: true });
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn unusable_tokenizers_are_refused_by_name() {
        let message = |result: Result<Tokenizer>| result.unwrap_err().to_string();
        let text = message(Tokenizer::from_bytes(b"{}", "model/tokenizer.json", 9));
        assert!(text.starts_with("model/tokenizer.json: not a usable tokenizer: "), "{text}");
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tinystories-mor-expert-5m/tokenizer.json");
        let text = message(Tokenizer::from_file(path, 4095));
        assert!(text.contains("has 4096 entries, but the model embeds 4095"), "{text}");
        let text = message(Tokenizer::from_file("no/such/tokenizer.json", 1));
        assert!(text.starts_with("cannot read no/such/tokenizer.json: "), "{text}");
    }
}
