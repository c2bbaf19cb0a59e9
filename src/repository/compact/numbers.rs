//! Names of which there are few, said very often: each gets a number.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;

/// Names and their numbers.
#[derive(Debug)]
pub(super) struct Numbers<T> {
    list: Vec<T>,
    numbers: HashMap<T, u32>,
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self { list: Vec::new(), numbers: HashMap::new() }
    }
}

impl<T: Clone + Eq + Hash> Numbers<T> {
    /// The number of a name, which it gets when it is first seen.
    pub(super) fn of(&mut self, name: &T) -> u32 {
        if let Some(known) = self.numbers.get(name) {
            return *known;
        }
        let number = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        self.list.push(name.clone());
        self.numbers.insert(name.clone(), number);
        number
    }

    /// The number of a name that was seen.
    pub(super) fn known(&self, name: &T) -> Option<u32> {
        self.numbers.get(name).copied()
    }

    /// The names of numbers.
    pub(super) fn names<'a>(&'a self, numbers: &'a BTreeSet<u32>) -> impl Iterator<Item = &'a T> {
        numbers.iter().filter_map(|number| self.name(*number))
    }

    /// The name of a number.
    pub(super) fn name(&self, number: u32) -> Option<&T> {
        self.list.get(number as usize)
    }
}
