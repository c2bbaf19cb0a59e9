//! The house rules that a compiler does not know: which room may know which, no cycles, no giants, no drawers for
//! everything.
//!
//! Sources are read as tokens, so comments, documentation and strings do not count, and paths inside macros do. An
//! arrow is a path that begins with `crate`, `super`, `self` or (in `main.rs`) `drctl`; a name that a module re-exports
//! leads to where it is defined. Code under `#[cfg(test)]` may know more than the code it tests and is not looked at.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

const MAX_LINES: usize = 600;
const BANNED_NAMES: [&str; 7] = ["utils", "util", "common", "helpers", "helper", "manager", "misc"];

/// Every arrow that may be drawn between rooms.
const ALLOWED: [(&str, &[&str]); 16] = [
    ("model", &[]),
    ("observe", &["model"]),
    ("codec", &["model", "observe"]),
    ("disk", &["model", "observe"]),
    ("pg", &["model", "observe", "disk"]),
    ("source", &["model", "pg", "codec", "disk", "observe"]),
    ("store", &["model", "pg", "codec", "disk", "observe"]),
    ("keys", &["model", "pg", "codec", "disk", "observe"]),
    ("notify", &["model", "pg", "codec", "disk", "observe"]),
    ("repository", &["model", "pg", "codec", "disk", "observe", "store", "keys"]),
    ("jobs", &["model", "pg", "codec", "disk", "observe", "source", "notify", "repository"]),
    ("config", &["model"]),
    (
        "app",
        &[
            "model",
            "pg",
            "codec",
            "disk",
            "observe",
            "source",
            "store",
            "keys",
            "notify",
            "repository",
            "jobs",
            "config",
        ],
    ),
    ("daemon", &["model", "observe", "jobs", "config", "app"]),
    // The results of jobs are made of the vault's words, and the command line renders them; it reads and writes nothing.
    ("cli", &["model", "observe", "repository", "jobs", "config", "app", "daemon"]),
    ("main", &["cli", "daemon"]),
];

/// A module's path below the crate; the crate itself is empty, and `main.rs` is a room called `main`.
type Module = Vec<String>;

/// One place where a module names another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Arrow {
    file: String,
    line: usize,
    from: Module,
    /// The path as far as it is written, for example `store::s3::S3Store`.
    to: Module,
}

impl fmt::Display for Arrow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} -> {}", self.file, self.line, shown(&self.from), shown(&self.to))
    }
}

fn shown(module: &[String]) -> String {
    if module.is_empty() { "crate".to_owned() } else { module.join("::") }
}

/// What the sources say.
#[derive(Debug, Default)]
struct House {
    modules: BTreeSet<Module>,
    arrows: Vec<Arrow>,
    /// `pub use`: the visible path and the path it stands for.
    reexports: BTreeMap<Module, Module>,
    /// Modules declared under `#[cfg(test)]`, also those in files of their own.
    test_modules: BTreeSet<Module>,
}

impl House {
    /// Reads `(path below src, text)` of every file.
    fn read(sources: &[(String, String)]) -> Self {
        let mut house = Self::default();
        house.modules.insert(Vec::new());
        for (file, _) in sources {
            house.modules.insert(module_of(file));
        }
        for (file, text) in sources {
            let tokens: TokenStream = text.parse().unwrap_or_else(|error| panic!("{file}: {error}"));
            Reader { house: &mut house, file, module: module_of(file) }.items(tokens);
        }
        let tests = house.test_modules.clone();
        house.arrows.retain(|arrow| !tests.iter().any(|test| arrow.from.starts_with(test)));
        house
    }

    /// Follows re-exports to where a name is defined.
    fn resolve(&self, path: &[String]) -> Module {
        let mut path = path.to_vec();
        // A chain of re-exports is short; a circle of them does not compile.
        for _ in 0..8 {
            let found = (1..=path.len()).rev().find_map(|n| self.reexports.get(&path[..n]).map(|to| (n, to)));
            let Some((n, to)) = found else { break };
            path = to.iter().chain(&path[n..]).cloned().collect();
        }
        path
    }

    /// The arrows that the floors forbid.
    fn wrong_arrows(&self) -> Vec<String> {
        let allowed: BTreeMap<_, _> = ALLOWED.into_iter().collect();
        let mut wrong = Vec::new();
        for arrow in &self.arrows {
            // lib.rs names its rooms in order to re-export; that is its job.
            let (Some(from), Some(to)) = (arrow.from.first(), arrow.to.first()) else { continue };
            if from == to {
                continue;
            }
            let Some(may) = allowed.get(from.as_str()) else {
                wrong.push(format!("{arrow}: the room {from} is on no floor; add it to ALLOWED"));
                continue;
            };
            // A name that is re-exported by lib.rs leads to its room.
            let resolved = self.resolve(&arrow.to);
            let to = resolved.first().unwrap_or(to);
            let is_room = allowed.contains_key(to.as_str()) || self.modules.contains(std::slice::from_ref(to));
            if from != to && is_room && !may.contains(&to.as_str()) {
                wrong.push(format!("{arrow}: {from} may know only [{}]", may.join(", ")));
            }
        }
        wrong
    }

    /// One circle for every knot of modules with the same parent that know each other, at every depth.
    ///
    /// The parent itself is left out: it lays out its children and tells the story with them, and they use its words.
    fn cycles(&self) -> Vec<String> {
        let mut circles = Vec::new();
        for parent in &self.modules {
            let mut graph: BTreeMap<&str, BTreeMap<String, &Arrow>> = BTreeMap::new();
            for arrow in &self.arrows {
                let to = self.resolve(&arrow.to);
                let Some(from) = self.child(parent, &arrow.from) else { continue };
                let Some(to) = self.child(parent, &to) else { continue };
                if from != to {
                    graph.entry(from).or_default().entry(to.to_owned()).or_insert(arrow);
                }
            }
            circles.extend(circle_in(&graph).map(|arrows| {
                let places: Vec<_> = arrows.iter().map(|arrow| format!("    {arrow}")).collect();
                format!("a cycle between modules of {}:\n{}", shown(parent), places.join("\n"))
            }));
        }
        circles
    }

    /// The child of `parent` that `path` leads into.
    fn child<'p>(&self, parent: &[String], path: &'p [String]) -> Option<&'p str> {
        let child = path.get(..=parent.len())?;
        (child.starts_with(parent) && self.modules.contains(child)).then(|| path[parent.len()].as_str())
    }
}

/// The arrows of one circle, if there is any.
fn circle_in<'a>(graph: &BTreeMap<&str, BTreeMap<String, &'a Arrow>>) -> Option<Vec<&'a Arrow>> {
    fn walk<'a>(
        graph: &BTreeMap<&str, BTreeMap<String, &'a Arrow>>,
        node: &str,
        trail: &mut Vec<(String, Option<&'a Arrow>)>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<&'a Arrow>> {
        for (next, arrow) in graph.get(node).into_iter().flatten() {
            if let Some(start) = trail.iter().position(|(name, _)| name == next) {
                let mut circle: Vec<_> = trail[start + 1..].iter().filter_map(|(_, arrow)| *arrow).collect();
                circle.push(arrow);
                return Some(circle);
            }
            if done.contains(next) {
                continue;
            }
            trail.push((next.clone(), Some(arrow)));
            if let Some(circle) = walk(graph, next, trail, done) {
                return Some(circle);
            }
            trail.pop();
        }
        done.insert(node.to_owned());
        None
    }
    let mut done = BTreeSet::new();
    graph.keys().find_map(|node| walk(graph, node, &mut vec![((*node).to_owned(), None)], &mut done))
}

/// `store/s3/mod.rs` is `store::s3`.
fn module_of(file: &str) -> Module {
    let path = file.strip_suffix(".rs").unwrap_or(file);
    let mut module: Module = path.split('/').map(str::to_owned).collect();
    match module.last().map(String::as_str) {
        Some("mod") => drop(module.pop()),
        Some("lib") if module.len() == 1 => module.clear(),
        _ => {}
    }
    module
}

/// Walks the tokens of one module.
struct Reader<'a> {
    house: &'a mut House,
    file: &'a str,
    module: Module,
}

impl Reader<'_> {
    /// Items, statements, expressions: whatever is between two braces.
    fn items(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut at = 0;
        let mut test = false;
        let mut public = false;
        while at < tokens.len() {
            if is_cfg_test(&tokens[at..]) {
                test = true;
                at += 2;
            } else if let Some(rest) = tokens.get(at..).filter(|rest| is_ident(&rest[0], "mod")) {
                let after = self.module_item(rest, test);
                at += after;
                (test, public) = (false, false);
            } else if test && ends_item(&tokens[at]) {
                test = false;
                at += 1;
            } else if test {
                at += 1;
            } else if is_ident(&tokens[at], "use") {
                let end = tokens[at..].iter().position(|token| is_punct(token, ';')).map_or(tokens.len(), |n| at + n);
                self.use_tree(&tokens[at + 1..end], &[], public);
                at = end;
            } else if is_ident(&tokens[at], "pub") {
                public = true;
                at += 1;
            } else {
                // `pub(crate)` belongs to the item that follows.
                public &= matches!(&tokens[at], TokenTree::Group(group) if group.delimiter() == Delimiter::Parenthesis);
                at += self.expression(&tokens, at);
            }
        }
    }

    /// `mod name;` or `mod name { … }`; returns how many tokens it has.
    fn module_item(&mut self, tokens: &[TokenTree], test: bool) -> usize {
        let Some(TokenTree::Ident(name)) = tokens.get(1) else { return 1 };
        let mut module = self.module.clone();
        if module.first().is_some_and(|first| first == "main") {
            return 2;
        }
        module.push(name.to_string());
        if test {
            self.house.test_modules.insert(module.clone());
        }
        if let Some(TokenTree::Group(body)) = tokens.get(2)
            && body.delimiter() == Delimiter::Brace
        {
            if !test {
                self.house.modules.insert(module.clone());
                Reader { house: self.house, file: self.file, module }.items(body.stream());
            }
            return 3;
        }
        2
    }

    /// A path or a group or any other token at `at`; returns how many tokens it has.
    fn expression(&mut self, tokens: &[TokenTree], at: usize) -> usize {
        match &tokens[at] {
            TokenTree::Group(group) => {
                self.items(group.stream());
                1
            }
            TokenTree::Ident(first) if !follows_colons(tokens, at) => {
                let mut path = vec![first.to_string()];
                let mut end = at + 1;
                while is_colons(tokens, end)
                    && let Some(TokenTree::Ident(next)) = tokens.get(end + 2)
                {
                    path.push(next.to_string());
                    end += 3;
                }
                if path.len() > 1
                    && let Some(to) = self.absolute(&path)
                {
                    self.arrow(first.span().start().line, to);
                }
                end - at
            }
            _ => 1,
        }
    }

    /// `a::{b, c::d as e, f::*}` after `prefix`.
    fn use_tree(&mut self, tokens: &[TokenTree], prefix: &[String], public: bool) {
        let mut path = prefix.to_vec();
        let mut line = 0;
        let mut alias = None;
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at] {
                TokenTree::Ident(word) if word == "as" => {
                    alias = tokens.get(at + 1).map(ToString::to_string);
                    at += 1;
                }
                TokenTree::Ident(word) => {
                    line = word.span().start().line;
                    path.push(word.to_string());
                }
                TokenTree::Group(group) => {
                    let inner: Vec<TokenTree> = group.stream().into_iter().collect();
                    for branch in inner.split(|token| is_punct(token, ',')).filter(|branch| !branch.is_empty()) {
                        self.use_tree(branch, &path, public);
                    }
                    return;
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
            at += 1;
        }
        // `use a::{self}` names a.
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
        }
        let Some(to) = self.absolute(&path).or_else(|| self.relative(&path)) else { return };
        if public && let Some(name) = alias.or_else(|| to.last().cloned()) {
            let visible = self.module.iter().cloned().chain([name]).collect();
            if visible != to {
                self.house.reexports.insert(visible, to.clone());
            }
        }
        self.arrow(line, to);
    }

    fn arrow(&mut self, line: usize, to: Module) {
        self.house.arrows.push(Arrow { file: format!("src/{}", self.file), line, from: self.module.clone(), to });
    }

    /// A path that begins with `crate`, `self`, `super` or the crate's own name.
    fn absolute(&self, path: &[String]) -> Option<Module> {
        let supers = path.iter().take_while(|word| *word == "super").count();
        let (base, rest): (&[String], &[String]) = match path.first()?.as_str() {
            "crate" | "drctl" => (&[], &path[1..]),
            "self" if path.get(1).is_some_and(|word| word == "super") => {
                let supers = path[1..].iter().take_while(|word| *word == "super").count();
                (&self.module[..self.module.len().checked_sub(supers)?], &path[1 + supers..])
            }
            "self" => (&self.module, &path[1..]),
            "super" => (&self.module[..self.module.len().checked_sub(supers)?], &path[supers..]),
            _ => return None,
        };
        Some(base.iter().chain(rest).cloned().collect())
    }

    /// A path of a `use` that begins with a child of this module.
    fn relative(&self, path: &[String]) -> Option<Module> {
        let child: Module = self.module.iter().chain(path.first()).cloned().collect();
        self.house.modules.contains(&child).then(|| self.module.iter().chain(path).cloned().collect())
    }
}

/// Whether an item ends here: at its semicolon or its body.
fn ends_item(token: &TokenTree) -> bool {
    is_punct(token, ';') || matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace)
}

/// `#[cfg(test)]`
fn is_cfg_test(tokens: &[TokenTree]) -> bool {
    let [hash, TokenTree::Group(attribute), ..] = tokens else { return false };
    is_punct(hash, '#') && attribute.stream().to_string().replace(' ', "") == "cfg(test)"
}

fn is_ident(token: &TokenTree, name: &str) -> bool {
    matches!(token, TokenTree::Ident(ident) if ident == name)
}

fn is_punct(token: &TokenTree, character: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == character)
}

fn is_colons(tokens: &[TokenTree], at: usize) -> bool {
    tokens.get(at..at + 2).is_some_and(|pair| pair.iter().all(|token| is_punct(token, ':')))
}

fn follows_colons(tokens: &[TokenTree], at: usize) -> bool {
    at >= 2 && is_colons(tokens, at - 2)
}

/// Files that are too long or whose name says nothing.
fn untidy(sources: &[(String, String)]) -> Vec<String> {
    let mut untidy = Vec::new();
    for (file, text) in sources {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            untidy.push(format!("src/{file}: {lines} lines; {MAX_LINES} is the most, split it by meaning"));
        }
        for name in module_of(file).iter().filter(|name| BANNED_NAMES.contains(&name.as_str())) {
            untidy.push(format!("src/{file}: the name {name} says nothing; name what is inside"));
        }
    }
    untidy
}

/// Every source file, by its path below src.
fn sources() -> Vec<(String, String)> {
    fn collect(directory: &Path, below: &str, into: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{below}{}", entry.file_name().to_string_lossy());
            if entry.file_type().unwrap().is_dir() {
                collect(&entry.path(), &format!("{name}/"), into);
            } else if name.ends_with(".rs") {
                into.push((name, std::fs::read_to_string(entry.path()).unwrap()));
            }
        }
    }
    let mut files = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut files);
    files.sort();
    assert!(files.iter().any(|(file, _)| file == "lib.rs"), "the sources were not found");
    files
}

fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "{} complaint(s):\n{}", complaints.len(), complaints.join("\n"));
}

#[test]
fn arrows_point_down() {
    assert_none(&House::read(&sources()).wrong_arrows());
}

#[test]
fn no_module_knows_itself_through_others() {
    assert_none(&House::read(&sources()).cycles());
}

#[test]
fn files_are_small_and_well_named() {
    assert_none(&untidy(&sources()));
}

/// The checks themselves must be able to fail.
mod proof {
    use super::*;

    fn house(files: &[(&str, &str)]) -> House {
        let sources: Vec<_> = files.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect();
        House::read(&sources)
    }

    fn wrong(file: &str, text: &str) -> Vec<String> {
        let rooms = ["model", "pg", "store", "keys", "jobs", "repository", "cli", "source", "config", "app"];
        let empty: Vec<_> = rooms.iter().map(|room| format!("{room}/mod.rs")).collect();
        let mut files: Vec<_> =
            empty.iter().filter(|name| *name != file).map(|name| (name.as_str(), "pub struct Word;")).collect();
        files.push((file, text));
        house(&files).wrong_arrows()
    }

    #[test]
    fn a_wrong_arrow_is_named_with_its_place_and_rule() {
        let complaints = wrong("jobs/backup/mod.rs", "\n\nuse crate::store::ObjectStore;");
        let expected = "src/jobs/backup/mod.rs:3: jobs::backup -> store::ObjectStore: jobs may know only [model, ";
        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].starts_with(expected), "{}", complaints[0]);
    }

    #[test]
    fn every_way_to_write_a_wrong_arrow_is_found() {
        for text in [
            "use crate::{model::Lsn, store};",
            "use crate::{model::{self, Lsn}, store::{self as s, Put}};",
            "use crate::store as s;",
            "use crate::store::*;",
            "pub(crate) use crate::store::Put;",
            "use super::store::Put;",
            "fn f() { crate::store::put() }",
            "fn f(x: &crate::store::Put) {}",
            "fn f() { let x = vec![format!(\"{}\", crate::store::name())]; }",
            "mod inner { use super::super::store::Put; }",
            "mod inner { fn f() { self::super::super::store::put() } }",
            "macro_rules! m { () => { $crate::store::put() } }",
            "impl crate::store::ObjectStore for X {}",
            "fn f() -> Result<(), <X as crate::store::Y>::Error> {}",
            "#[cfg(test)] mod tests { } use crate::store::Put;",
            "#[cfg(test)] use crate::model::Lsn; use crate::store::Put;",
            "#[cfg(not(test))] use crate::store::Put;",
        ] {
            assert!(!wrong("jobs/mod.rs", text).is_empty(), "{text}");
        }
    }

    #[test]
    fn what_is_no_arrow_is_not_counted() {
        for text in [
            "// use crate::store::Put;",
            "/// See [`crate::store::Put`].\nfn f() {}",
            "const S: &str = \"crate::store::Put\"; const R: &str = r#\"crate::store\"#;",
            "#[cfg(test)] mod tests { use crate::store::Put; fn f() { crate::keys::wrap() } }",
            "#[cfg(test)] fn f() { crate::store::put() }",
            "#[cfg(test)] use crate::store::Put;",
            "use std::store::Put; use other::store;",
            "use crate::model::Lsn; fn f() { crate::source::begin() }",
            "fn f() { let store = x.store; store::<u8>() }",
        ] {
            assert_none(&wrong("jobs/mod.rs", text));
        }
    }

    #[test]
    fn each_floor_refuses_the_one_above_and_its_neighbours() {
        for (file, text) in [
            ("model/id.rs", "use crate::pg::Word;"),
            ("pg/mod.rs", "use crate::store::Word;"),
            ("store/dir.rs", "use crate::keys::Word;"),
            ("keys/mod.rs", "use crate::source::Word;"),
            ("repository/mod.rs", "use crate::source::Word;"),
            ("repository/mod.rs", "use crate::jobs::Word;"),
            ("config/mod.rs", "use crate::jobs::Word;"),
            ("cli/mod.rs", "use crate::store::Word;"),
            ("main.rs", "use drctl::app::Word;"),
            ("main.rs", "fn main() { drctl::jobs::run() }"),
            ("drawer/mod.rs", "use crate::model::Word;"),
        ] {
            assert_eq!(wrong(file, text).len(), 1, "{file}: {text}");
        }
        assert_none(&wrong("main.rs", "fn main() { drctl::cli::run() }"));
    }

    #[test]
    fn a_room_hidden_behind_a_reexport_of_the_crate_is_found() {
        let house = house(&[
            ("lib.rs", "pub mod store; pub mod jobs; pub use store::Put;"),
            ("store/mod.rs", "pub struct Put;"),
            ("jobs/mod.rs", "use crate::Put;"),
        ]);
        assert_eq!(house.wrong_arrows().len(), 1);
    }

    #[test]
    fn a_cycle_between_rooms_is_named_with_its_places() {
        let cycles = house(&[
            ("pg/mod.rs", "use crate::disk::place;"),
            ("disk/mod.rs", "\nuse crate::codec::seal;"),
            ("codec/mod.rs", "fn f() { crate::pg::read() }"),
        ])
        .cycles();
        assert_eq!(cycles.len(), 1, "{cycles:?}");
        assert!(cycles[0].starts_with("a cycle between modules of crate:"), "{}", cycles[0]);
        assert!(cycles[0].contains("src/disk/mod.rs:2: disk -> codec::seal"), "{}", cycles[0]);
    }

    #[test]
    fn a_cycle_inside_a_room_is_found_also_through_reexports_and_at_depth() {
        for files in [
            [
                ("model/mod.rs", ""),
                ("model/id.rs", "use super::lsn::Lsn;"),
                ("model/lsn.rs", "use crate::model::id::Id;"),
            ],
            [
                ("model/mod.rs", "pub mod id; pub mod lsn; pub use id::{Id}; pub use self::lsn::Lsn as Position;"),
                ("model/id.rs", "use super::Position;"),
                ("model/lsn.rs", "use crate::model::Id;"),
            ],
            [
                ("jobs/backup/mod.rs", ""),
                ("jobs/backup/plan.rs", "fn f() { super::copy::run() }"),
                ("jobs/backup/copy.rs", "use super::plan::Plan;"),
            ],
        ] {
            assert_eq!(house(&files).cycles().len(), 1, "{files:?}");
        }
    }

    #[test]
    fn a_parent_may_use_its_children_and_they_its_words() {
        let house = house(&[
            ("store/mod.rs", "pub mod dir; pub mod s3; pub use dir::Dir; pub trait Store {} fn f() { s3::open() }"),
            ("store/dir.rs", "use super::Store; #[cfg(test)] mod tests { use super::super::s3::S3; }"),
            ("store/s3.rs", "use super::{Store, Dir};"),
        ]);
        assert_none(&house.cycles());
    }

    #[test]
    fn a_giant_and_a_drawer_are_found() {
        let giant = "\n".repeat(MAX_LINES + 1);
        let sources = [("pg/wal.rs".to_owned(), giant), ("store/utils/mod.rs".to_owned(), String::new())];
        assert_eq!(untidy(&sources).len(), 2);
    }
}
