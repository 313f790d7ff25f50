//! [`PrefixCache`]: the K/V pages of beginnings that sequences may have in common.
//!
//! Routing is causal: what a token computes depends on the tokens before it alone. So a sequence that begins like
//! another takes over its entries. Beginnings are kept in blocks of [`BLOCK`] tokens, each under the one before it. How
//! many entries a block leaves in a K/V group depends on its tokens' depths, so a block knows the pages that it filled and,
//! where its last entry does not fill one, the page that it stands in: that one a sequence copies before it goes on.

use std::collections::{BTreeSet, HashMap};

use mor_kernels::rows::PAGE_SIZE;
use mor_model::KvLayout;

use crate::page_pool::PagePool;

/// Tokens of a block: those of a page, so that every block fills at least one page of the groups that hold all tokens.
pub(crate) const BLOCK: usize = PAGE_SIZE as usize;

/// Where a beginning ends. Never given twice, so that one that is no longer kept is not mistaken for another.
pub(crate) type BlockId = u64;

/// Pages of one K/V group.
#[derive(Clone, Debug, Default)]
struct GroupPages {
    /// Those that this block filled.
    full: Vec<u32>,
    /// The page of the last entry, unless full.
    partial: Option<u32>,
}

#[derive(Debug)]
struct Block {
    parent: Option<BlockId>,
    tokens: Box<[u32]>,
    depths: Box<[u32]>,
    groups: Vec<GroupPages>,
    /// Tokens up to its end.
    num_tokens: usize,
    num_children: usize,
    /// The clock when it was used last.
    used: u64,
}

/// A beginning that was found.
#[derive(Debug, Default)]
pub(crate) struct Prefix {
    /// Recursions of its tokens; their number is a multiple of [`BLOCK`].
    pub(crate) depths: Vec<u32>,
    /// Per K/V group, the full pages; the caller becomes one of their holders.
    pub(crate) full: Vec<Vec<u32>>,
    /// Per K/V group, the page to copy; held for the caller too until the copy is submitted.
    pub(crate) partial: Vec<Option<u32>>,
    /// Where it ends.
    pub(crate) end: Option<BlockId>,
}

impl Prefix {
    /// Nothing, of `num_groups` K/V groups.
    pub(crate) fn none(num_groups: usize) -> Self {
        Self { full: vec![Vec::new(); num_groups], partial: vec![None; num_groups], ..Self::default() }
    }
}

/// Beginnings of sequences by their tokens. The pages' holders are counted in a [`PagePool`].
#[derive(Debug)]
pub(crate) struct PrefixCache {
    layout: KvLayout,
    /// Class of each K/V group's pages; `None` for a group without entries.
    class_of_group: Vec<Option<usize>>,
    blocks: HashMap<BlockId, Block>,
    /// By the block before and the tokens; whole tokens are compared, so no collision can mix up texts.
    children: HashMap<(Option<BlockId>, Box<[u32]>), BlockId>,
    /// Blocks that no other continues, by their last use.
    leaves: BTreeSet<(u64, BlockId)>,
    next_id: BlockId,
    clock: u64,
}

impl PrefixCache {
    pub(crate) fn new(layout: KvLayout, class_of_group: Vec<Option<usize>>) -> Self {
        Self {
            layout,
            class_of_group,
            blocks: HashMap::new(),
            children: HashMap::new(),
            leaves: BTreeSet::new(),
            next_id: 0,
            clock: 0,
        }
    }

    /// The longest beginning of `tokens` that is known and no longer than `most` tokens. Its pages get a holder more.
    pub(crate) fn find(&mut self, tokens: &[u32], most: usize, pool: &mut PagePool) -> Prefix {
        self.clock += 1;
        let mut prefix = Prefix::none(self.class_of_group.len());
        for tokens in tokens[..most.min(tokens.len())].chunks_exact(BLOCK) {
            let Some(&id) = self.children.get(&(prefix.end, Box::from(tokens))) else { break };
            self.touch(id);
            let block = &self.blocks[&id];
            prefix.depths.extend_from_slice(&block.depths);
            for (group, pages) in block.groups.iter().enumerate() {
                prefix.full[group].extend_from_slice(&pages.full);
                prefix.partial[group] = pages.partial;
            }
            prefix.end = Some(id);
        }
        for (group, class) in self.class_of_group.iter().enumerate() {
            if let Some(class) = *class {
                prefix.full[group].iter().chain(&prefix.partial[group]).for_each(|page| pool.share(class, *page));
            }
        }
        prefix
    }

    /// Keeps the whole blocks of a sequence: `tokens` with their `depths` and, per K/V group, the pages in the order
    /// of their entries. `known` is what the last call for this sequence, or [`PrefixCache::find`], returned; the
    /// result is for the next.
    pub(crate) fn insert(
        &mut self,
        known: Option<BlockId>,
        tokens: &[u32],
        depths: &[u32],
        pages: &[Vec<u32>],
        pool: &mut PagePool,
    ) -> Option<BlockId> {
        self.clock += 1;
        // What was known may have been given up meanwhile.
        let mut end = known.filter(|id| self.blocks.contains_key(id));
        let mut first = end.map_or(0, |id| self.blocks[&id].num_tokens);
        while first + BLOCK <= tokens.len().min(depths.len()) {
            let range = first..first + BLOCK;
            let key = (end, Box::from(&tokens[range.clone()]));
            let id = match self.children.get(&key) {
                Some(id) => *id,
                None => {
                    let groups = self.hold_pages(&depths[..first], &depths[range.clone()], pages, pool);
                    let id = self.next_id;
                    self.next_id += 1;
                    if let Some(parent) = end {
                        let block = self.blocks.get_mut(&parent).expect("a parent is kept");
                        block.num_children += 1;
                        self.leaves.remove(&(block.used, parent));
                    }
                    let depths = Box::from(&depths[range.clone()]);
                    let (tokens, num_tokens) = (key.1.clone(), range.end);
                    let block = Block { parent: end, tokens, depths, groups, num_tokens, num_children: 0, used: 0 };
                    self.blocks.insert(id, block);
                    self.children.insert(key, id);
                    id
                }
            };
            self.touch(id);
            end = Some(id);
            first += BLOCK;
        }
        end
    }

    /// Marks a block as used now.
    fn touch(&mut self, id: BlockId) {
        let block = self.blocks.get_mut(&id).expect("the block is kept");
        self.leaves.remove(&(block.used, id));
        block.used = self.clock;
        if block.num_children == 0 {
            self.leaves.insert((block.used, id));
        }
    }

    /// The pages of a block whose depths are `own`, after tokens of depths `before`.
    fn hold_pages(&self, before: &[u32], own: &[u32], pages: &[Vec<u32>], pool: &mut PagePool) -> Vec<GroupPages> {
        let page_size = PAGE_SIZE as usize;
        let hold = |(group, class): (usize, &Option<usize>)| {
            let Some(class) = *class else { return GroupPages::default() };
            let count = |depths: &[u32]| depths.iter().filter(|depth| self.layout.group_holds(group, **depth)).count();
            let start = count(before);
            let end = start + count(own);
            let full = pages[group][start / page_size..end / page_size].to_vec();
            let partial = (end % page_size > 0).then(|| pages[group][end / page_size]);
            full.iter().chain(&partial).for_each(|page| pool.share(class, *page));
            GroupPages { full, partial }
        };
        self.class_of_group.iter().enumerate().map(hold).collect()
    }

    /// Gives up the block that was not used for longest among those that no other continues; `false` if nothing is
    /// kept.
    pub(crate) fn evict(&mut self, pool: &mut PagePool) -> bool {
        let Some((_, id)) = self.leaves.pop_first() else { return false };
        let block = self.blocks.remove(&id).expect("leaves are kept");
        for (pages, class) in block.groups.iter().zip(&self.class_of_group) {
            if let Some(class) = *class {
                pages.full.iter().chain(&pages.partial).for_each(|page| pool.release(class, *page));
            }
        }
        self.children.remove(&(block.parent, block.tokens));
        if let Some(id) = block.parent {
            let parent = self.blocks.get_mut(&id).expect("a parent outlives its children");
            parent.num_children -= 1;
            if parent.num_children == 0 {
                self.leaves.insert((parent.used, id));
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use mor_model::{LayerLayout, MorConfig};

    use super::*;

    fn cache() -> (PrefixCache, PagePool) {
        let config = MorConfig::from_json_str(
            r#"{ "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4,
                "num_attention_heads": 4, "rms_norm_eps": 1e-5,
                "mor": { "mode": "expert", "sharing": "middle_cycle", "num_recursion": 2 } }"#,
            "test",
        )
        .expect("the configuration is valid");
        let layout = KvLayout::new(&config, &LayerLayout::new(&config));
        (PrefixCache::new(layout, vec![Some(0), Some(1), Some(1)]), PagePool::new(&[8, 16]))
    }

    /// 80 tokens of alternating depth 2 and 1: 80 entries in the first two groups, 40 in the last.
    fn sequence(pool: &mut PagePool) -> (Vec<u32>, Vec<u32>, Vec<Vec<u32>>) {
        let depths: Vec<u32> = (0..80).map(|i| 2 - i % 2).collect();
        let mut take = |class, count| (0..count).map(|_| pool.allocate(class).expect("free")).collect();
        ((0..80).collect(), depths, vec![take(0, 3), take(1, 3), take(1, 2)])
    }

    #[test]
    fn beginnings_are_found_by_block() {
        let (mut cache, mut pool) = cache();
        let (tokens, depths, pages) = sequence(&mut pool);
        let end = cache.insert(None, &tokens, &depths, &pages, &mut pool);
        assert_eq!(cache.insert(end, &tokens, &depths, &pages, &mut pool), end);

        let prefix = cache.find(&tokens, tokens.len() - 1, &mut pool);
        assert_eq!((prefix.depths.len(), prefix.end), (64, end));
        assert_eq!(prefix.full, [pages[0][..2].to_vec(), pages[1][..2].to_vec(), pages[2][..1].to_vec()]);
        assert_eq!(prefix.partial, [None, None, None]);
        // One block leaves 16 entries in the last group: a page that is not full.
        let prefix = cache.find(&tokens, 63, &mut pool);
        assert_eq!((prefix.depths.len(), &prefix.full[2], prefix.partial[2]), (32, &Vec::new(), Some(pages[2][0])));
        let other: Vec<u32> = (1..80).collect();
        assert_eq!(cache.find(&other, 79, &mut pool).depths.len(), 0);
    }

    #[test]
    fn all_pages_return() {
        let (mut cache, mut pool) = cache();
        let (tokens, depths, pages) = sequence(&mut pool);
        let end = cache.insert(None, &tokens, &depths, &pages, &mut pool);
        for (pages, class) in pages.iter().zip([0, 1, 1]) {
            pages.iter().for_each(|page| pool.release(class, *page));
        }
        assert_eq!((pool.num_free(0), pool.num_free(1)), (6, 13));
        // The later block goes first: nothing continues it.
        assert!(cache.evict(&mut pool));
        assert_eq!(cache.find(&tokens, 79, &mut pool).depths.len(), 32);
        for (class, page) in [(0, pages[0][0]), (1, pages[1][0]), (1, pages[2][0])] {
            pool.release(class, page);
        }
        assert!(cache.evict(&mut pool) && !cache.evict(&mut pool));
        assert_eq!((pool.num_free(0), pool.num_free(1)), (8, 16));
        // What was known is gone; the sequence starts anew.
        let (_, _, pages) = sequence(&mut pool);
        assert_ne!(cache.insert(end, &tokens, &depths, &pages, &mut pool), end);
    }
}
