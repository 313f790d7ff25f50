//! [`PagePool`]: which K/V pages are free and how many hold each of the others. It knows numbers only, no device.

/// Pages of one class of [`page_classes`](crate::kv_cache::page_classes).
#[derive(Clone, Debug)]
struct Pages {
    /// Free pages; the last is the next to go.
    free: Vec<u32>,
    /// Holders of each page: sequences and the prefix cache.
    holders: Vec<u32>,
}

/// Reference counts of all K/V pages, by class.
#[derive(Clone, Debug)]
pub(crate) struct PagePool {
    classes: Vec<Pages>,
}

impl PagePool {
    /// All pages free.
    pub(crate) fn new(pages_in_class: &[usize]) -> Self {
        let pages = |count: &usize| Pages { free: (0..*count as u32).rev().collect(), holders: vec![0; *count] };
        Self { classes: pages_in_class.iter().map(pages).collect() }
    }

    /// Pages of a class in all.
    pub(crate) fn num_pages(&self, class: usize) -> usize {
        self.classes[class].holders.len()
    }

    /// Pages of a class that nobody holds.
    pub(crate) fn num_free(&self, class: usize) -> usize {
        self.classes[class].free.len()
    }

    /// Takes a free page for one holder.
    pub(crate) fn allocate(&mut self, class: usize) -> Option<u32> {
        let pages = &mut self.classes[class];
        let page = pages.free.pop()?;
        pages.holders[page as usize] = 1;
        Some(page)
    }

    /// Adds a holder to a page that has one already.
    pub(crate) fn share(&mut self, class: usize, page: u32) {
        let holders = &mut self.classes[class].holders[page as usize];
        assert!(*holders > 0, "page {page} of class {class} is shared, but nobody holds it");
        *holders += 1;
    }

    /// Whether a page has more than one holder.
    #[cfg(test)]
    pub(crate) fn is_shared(&self, class: usize, page: u32) -> bool {
        self.classes[class].holders[page as usize] > 1
    }

    /// Takes a holder away; the last one frees the page.
    pub(crate) fn release(&mut self, class: usize, page: u32) {
        let pages = &mut self.classes[class];
        let holders = &mut pages.holders[page as usize];
        assert!(*holders > 0, "page {page} of class {class} is released, but nobody holds it");
        *holders -= 1;
        if *holders == 0 {
            pages.free.push(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_return_with_their_last_holder() {
        let mut pool = PagePool::new(&[2, 1]);
        assert_eq!((pool.allocate(0), pool.allocate(0), pool.allocate(0)), (Some(0), Some(1), None));
        pool.share(0, 0);
        assert!(pool.is_shared(0, 0));
        pool.release(0, 0);
        assert_eq!(pool.num_free(0), 0);
        pool.release(0, 0);
        assert_eq!((pool.num_free(0), pool.allocate(0)), (1, Some(0)));
        assert_eq!((pool.num_free(1), pool.num_pages(1)), (1, 1));
    }

    #[test]
    #[should_panic(expected = "nobody holds it")]
    fn a_free_page_cannot_be_released() {
        PagePool::new(&[1]).release(0, 0);
    }
}
