//! Pickles of state dicts, read as data.
//!
//! A pickle is a program for a stack machine that may name and call any function of Python. This reader has the opcodes
//! of protocol 2 and the few globals with which `torch.save` writes a dictionary of tensors. A global is a value of an
//! enum here, so there is nothing that could be called; any other is refused by its name.
//!
//! # Source
//!
//! `pickletools` of the Python standard library documents the opcodes; `torch/_utils.py` and `torch/serialization.py` of
//! PyTorch what a tensor becomes.

use std::collections::HashMap;
use std::rc::Rc;

use safetensors::Dtype;

/// Most values on the stack: far above what any state dict needs, and far below what would fill the memory.
const MAX_STACK: usize = 1 << 20;
/// Deepest nesting of tuples and dictionaries. Values are dropped recursively, which must not exhaust the thread's stack.
const MAX_DEPTH: usize = 8;
/// Most dimensions of a tensor.
const MAX_DIMS: usize = 8;

/// A tensor as a view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TensorRef {
    pub(super) storage: Rc<StorageRef>,
    /// First element in the storage.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    /// Elements from one index to the next, per dimension.
    pub(super) strides: Vec<usize>,
}

/// A record of the archive that holds elements.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct StorageRef {
    pub(super) key: Rc<str>,
    pub(super) dtype: Dtype,
    /// Elements.
    pub(super) len: usize,
}

/// What a pickle may name.
#[derive(Clone, Copy, Debug)]
enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Global {
    fn named(module: &str, name: &str) -> Option<Self> {
        let storage = |dtype| Some(Self::Storage(dtype));
        match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", "FloatStorage") => storage(Dtype::F32),
            ("torch", "HalfStorage") => storage(Dtype::F16),
            ("torch", "BFloat16Storage") => storage(Dtype::BF16),
            ("torch", "DoubleStorage") => storage(Dtype::F64),
            ("torch", "LongStorage") => storage(Dtype::I64),
            ("torch", "IntStorage") => storage(Dtype::I32),
            ("torch", "ShortStorage") => storage(Dtype::I16),
            ("torch", "CharStorage") => storage(Dtype::I8),
            ("torch", "ByteStorage") => storage(Dtype::U8),
            ("torch", "BoolStorage") => storage(Dtype::BOOL),
            _ => None,
        }
    }
}

#[derive(Clone, Debug)]
enum Value {
    None,
    Bool,
    Int(i64),
    Str(Rc<str>),
    /// Items and depth.
    Tuple(Rc<[Value]>, usize),
    /// Entries in order and depth. Dictionaries are moved, never shared: see [`Machine::remember`].
    Dict(Vec<(Value, Value)>, usize),
    Global(Global),
    Storage(Rc<StorageRef>),
    Tensor(Rc<TensorRef>),
    /// Where the items of a tuple or a dictionary begin.
    Mark,
}

impl Value {
    /// Levels of tuples and dictionaries; kept, since shared tuples would be counted again and again.
    const fn depth(&self) -> usize {
        match self {
            Self::Tuple(_, depth) | Self::Dict(_, depth) => *depth,
            _ => 0,
        }
    }

    const fn kind(&self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Bool => "a boolean",
            Self::Int(_) => "a number",
            Self::Str(_) => "a text",
            Self::Tuple(..) => "a tuple",
            Self::Dict(..) => "a dictionary",
            Self::Global(_) => "a class",
            Self::Storage(_) => "a storage",
            Self::Tensor(_) => "a tensor",
            Self::Mark => "a mark",
        }
    }
}

/// Reads the pickle of a dictionary from names to tensors.
///
/// # Errors
///
/// A clause that says what was found and what was expected.
pub(super) fn read_state_dict(bytes: &[u8]) -> Result<Vec<(String, TensorRef)>, String> {
    let Value::Dict(entries, _) = Machine { bytes, stack: Vec::new(), memo: HashMap::new() }.run()? else {
        return Err("the pickle is no dictionary, expected the state dict of a model".to_owned());
    };
    let mut tensors = Vec::with_capacity(entries.len());
    for (key, value) in entries {
        match (key, value) {
            (Value::Str(name), Value::Tensor(tensor)) => tensors.push((name.to_string(), (*tensor).clone())),
            (Value::Str(name), value) => {
                let found = value.kind();
                return Err(format!(
                    "entry {name} is {found}, expected tensors alone: what model.state_dict() returns"
                ));
            }
            (key, _) => return Err(format!("a key of the state dict is {}, expected a text", key.kind())),
        }
    }
    Ok(tensors)
}

/// The stack machine: what is unread, the stack, and what was put aside.
struct Machine<'a> {
    bytes: &'a [u8],
    stack: Vec<Value>,
    memo: HashMap<u32, Option<Value>>,
}

impl<'a> Machine<'a> {
    fn run(mut self) -> Result<Value, String> {
        loop {
            let [opcode] = self.take()?;
            match opcode {
                // PROTO
                0x80 => match self.take()? {
                    [2] => {}
                    [version] => {
                        return Err(format!(
                            "the pickle has protocol {version}, expected 2, the default of torch.save"
                        ));
                    }
                },
                // STOP
                b'.' => return self.pop(),
                b'c' => self.global()?,
                b'(' => self.push(Value::Mark)?,
                b'N' => self.push(Value::None)?,
                // NEWTRUE, NEWFALSE
                0x88 | 0x89 => self.push(Value::Bool)?,
                // BININT, BININT1, BININT2, LONG1
                b'J' => {
                    let int = i32::from_le_bytes(self.take()?);
                    self.push(Value::Int(int.into()))?;
                }
                b'K' => {
                    let [int] = self.take()?;
                    self.push(Value::Int(int.into()))?;
                }
                b'M' => {
                    let int = u16::from_le_bytes(self.take()?);
                    self.push(Value::Int(int.into()))?;
                }
                0x8a => self.long()?,
                // BINUNICODE
                b'X' => {
                    let len = u32::from_le_bytes(self.take()?);
                    let text = std::str::from_utf8(self.take_slice(len as usize)?);
                    self.push(Value::Str(text.map_err(|_| "a text of the pickle is not UTF-8")?.into()))?;
                }
                // EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3, TUPLE
                b')' => self.push(Value::Tuple(Rc::new([]), 1))?,
                0x85..=0x87 => {
                    let start = self.stack.len().checked_sub(usize::from(opcode - 0x84)).ok_or_else(cut)?;
                    self.tuple(start)?;
                }
                b't' => {
                    let start = self.mark()?;
                    self.tuple(start + 1)?;
                    // The mark lies under the tuple.
                    self.stack.remove(start);
                }
                // EMPTY_DICT, SETITEM, SETITEMS
                b'}' => self.push(Value::Dict(Vec::new(), 1))?,
                b's' => {
                    let start = self.stack.len().checked_sub(2).ok_or_else(cut)?;
                    self.set_items(start)?;
                }
                b'u' => {
                    let start = self.mark()?;
                    self.stack.remove(start);
                    self.set_items(start)?;
                }
                // BINPUT, LONG_BINPUT, BINGET, LONG_BINGET
                b'q' => {
                    let [index] = self.take()?;
                    self.remember(index.into())?;
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.take()?);
                    self.remember(index)?;
                }
                b'h' => {
                    let [index] = self.take()?;
                    self.recall(index.into())?;
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.take()?);
                    self.recall(index)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                _ => {
                    return Err(format!("the pickle has opcode {opcode:#04x}, which no state dict of tensors needs"));
                }
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self.bytes.split_first_chunk().ok_or_else(cut)?;
        self.bytes = rest;
        Ok(*head)
    }

    fn take_slice(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.bytes.split_at_checked(len).ok_or_else(cut)?;
        self.bytes = rest;
        Ok(head)
    }

    fn take_line(&mut self) -> Result<&'a str, String> {
        let len = self.bytes.iter().position(|&byte| byte == b'\n').ok_or_else(cut)?;
        let line = self.take_slice(len + 1)?;
        std::str::from_utf8(&line[..len]).map_err(|_| "a name in the pickle is not UTF-8".to_owned())
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.stack.len() == MAX_STACK {
            return Err(format!("the pickle stacks more than {MAX_STACK} values, which no state dict needs"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(cut)
    }

    /// Position of the topmost mark.
    fn mark(&self) -> Result<usize, String> {
        self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or_else(cut)
    }

    /// The one place where names from the file meet what this program knows.
    fn global(&mut self) -> Result<(), String> {
        let (module, name) = (self.take_line()?, self.take_line()?);
        let global = Global::named(module, name).ok_or_else(|| {
            format!("the pickle asks for {module}.{name}, which no state dict of tensors needs; nothing was executed")
        })?;
        self.push(Value::Global(global))
    }

    fn long(&mut self) -> Result<(), String> {
        let [len] = self.take()?;
        let bytes = self.take_slice(len.into())?;
        // Two's complement, of as many bytes as the number needs.
        let fill = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
        let mut wide = [fill; 8];
        wide.get_mut(..bytes.len()).ok_or("a number of the pickle exceeds 64 bits")?.copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)))
    }

    /// Makes a tuple of everything from `start` on.
    fn tuple(&mut self, start: usize) -> Result<(), String> {
        let items = self.stack.split_off(start);
        if items.iter().any(|item| matches!(item, Value::Mark)) {
            return Err(cut());
        }
        let depth = deeper(items.iter().map(Value::depth).max().unwrap_or(0))?;
        self.push(Value::Tuple(items.into(), depth))
    }

    /// Moves the pairs from `start` on into the dictionary before them.
    fn set_items(&mut self, start: usize) -> Result<(), String> {
        let items = self.stack.split_off(start);
        let Some(Value::Dict(mut entries, mut depth)) = self.stack.pop() else {
            return Err("the pickle sets an item of what is no dictionary".to_owned());
        };
        if !items.len().is_multiple_of(2) || items.iter().any(|item| matches!(item, Value::Mark)) {
            return Err(cut());
        }
        let mut items = items.into_iter();
        while let (Some(key), Some(value)) = (items.next(), items.next()) {
            depth = depth.max(deeper(key.depth().max(value.depth()))?);
            entries.push((key, value));
        }
        self.push(Value::Dict(entries, depth))
    }

    fn remember(&mut self, index: u32) -> Result<(), String> {
        let top = self.stack.last().ok_or_else(cut)?;
        // A dictionary is filled after it was put aside, so that a copy would not be what was meant.
        let kept = (!matches!(top, Value::Dict(..) | Value::Mark)).then(|| top.clone());
        self.memo.insert(index, kept);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        match self.memo.get(&index) {
            Some(Some(value)) => self.push(value.clone()),
            Some(None) => Err("the pickle refers to a dictionary twice, which no state dict needs".to_owned()),
            None => Err(cut()),
        }
    }

    /// Reads the persistent id `("storage", class, key, location, len)`.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let Value::Tuple(fields, _) = &id else {
            return Err(format!("a storage of the pickle is {}, expected a tuple", id.kind()));
        };
        match &fields[..] {
            [
                Value::Str(kind),
                Value::Global(Global::Storage(dtype)),
                Value::Str(key),
                Value::Str(_),
                Value::Int(len),
            ] if **kind == *"storage" => {
                let storage = StorageRef { key: key.clone(), dtype: *dtype, len: size(*len)? };
                self.push(Value::Storage(Rc::new(storage)))
            }
            _ => Err("a storage of the pickle is not described as torch.save does".to_owned()),
        }
    }

    /// Makes what a call of a global would return.
    fn reduce(&mut self) -> Result<(), String> {
        let (arguments, global) = (self.pop()?, self.pop()?);
        let (Value::Tuple(arguments, _), Value::Global(global)) = (&arguments, &global) else {
            return Err(format!("the pickle calls {} with {}", global.kind(), arguments.kind()));
        };
        let value = match (global, &arguments[..]) {
            (Global::OrderedDict, []) => Value::Dict(Vec::new(), 1),
            (Global::RebuildParameter, [tensor @ Value::Tensor(_), ..]) => tensor.clone(),
            (
                Global::RebuildTensor,
                [Value::Storage(storage), Value::Int(offset), Value::Tuple(shape, _), Value::Tuple(strides, _), ..],
            ) => Value::Tensor(Rc::new(TensorRef {
                storage: storage.clone(),
                offset: size(*offset)?,
                shape: sizes(shape)?,
                strides: sizes(strides)?,
            })),
            (global, _) => return Err(format!("the pickle gives {global:?} arguments that torch.save does not write")),
        };
        self.push(value)
    }

    /// Attributes of a dictionary (`_metadata` of a state dict) are no part of the weights.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        match self.stack.last() {
            Some(Value::Dict(..)) => Ok(()),
            _ => Err("the pickle sets attributes of what is no dictionary".to_owned()),
        }
    }
}

fn cut() -> String {
    "the pickle is cut off or damaged".to_owned()
}

/// Depth of what holds values of this depth.
fn deeper(depth: usize) -> Result<usize, String> {
    if depth == MAX_DEPTH {
        return Err(format!("the pickle nests more than {MAX_DEPTH} levels, which no state dict needs"));
    }
    Ok(depth + 1)
}

fn size(int: i64) -> Result<usize, String> {
    usize::try_from(int).map_err(|_| format!("the pickle has a size of {int}, expected 0 or more"))
}

fn sizes(items: &[Value]) -> Result<Vec<usize>, String> {
    if items.len() > MAX_DIMS {
        return Err(format!("a tensor of the pickle has {} dimensions, expected at most {MAX_DIMS}", items.len()));
    }
    let size = |item: &Value| match item {
        Value::Int(int) => size(*int),
        item => Err(format!("a size in the pickle is {}, expected a number", item.kind())),
    };
    items.iter().map(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(pickle: &[u8]) -> String {
        read_state_dict(pickle).unwrap_err()
    }

    #[test]
    fn dictionaries_without_tensors_are_read() {
        assert_eq!(read_state_dict(b"\x80\x02}q\x00."), Ok(Vec::new()));
        assert_eq!(read_state_dict(b"\x80\x02ccollections\nOrderedDict\n)R}b."), Ok(Vec::new()));
    }

    #[test]
    fn what_could_execute_is_named_and_refused() {
        let system = refusal(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.");
        assert!(system.contains("posix.system") && system.contains("nothing was executed"), "{system}");
        assert!(refusal(b"\x80\x02ctorch\nload\n.").contains("torch.load"));
        // INST, OBJ, NEWOBJ, STACK_GLOBAL, EXT1 and the protocol that has more of them.
        for opcode in [b'i', b'o', 0x81, 0x93, 0x82] {
            assert!(refusal(&[0x80, 2, opcode]).contains("opcode"), "{opcode:#x}");
        }
        assert!(refusal(b"\x80\x04}.").contains("protocol 4"));
    }

    #[test]
    fn what_is_no_state_dict_is_refused() {
        let cases: [(&[u8], &str); 9] = [
            (b"", "cut off"),
            (b"\x80\x02", "cut off"),
            (b"\x80\x02.", "cut off"),
            (b"\x80\x02N.", "no dictionary"),
            (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.", "entry a is a number"),
            (b"\x80\x02}K\x01K\x01s.", "a key of the state dict is a number"),
            (b"\x80\x02}X\xff\xff\xff\xffa", "cut off"),
            (b"\x80\x02}q\x01h\x01.", "twice"),
            (b"\x80\x02Nb.", "no dictionary"),
        ];
        for (pickle, words) in cases {
            let message = refusal(pickle);
            assert!(message.contains(words), "{words:?} is not in: {message}");
        }
        // Tuples in tuples would be dropped recursively.
        let deep = [b"\x80\x02)".as_slice(), &[0x85; 100_000], b"."].concat();
        assert!(refusal(&deep).contains("nests"));
        assert!(refusal(&[b"\x80\x02".as_slice(), &[b'N'; MAX_STACK + 1]].concat()).contains("stacks"));
    }
}
