//! Colours: one per depth, and only where they are wanted.

use std::io::IsTerminal;

/// Ends every colour.
pub(crate) const RESET: &str = "\x1b[0m";
/// Less bright, for the prompt.
pub(crate) const DIM: &str = "\x1b[2m";

/// 256-colour codes from shallow to deep, cool to warm, told apart also by those who do not see red or green.
const PALETTE: [u8; 6] = [39, 43, 221, 208, 197, 170];
/// Depth 0: a token that no recursion took.
const GREY: u8 = 245;

/// Whether standard output takes colours.
pub(crate) fn stdout_has_colour() -> bool {
    std::io::stdout().is_terminal() && colours_wanted()
}

/// Whether standard error takes colours.
pub(crate) fn stderr_has_colour() -> bool {
    std::io::stderr().is_terminal() && colours_wanted()
}

/// See no-color.org.
fn colours_wanted() -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb")
}

/// Escape sequence of a depth; more recursions than colours share them evenly.
pub(crate) fn depth_colour(depth: u32, num_recursions: usize) -> String {
    let code = match (depth as usize).checked_sub(1) {
        None => GREY,
        Some(step) if num_recursions <= PALETTE.len() => PALETTE[step.min(PALETTE.len() - 1)],
        Some(step) => PALETTE[(step * PALETTE.len() / num_recursions).min(PALETTE.len() - 1)],
    };
    format!("\x1b[38;5;{code}m")
}

/// Text in the colour of its depth.
pub(crate) fn coloured(text: &str, depth: u32, num_recursions: usize) -> String {
    format!("{}{text}{RESET}", depth_colour(depth, num_recursions))
}

/// Text followed by its depth, before any white space at its end: `word(2)`.
pub(crate) fn marked(text: &str, depth: u32) -> String {
    let word = text.trim_end();
    format!("{word}({depth}){}", &text[word.len()..])
}

/// Which colour is which depth, with the share of the tokens that took it: `depth 1 (40 %)  2 (35 %)  3 (25 %)`.
pub(crate) fn legend(depths: &[u32], num_recursions: usize, colour: bool) -> String {
    let deepest = depths.iter().copied().max().unwrap_or(0).max(num_recursions as u32);
    let shallowest = u32::from(!depths.contains(&0));
    let entries = (shallowest..=deepest).map(|depth| {
        let count = depths.iter().filter(|&&d| d == depth).count();
        let entry = format!("{depth} ({:.0} %)", 100.0 * count as f64 / depths.len().max(1) as f64);
        if colour { coloured(&entry, depth, num_recursions) } else { entry }
    });
    format!("depth {}", entries.collect::<Vec<_>>().join("  "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_have_their_own_colours_while_there_are_enough() {
        let codes: Vec<String> = (0..=6).map(|depth| depth_colour(depth, 6)).collect();
        assert!(codes.iter().enumerate().all(|(i, code)| !codes[..i].contains(code)));
        assert_eq!(depth_colour(12, 12), depth_colour(6, 6));
        assert_eq!(depth_colour(1, 12), depth_colour(1, 6));
        assert_eq!(depth_colour(9, 3), depth_colour(6, 6), "depths beyond the recursions do not panic");
    }

    #[test]
    fn marks_stand_before_the_line_end() {
        assert_eq!(marked(" girl", 2), " girl(2)");
        assert_eq!(marked(".\n", 3), ".(3)\n");
        assert_eq!(marked("\n", 1), "(1)\n");
    }

    #[test]
    fn the_legend_gives_shares() {
        assert_eq!(legend(&[1, 2, 2, 1], 3, false), "depth 1 (50 %)  2 (50 %)  3 (0 %)");
        assert_eq!(legend(&[0, 1], 1, false), "depth 0 (50 %)  1 (50 %)");
        assert_eq!(legend(&[], 2, false), "depth 1 (0 %)  2 (0 %)");
        assert_eq!(legend(&[1], 1, true), format!("depth {}1 (100 %){RESET}", depth_colour(1, 1)));
    }
}
