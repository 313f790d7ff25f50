//! Ctrl-C: it ends what is being generated, and a second one the program.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::failure::INTERRUPTED;
use crate::{print, style};

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// From here on Ctrl-C asks for an end; a second one that meets the first still there ends the program.
pub(crate) fn watch() -> Result<(), ctrlc::Error> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::Relaxed) {
            if style::stdout_has_colour() {
                let _ = print(style::RESET);
            }
            std::process::exit(INTERRUPTED.into());
        }
    })
}

/// Whether an end was asked for.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

/// What was asked for has been done.
pub(crate) fn clear() {
    REQUESTED.store(false, Ordering::Relaxed);
}
