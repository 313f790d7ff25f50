//! [`Fields`]: a JSON object whose faults are told by the field's full name.

use serde_json::{Map, Value};

use crate::ModelError;

/// One JSON object with the place it came from, so that each reader reports a full field name.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) origin: &'a str,
    /// Empty, or the names of the objects around it, each with its dot.
    pub(crate) prefix: &'static str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The field, where JSON `null` counts as absent.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn missing(&self, name: &str, expected: &str) -> ModelError {
        ModelError::ConfigMissing {
            origin: self.origin.to_owned(),
            field: self.path(name),
            expected: expected.to_owned(),
        }
    }

    pub(crate) fn value(&self, name: &str, expected: impl Into<String>) -> ModelError {
        let found = self.map.get(name).unwrap_or(&Value::Null).to_string();
        ModelError::ConfigValue {
            origin: self.origin.to_owned(),
            field: self.path(name),
            found: shorten(found),
            expected: expected.into(),
        }
    }

    pub(crate) fn refuse_unknown(&self, known: &[&str]) -> Result<(), ModelError> {
        match self.map.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => Err(ModelError::ConfigUnknownField {
                origin: self.origin.to_owned(),
                field: self.path(name),
                known: known.join(", "),
            }),
        }
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, ModelError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(self.value(name, "an object")),
        }
    }

    /// A required integer in 1..=max.
    pub(crate) fn size(&self, name: &str, max: usize) -> Result<usize, ModelError> {
        let value = self.get(name).ok_or_else(|| self.missing(name, &format!("an integer from 1 to {max}")))?;
        value
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (1..=max).contains(n))
            .ok_or_else(|| self.value(name, format!("an integer from 1 to {max}")))
    }

    pub(crate) fn steps(&self, name: &str) -> Result<u64, ModelError> {
        self.get(name)
            .map_or(Ok(0), |value| value.as_u64().ok_or_else(|| self.value(name, "a number of steps, 0 or more")))
    }

    /// A number that is finite and positive also after rounding to f32, the type kernels see.
    pub(crate) fn positive(&self, name: &str, default: Option<f64>) -> Result<f64, ModelError> {
        const EXPECTED: &str = "a positive number in the range of f32";
        let Some(value) = self.get(name) else {
            return default.ok_or_else(|| self.missing(name, EXPECTED));
        };
        value.as_f64().filter(|&x| x as f32 > 0.0 && (x as f32).is_finite()).ok_or_else(|| self.value(name, EXPECTED))
    }

    pub(crate) fn coefficient(&self, name: &str, default: f64) -> Result<f64, ModelError> {
        self.get(name).map_or(Ok(default), |value| {
            value.as_f64().filter(|x| x.is_finite() && *x >= 0.0).ok_or_else(|| self.value(name, "a number, 0 or more"))
        })
    }

    pub(crate) fn flag(&self, name: &str, default: bool) -> Result<bool, ModelError> {
        self.get(name).map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.value(name, "true or false")))
    }

    /// A name of a closed set; `null` is refused.
    pub(crate) fn name<T: Copy>(
        &self,
        name: &str,
        all: &[T],
        text: fn(T) -> &'static str,
        default: T,
    ) -> Result<T, ModelError> {
        match self.map.get(name) {
            None => Ok(default),
            Some(value) => self.one_of(name, value.as_str(), all, text),
        }
    }

    pub(crate) fn required_name<T: Copy>(
        &self,
        name: &str,
        all: &[T],
        text: fn(T) -> &'static str,
    ) -> Result<T, ModelError> {
        match (self.map.get(name), all.first()) {
            (Some(_), Some(&first)) => self.name(name, all, text, first),
            _ => Err(self.missing(name, &format!("one of {}", list(all, text)))),
        }
    }

    /// A name of a closed set in which `null` is a value; an absent field takes the default.
    pub(crate) fn nullable<T: Copy>(
        &self,
        name: &str,
        all: &[T],
        text: fn(T) -> &'static str,
        default: T,
    ) -> Result<T, ModelError> {
        let Some(value) = self.map.get(name) else {
            return Ok(default);
        };
        let wanted = match value {
            Value::Null => Some("null"),
            // The text "null" is not the value null.
            Value::String(word) if word != "null" => Some(word.as_str()),
            _ => None,
        };
        self.one_of(name, wanted, all, text)
    }

    /// The one of `all` that is called `wanted`.
    fn one_of<T: Copy>(
        &self,
        name: &str,
        wanted: Option<&str>,
        all: &[T],
        text: fn(T) -> &'static str,
    ) -> Result<T, ModelError> {
        all.iter()
            .copied()
            .find(|&candidate| wanted == Some(text(candidate)))
            .ok_or_else(|| self.value(name, format!("one of {}", list(all, text))))
    }
}

/// Names of `all`, for messages.
pub(crate) fn list<T: Copy>(all: &[T], text: fn(T) -> &'static str) -> String {
    all.iter().map(|&value| text(value)).collect::<Vec<_>>().join(", ")
}

/// Keeps a message on one screen when a whole object stands where a name should.
fn shorten(mut text: String) -> String {
    const LIMIT: usize = 80;
    if let Some((end, _)) = text.char_indices().nth(LIMIT) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
