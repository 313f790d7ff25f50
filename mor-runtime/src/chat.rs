//! [`ChatTemplate`] and [`Conversation`]: from messages to the prompt that a model was trained on.
//!
//! Templates are those of Hugging Face: Jinja programs that turn messages into text, with the functions and settings that
//! `apply_chat_template` of transformers gives them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use mor_model::ModelError;
use serde::{Deserialize, Serialize};

use crate::error::{Result, RuntimeError};
use crate::text::Tokenizer;

/// Who says something.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// What the whole conversation is about.
    System,
    /// Whoever asks.
    User,
    /// The model.
    Assistant,
}

impl Role {
    /// `system`, `user` or `assistant`.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// A part of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// How a model wants conversations to be written.
///
/// ```
/// use mor_runtime::chat::{ChatTemplate, Message, Role};
///
/// let template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}{% endfor %}";
/// let template = ChatTemplate::new(template, [("eos_token".to_owned(), "</s>".to_owned())], "example")?;
/// let messages = [Message { role: Role::User, content: "Hello".to_owned() }];
/// assert_eq!(template.render(&messages)?, "<user>Hello</s>");
/// # Ok::<(), mor_runtime::RuntimeError>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// `bos_token`, `eos_token` and the like, by name.
    special_tokens: BTreeMap<String, String>,
    origin: PathBuf,
}

impl ChatTemplate {
    /// No extension, so that nothing is escaped as in HTML.
    const NAME: &'static str = "chat_template";

    /// The template of a model folder: `chat_template.jinja`, else the `chat_template` of `tokenizer_config.json`; `None` where
    /// neither is there.
    ///
    /// # Errors
    /// [`ModelError::Io`] for a file that cannot be read, [`RuntimeError::ChatTemplate`] for one that holds no template.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Option<Self>> {
        let path = folder.as_ref().join("tokenizer_config.json");
        let refuse = |reason: String| RuntimeError::ChatTemplate { path: path.clone(), reason };
        let config: serde_json::Map<_, _> = match read(&path)? {
            Some(text) => serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?,
            None => serde_json::Map::new(),
        };
        // A token is its text, or an object that has it.
        let text = |value: &serde_json::Value| value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned);
        let special_tokens = config
            .iter()
            .filter(|(name, _)| name.ends_with("_token"))
            .filter_map(|(name, value)| Some((name.clone(), text(value)?)));
        let file = folder.as_ref().join("chat_template.jinja");
        if let Some(template) = read(&file)? {
            return Self::new(&template, special_tokens, &file.display().to_string()).map(Some);
        }
        let template = match config.get("chat_template") {
            None | Some(serde_json::Value::Null) => return Ok(None),
            Some(serde_json::Value::String(template)) => template,
            // Several, by name.
            Some(serde_json::Value::Array(templates)) => {
                let default = templates.iter().find(|template| template["name"] == "default");
                let Some(template) = default.and_then(|template| template["template"].as_str()) else {
                    return Err(refuse("none of its templates is named \"default\"".to_owned()));
                };
                template
            }
            Some(_) => return Err(refuse("chat_template is neither a text nor a list of templates".to_owned())),
        };
        Self::new(template, special_tokens, &path.display().to_string()).map(Some)
    }

    /// A template of its own, with the values of `bos_token`, `eos_token` and the like; `origin` names it in messages.
    ///
    /// # Errors
    /// [`RuntimeError::ChatTemplate`] for what is no Jinja template.
    pub fn new(
        template: &str,
        special_tokens: impl IntoIterator<Item = (String, String)>,
        origin: &str,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let refuse =
            |error: minijinja::Error| RuntimeError::ChatTemplate { path: origin.into(), reason: reason(&error) };
        environment.set_syntax(syntax.map_err(refuse)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(Self::NAME, without_generation_tags(template)).map_err(refuse)?;
        Ok(Self { environment, special_tokens: special_tokens.into_iter().collect(), origin: origin.into() })
    }

    /// The text of a conversation, up to where the assistant is to speak.
    ///
    /// # Errors
    /// [`RuntimeError::Conversation`] where the template refuses it, for example for the order of its roles.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let refuse = |error| RuntimeError::Conversation { path: self.origin.clone(), reason: reason(&error) };
        let message = |message: &Message| {
            let role = message.role.as_str();
            Value::from_pairs([("role", role), ("content", &message.content)])
        };
        let messages: Vec<_> = messages.iter().map(message).collect();
        let special_tokens = self.special_tokens.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let own = [
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            // Templates ask whether there are any.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let context = Value::from_pairs(special_tokens.chain(own));
        let template = self.environment.get_template(Self::NAME).map_err(refuse)?;
        template.render(context).map_err(refuse)
    }

    /// The text of the token that ends a turn.
    pub fn eos_token(&self) -> Option<&str> {
        self.special_tokens.get("eos_token").map(String::as_str)
    }
}

/// The text of a file, `None` if it is not there.
fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModelError::Io { path: path.to_owned(), source }.into()),
    }
}

/// What a template says of a conversation it does not take, else the engine's words with their line.
fn reason(error: &minijinja::Error) -> String {
    if let Some(words) = error.detail().and_then(|detail| detail.strip_prefix(RAISED)) {
        return words.to_owned();
    }
    match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("{}: {detail} (line {line})", error.kind()),
        _ => error.to_string(),
    }
}

/// Marks the errors that templates raise themselves.
const RAISED: &str = "raised: ";

fn raise_exception(message: &str) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let text = jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now());
    text.map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// As Python's `json.dumps`, which escapes nothing for HTML and puts a space after every comma.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    // For keys in another order and characters beyond ASCII; the output has neither either way.
    let _: (Option<bool>, Option<bool>) = (options.get("sort_keys")?, options.get("ensure_ascii")?);
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(spaces) => {
            let spaces = " ".repeat(spaces);
            let format = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, format))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter)),
    };
    written.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&bytes).into_owned()))
}

struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `{% generation %}` marks what training learns from and writes nothing; a block that always runs does the same.
fn without_generation_tags(template: &str) -> String {
    let mut parts = template.split("{%");
    let mut result = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        result.push_str("{%");
        let tag = part.split_once("%}").map(|(tag, rest)| (tag.trim_matches(['-', '+', ' ']), tag, rest));
        match tag {
            Some(("generation", tag, rest)) => result += &format!("{}%}}{rest}", tag.replace("generation", "if true")),
            Some(("endgeneration", tag, rest)) => {
                result += &format!("{}%}}{rest}", tag.replace("endgeneration", "endif"));
            }
            _ => result.push_str(part),
        }
    }
    result
}

/// A conversation with a model, whose prompts begin with the tokens that were read and drawn before: the session finds their
/// K/V entries in its memory and reads only what is new (see
/// [`BatchOptions::share_prefixes`](crate::BatchOptions::share_prefixes)).
///
/// Without a template the messages are one text: each of the user's begins a line, and the model continues it.
#[derive(Clone, Debug)]
pub struct Conversation {
    template: Option<ChatTemplate>,
    system: Option<String>,
    messages: Vec<Message>,
    /// What the model has before it, as tokens and as the text that they stand for.
    tokens: Vec<u32>,
    text: String,
}

impl Conversation {
    /// A conversation about nothing yet, or about what `system` says.
    ///
    /// # Errors
    /// [`RuntimeError::Conversation`] if the template refuses such conversations, which it does from the start.
    pub fn new(template: Option<ChatTemplate>, system: Option<String>) -> Result<Self> {
        let mut conversation = Self { template, system, messages: Vec::new(), tokens: Vec::new(), text: String::new() };
        conversation.reset();
        let user = Message { role: Role::User, content: "Hello".to_owned() };
        conversation.render(&[&conversation.messages[..], &[user]].concat())?;
        Ok(conversation)
    }

    /// What has been said.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// The template, where the model has one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Forgets what has been said, but not what it is to be about.
    pub fn reset(&mut self) {
        let system = self.system.iter().map(|text| Message { role: Role::System, content: text.clone() });
        self.messages = system.collect();
        self.tokens.clear();
        self.text.clear();
    }

    /// Adds what the user says and returns the prompt for the answer, which [`Conversation::answer`] takes in. A question before
    /// it that has got none is replaced.
    ///
    /// # Errors
    /// [`RuntimeError::Conversation`] if the template refuses it and [`RuntimeError::Tokenizer`] if the tokenizer cannot
    /// represent it; it is not added then.
    pub fn ask(&mut self, tokenizer: &Tokenizer, content: &str) -> Result<Vec<u32>> {
        self.retract();
        let mut messages = self.messages.clone();
        messages.push(Message { role: Role::User, content: content.to_owned() });
        let text = self.render(&messages)?;
        let tokens = self.encode(tokenizer, &text)?;
        self.messages = messages;
        self.text = text;
        self.tokens.clone_from(&tokens);
        Ok(tokens)
    }

    /// Takes in the answer: its tokens without the one that ends it, and its text.
    pub fn answer(&mut self, tokens: &[u32], text: &str) {
        self.tokens.extend_from_slice(tokens);
        self.text.push_str(text);
        self.messages.push(Message { role: Role::Assistant, content: text.to_owned() });
    }

    /// Takes back a question that has got no answer.
    pub fn retract(&mut self) {
        if self.messages.last().is_some_and(|message| message.role == Role::User) {
            self.messages.pop();
        }
    }

    fn render(&self, messages: &[Message]) -> Result<String> {
        if let Some(template) = &self.template {
            return template.render(messages);
        }
        let mut text = String::new();
        for message in messages {
            if message.role != Role::Assistant && !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            text.push_str(&message.content);
        }
        Ok(text)
    }

    /// Tokens of a text that goes on from what the model has before it. It may have drawn other tokens than those the
    /// tokenizer makes of the same text: then the new part is appended to them, where that gives the very text.
    fn encode(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        let whole = tokenizer.encode(text)?;
        let Some(rest) = text.strip_prefix(&self.text) else { return Ok(whole) };
        if whole.starts_with(&self.tokens) {
            return Ok(whole);
        }
        let joined = [&self.tokens[..], &tokenizer.encode(rest)?].concat();
        Ok(if tokenizer.decode(&joined) == tokenizer.decode(&whole) { joined } else { whole })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: Role, content: &str) -> Message {
        Message { role, content: content.to_owned() }
    }

    fn template(text: &str) -> ChatTemplate {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let tokens = tokens.map(|(name, text)| (name.to_owned(), text.to_owned()));
        ChatTemplate::new(text, tokens, "test").expect("the template is sound")
    }

    fn turns() -> [Message; 3] {
        [message(Role::User, " Hi "), message(Role::Assistant, "Ho"), message(Role::User, "Why?")]
    }

    /// As published with ChatML models: a system prompt of its own.
    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + \
        message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\\n' }}{% endif %}";

    /// As published with Llama 2 and Mistral: methods of Python, exceptions, slices of lists.
    const LLAMA: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}\
        {% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}\
        {% set system_message = false %}{% endif %}{% for message in loop_messages %}\
        {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}\
        {% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + \
        '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}\
        {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
        {% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

    #[test]
    fn published_templates_are_rendered_as_by_transformers() {
        assert_eq!(
            template(CHATML).render(&turns()).unwrap(),
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n\
             <|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
        );
        assert_eq!(template(LLAMA).render(&turns()).unwrap(), "<s>[INST] Hi [/INST] Ho </s><s>[INST] Why? [/INST]");
        let system = [&[message(Role::System, "Be kind.")], &turns()[..1]].concat();
        assert_eq!(template(LLAMA).render(&system).unwrap(), "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n Hi [/INST]");
    }

    #[test]
    fn blocks_take_their_line_along_and_loops_can_end() {
        let text = "{% for message in messages %}\n    {% if loop.index > 1 %}\n{% break %}\n    {% endif %}\n{{ message.content }}\n{% endfor %}\n";
        assert_eq!(template(text).render(&turns()).unwrap(), " Hi \n");
        let text = "{%- for m in messages -%}\n {%- generation -%} {{ m.content | trim }} {%- endgeneration -%}\n{%- endfor -%}";
        assert_eq!(template(text).render(&turns()).unwrap(), "HiHoWhy?");
    }

    #[test]
    fn functions_of_transformers_are_there() {
        let year = template("{{ strftime_now('%Y') }}").render(&turns()).unwrap();
        assert!(year.len() == 4 && year.starts_with("20"), "{year}");
        let json = template("{{ messages[1] | tojson }}{{ ['<é>'] | tojson(indent=2) }}");
        assert_eq!(json.render(&turns()).unwrap(), "{\"role\": \"assistant\", \"content\": \"Ho\"}[\n  \"<é>\"\n]");
        let last = template("{{ messages[::-1][0].content }}{{ 'no' if tools is none else 'yes' }}");
        assert_eq!(last.render(&turns()).unwrap(), "Why?no");
    }

    #[test]
    fn refusals_name_the_template() {
        let error = template(LLAMA).render(&turns()[1..]).unwrap_err().to_string();
        assert_eq!(error, "test: the chat template refuses the conversation: Roles must alternate");
        let error = ChatTemplate::new("{% if %}", [], "x/chat_template.jinja").unwrap_err().to_string();
        assert!(error.starts_with("x/chat_template.jinja: not a usable chat template: syntax error"), "{error}");
        let system = Some("Be kind.".to_owned());
        let strict =
            template("{% if messages[0].role == 'system' %}{{ raise_exception('No system prompts') }}{% endif %}");
        assert!(Conversation::new(Some(strict.clone()), system).is_err());
        assert!(Conversation::new(Some(strict), None).is_ok());
    }

    #[test]
    fn folders_may_have_a_template() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let rendered = || {
            let template = ChatTemplate::from_folder(folder.path())?;
            template.map(|template| template.render(&turns())).transpose()
        };
        assert_eq!(rendered().unwrap(), None);
        write("tokenizer_config.json", r#"{ "eos_token": "</s>" }"#);
        assert_eq!(rendered().unwrap(), None);
        write(
            "tokenizer_config.json",
            r#"{ "bos_token": { "content": "<s>" }, "eos_token": "</s>", "chat_template": "{{ bos_token }}{{ eos_token }}" }"#,
        );
        assert_eq!(rendered().unwrap().unwrap(), "<s></s>");
        write("chat_template.jinja", "own");
        assert_eq!(rendered().unwrap().unwrap(), "own");
        std::fs::remove_file(folder.path().join("chat_template.jinja")).unwrap();
        write("tokenizer_config.json", r#"{ "chat_template": [{ "name": "tool_use", "template": "" }] }"#);
        assert!(rendered().unwrap_err().to_string().contains("none of its templates is named \"default\""));
        write("tokenizer_config.json", "{");
        assert!(rendered().unwrap_err().to_string().contains("tokenizer_config.json: not a usable chat template"));
    }

    fn tokenizer() -> Tokenizer {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tinystories-mor-expert-5m/tokenizer.json");
        Tokenizer::from_file(path, 4096).unwrap()
    }

    #[test]
    fn prompts_go_on_from_what_was_drawn() {
        let tokenizer = tokenizer();
        let mut conversation = Conversation::new(None, None).unwrap();
        let first = conversation.ask(&tokenizer, "Once upon a time").unwrap();
        assert_eq!(first, tokenizer.encode("Once upon a time").unwrap());
        // Letters one by one, as no tokenizer would write the word.
        let drawn: Vec<u32> = [" ", "c", "a", "t", "."].iter().flat_map(|c| tokenizer.encode(c).unwrap()).collect();
        let text = tokenizer.decode(&drawn);
        conversation.answer(&drawn, &text);
        let second = conversation.ask(&tokenizer, "Then").unwrap();
        assert!(second.starts_with(&[first, drawn].concat()));
        assert_eq!(tokenizer.decode(&second), format!("Once upon a time{text}\nThen"));

        // A stop text is among the tokens and not in the text.
        conversation.answer(&tokenizer.encode(" he said STOP").unwrap(), " he said");
        let third = conversation.ask(&tokenizer, "more").unwrap();
        assert_eq!(third, tokenizer.encode(&format!("Once upon a time{text}\nThen he said\nmore")).unwrap());
        // Without an answer the next question takes the place of the last.
        let fourth = conversation.ask(&tokenizer, "less").unwrap();
        assert_eq!(tokenizer.decode(&fourth), format!("Once upon a time{text}\nThen he said\nless"));
        assert_eq!(conversation.messages().len(), 5);
        conversation.reset();
        assert_eq!(conversation.ask(&tokenizer, "a").unwrap(), tokenizer.encode("a").unwrap());
    }
}
