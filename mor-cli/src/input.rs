//! Text files that people name.

use std::path::Path;

use crate::failure::bad_input;

/// Reads a file of UTF-8 text.
pub(crate) fn read_text(path: &Path) -> anyhow::Result<String> {
    let bytes = std::fs::read(path).map_err(|error| bad_input!("cannot read {}: {error}", path.display()))?;
    utf8(bytes, &path.display().to_string())
}

/// Takes bytes for the UTF-8 text they must be; `origin` names them in the message.
pub(crate) fn utf8(bytes: Vec<u8>, origin: &str) -> anyhow::Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        bad_input!("{origin}: not UTF-8 text at byte {at}; convert it to UTF-8 first")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_located() {
        assert_eq!(utf8(b"ab".to_vec(), "p.txt").unwrap(), "ab");
        let message = utf8(b"ab\xff".to_vec(), "p.txt").unwrap_err().to_string();
        assert_eq!(message, "p.txt: not UTF-8 text at byte 2; convert it to UTF-8 first");
    }
}
