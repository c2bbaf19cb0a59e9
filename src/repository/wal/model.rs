//! The protocol of ownership as a small machine, and every order of its steps.
//!
//! An old owner streams, or has only just begun; its puts arrive whenever they like, so that it may be asleep between any
//! two. A new owner takes over region by region, shows itself, looks round and streams; somebody brings frames to regions
//! that gave their names to a SEAL. The one promise: from then on the old one never acknowledges more than the new one has
//! taken over. The judgement of an epoch is the product's own,
//! [`closing`]; what surrounds it is written down here a second time, and [`replay`](super::replay) holds the
//! real code to the same orders.

use std::collections::{BTreeMap, HashSet};

use crate::repository::wal::closing::{Closing, Enough, Holding, Holdings, closing};

const REGIONS: usize = 3;
const NUMBERS: usize = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Cell {
    Empty,
    Wal,
    Seal,
    /// A SEAL, and the frame beside it.
    Beside,
    /// Bytes that are no frame.
    Damaged,
}

type Cells = [[Cell; NUMBERS]; REGIONS];

/// How the owners play. All but the first four hold in the product; mending is left out where all orders are tried of much.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub regions: usize,
    pub quorum: usize,
    pub in_flight: usize,
    pub frames: usize,
    /// Whether a takeover seals.
    pub seals: bool,
    /// Whether it reads and seals N−W+1 regions, or one less.
    pub reads_enough: bool,
    /// Whether the SEAL stands in the lowest hole, or behind the last frame.
    pub lowest_hole: bool,
    /// Whether owners show themselves and look round.
    pub claims: bool,
    /// Whether somebody brings frames to regions that gave their names to a SEAL.
    pub mends: bool,
    /// The number under which a region holds bytes that nobody signed.
    pub forged: Option<usize>,
}

impl Rules {
    pub const fn of(regions: usize, quorum: usize, in_flight: usize, frames: usize) -> Self {
        let (seals, reads_enough, lowest_hole, claims) = (true, true, true, true);
        let (mends, forged) = (false, None);
        Self { regions, quorum, in_flight, frames, seals, reads_enough, lowest_hole, claims, mends, forged }
    }

    pub const fn mended(self) -> Self {
        Self { mends: true, ..self }
    }

    const fn forged_at(self, number: usize) -> Self {
        Self { forged: Some(number), ..self }
    }

    const fn read_quorum(&self) -> usize {
        self.regions + self.reads_enough as usize - self.quorum
    }

    /// Nobody gives regions up here.
    const fn enough(&self) -> Enough {
        Enough { regions: self.regions, needed: self.read_quorum(), barrier: self.read_quorum() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Begin,
    Look,
    Read,
    Seal(usize),
    Adopt(usize),
    Streams,
    Stopped,
}

/// A set of regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Set([bool; REGIONS]);

impl Set {
    const NONE: Self = Self([false; REGIONS]);

    fn count(self) -> usize {
        self.0.into_iter().filter(|is_in| *is_in).count()
    }

    fn with(mut self, region: usize) -> Self {
        self.0[region] = true;
        self
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Old {
    phase: Phase,
    sent: usize,
    acknowledged: usize,
    on_its_way: [[bool; NUMBERS]; REGIONS],
    looked: Set,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct New {
    phase: Phase,
    /// Regions read, sealed or looked at in this phase.
    done: Set,
    view: Cells,
    begun: Set,
    knows: bool,
    taken: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    cells: Cells,
    old: Old,
    new: New,
}

/// A step: of the old owner, of the new one, or of one of their messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Send,
    /// A frame of the old owner arrives in a region.
    Arrive(usize, usize),
    Acknowledge,
    OldLooks(usize),
    Read(usize),
    Seal(usize),
    Copy(usize, usize),
    Judge,
    /// The new owner gives up and begins again.
    Again,
    Begin(usize),
    NewLooks(usize),
    /// Of an epoch that is closed, a frame is put beside the SEAL that has its name in a region.
    Mend(usize, usize),
}

impl State {
    pub fn first(rules: &Rules) -> Self {
        let nothing = [[Cell::Empty; NUMBERS]; REGIONS];
        let mut cells = nothing;
        if let Some(number) = rules.forged {
            cells[0][number] = Cell::Damaged;
        }
        let phase = if rules.claims { Phase::Begin } else { Phase::Streams };
        let on_its_way = [[false; NUMBERS]; REGIONS];
        let old = Old { phase, sent: 0, acknowledged: 0, on_its_way, looked: Set::NONE };
        let (done, begun) = (Set::NONE, Set::NONE);
        let new = New { phase: Phase::Read, done, view: nothing, begun, knows: false, taken: 0 };
        let mut state = Self { cells, old, new };
        if rules.claims {
            state.send(rules);
        }
        state
    }

    /// Whether something was acknowledged that the new owner does not know.
    pub fn is_lossy(&self) -> bool {
        self.new.phase == Phase::Streams && self.old.acknowledged > self.new.taken
    }

    /// In how many regions the old owner won a name.
    fn holders(cells: &Cells, number: usize) -> usize {
        cells.iter().filter(|region| region[number] == Cell::Wal).count()
    }

    /// In how many the frame is to be had.
    fn givers(cells: &Cells, number: usize) -> usize {
        cells.iter().filter(|region| matches!(region[number], Cell::Wal | Cell::Beside)).count()
    }

    /// Whether bytes that are no frame are all that there is.
    fn is_nothing(cells: &Cells, number: usize) -> bool {
        Self::givers(cells, number) == 0 && cells.iter().any(|region| region[number] == Cell::Damaged)
    }

    /// Up to where frames count of an epoch that is closed.
    fn settled(&self, rules: &Rules) -> usize {
        let both = |number: &usize| {
            let has = |cell| self.cells.iter().any(|region| region[*number] == cell);
            has(Cell::Seal) && has(Cell::Wal)
        };
        if !rules.mends || !(0..rules.frames).any(|number| both(&number)) {
            return 0;
        }
        match closing(&holdings(&self.cells), rules.enough()) {
            Closing::Sealed(at) => number(at),
            Closing::Open(_) | Closing::Ended => 0,
        }
    }

    pub fn actions(&self, rules: &Rules) -> Vec<Action> {
        let (old, new) = (&self.old, &self.new);
        let mut actions = Vec::new();
        let streams = old.phase == Phase::Streams;
        if streams && old.sent < rules.frames && old.sent - old.acknowledged < rules.in_flight {
            actions.push(Action::Send);
        }
        if streams && old.acknowledged < old.sent && Self::holders(&self.cells, old.acknowledged) >= rules.quorum {
            actions.push(Action::Acknowledge);
        }
        let may_look = old.phase == Phase::Begin && Self::holders(&self.cells, 0) >= rules.quorum;
        for region in 0..rules.regions {
            let arriving = (0..rules.frames).filter(|number| old.on_its_way[region][*number]);
            actions.extend(arriving.map(|number| Action::Arrive(number, region)));
            if may_look && !old.looked.0[region] {
                actions.push(Action::OldLooks(region));
            }
            let end = self.settled(rules);
            let beaten = (0..end).filter(|number| self.cells[region][*number] == Cell::Seal);
            actions.extend(beaten.map(|number| Action::Mend(number, region)));
            let open = !new.done.0[region];
            match new.phase {
                Phase::Read if open => actions.push(Action::Read(region)),
                Phase::Seal(_) if open => actions.push(Action::Seal(region)),
                Phase::Look if open => actions.push(Action::NewLooks(region)),
                Phase::Begin if !new.begun.0[region] => actions.push(Action::Begin(region)),
                Phase::Adopt(end) => {
                    let lacks = |number: &usize| {
                        new.view[region][*number] == Cell::Empty && !Self::is_nothing(&new.view, *number)
                    };
                    actions.extend((0..end).filter(lacks).map(|number| Action::Copy(number, region)));
                }
                _ => {}
            }
        }
        match new.phase {
            Phase::Read if new.done.count() >= rules.read_quorum() => actions.push(Action::Judge),
            Phase::Seal(_) if new.done.count() > 0 => actions.extend([Action::Judge, Action::Again]),
            Phase::Adopt(_) => actions.extend([Action::Judge, Action::Again]),
            _ => {}
        }
        actions
    }

    pub fn step(mut self, rules: &Rules, action: Action) -> Self {
        match action {
            Action::Send => self.send(rules),
            Action::Acknowledge => self.old.acknowledged += 1,
            Action::Arrive(number, region) => {
                self.old.on_its_way[region][number] = false;
                self.put(number, region, Cell::Wal);
            }
            Action::OldLooks(region) => {
                self.old.looked = self.old.looked.with(region);
                if self.new.begun.0[region] {
                    self.old.phase = Phase::Stopped;
                } else if self.old.looked.count() >= rules.read_quorum() {
                    self.old.phase = Phase::Streams;
                }
            }
            Action::Read(region) => {
                self.new.view[region] = self.cells[region];
                self.new.done = self.new.done.with(region);
            }
            Action::Seal(region) => {
                let Phase::Seal(at) = self.new.phase else { return self };
                // Whoever puts a SEAL looks at this name alone.
                let held = self.put(at, region, Cell::Seal);
                self.new.view[region][at] = if held == Cell::Beside { Cell::Seal } else { held };
                self.new.done = self.new.done.with(region);
            }
            Action::Copy(number, region) => self.new.view[region][number] = self.put(number, region, Cell::Wal),
            Action::Mend(number, region) => self.cells[region][number] = Cell::Beside,
            Action::Judge => self.judge(rules),
            Action::Again => self.read_anew(),
            Action::Begin(region) => {
                self.new.begun = self.new.begun.with(region);
                if self.new.begun.count() >= rules.quorum {
                    self.enter(if self.new.knows { Phase::Streams } else { Phase::Look });
                }
            }
            Action::NewLooks(region) => {
                self.new.done = self.new.done.with(region);
                if !self.new.knows && self.cells[region].iter().any(|cell| *cell != Cell::Empty) {
                    self.read_anew();
                } else if self.new.done.count() >= rules.read_quorum() {
                    self.enter(Phase::Streams);
                }
            }
        }
        self
    }

    /// Regions differ in nothing but their place: of states that only swap them one is enough.
    fn sorted(self, regions: usize) -> Self {
        let mut order: [usize; REGIONS] = std::array::from_fn(|region| region);
        let column = |region: usize| {
            let (old, new) = (&self.old, &self.new);
            let sets = [old.looked.0[region], new.done.0[region], new.begun.0[region]];
            (self.cells[region], old.on_its_way[region], new.view[region], sets)
        };
        order[..regions].sort_by_key(|region| column(*region));
        let set = |set: Set| Set(order.map(|region| set.0[region]));
        let old = Old {
            on_its_way: order.map(|region| self.old.on_its_way[region]),
            looked: set(self.old.looked),
            ..self.old
        };
        let view = order.map(|region| self.new.view[region]);
        let new = New { done: set(self.new.done), begun: set(self.new.begun), view, ..self.new };
        Self { cells: order.map(|region| self.cells[region]), old, new }
    }

    fn send(&mut self, rules: &Rules) {
        for region in 0..rules.regions {
            self.old.on_its_way[region][self.old.sent] = true;
        }
        self.old.sent += 1;
    }

    /// Create-only: what is there stays.
    fn put(&mut self, number: usize, region: usize, cell: Cell) -> Cell {
        let held = &mut self.cells[region][number];
        if *held == Cell::Empty {
            *held = cell;
        }
        *held
    }

    fn enter(&mut self, phase: Phase) {
        (self.new.phase, self.new.done) = (phase, Set::NONE);
    }

    fn read_anew(&mut self) {
        self.new.view = [[Cell::Empty; NUMBERS]; REGIONS];
        self.enter(Phase::Read);
    }

    fn judge(&mut self, rules: &Rules) {
        if let Phase::Adopt(end) = self.new.phase {
            let is_nothing = |number: &usize| Self::is_nothing(&self.new.view, *number);
            let is_held = |number: usize| Self::givers(&self.new.view, number) >= rules.quorum;
            if (0..end).all(|number| is_nothing(&number) || is_held(number)) {
                // What is behind a number that nobody has is behind a hole.
                let taken = (0..end).find(is_nothing).unwrap_or(end);
                (self.new.taken, self.new.knows) = (taken, true);
                self.show_up(rules);
            }
            return;
        }
        let holdings = holdings(&self.new.view);
        if holdings.is_empty() {
            return self.show_up(rules);
        }
        if holdings.values().flat_map(BTreeMap::values).all(|holding| *holding == Holding::Damaged) {
            // Of which kind an epoch is a frame tells: without any it may be that of a writer that works.
            return self.read_anew();
        }
        let all_tried = self.new.done.count() == rules.regions;
        match (closing(&holdings, rules.enough()), self.new.phase) {
            (Closing::Open(at), _) if !rules.seals => self.enter(Phase::Adopt(number(at))),
            (Closing::Open(at), phase) => {
                let behind = (0..NUMBERS).rev().find(|number| Self::holders(&self.new.view, *number) > 0);
                match phase {
                    Phase::Seal(now) if rules.lowest_hole && now == number(at) => {
                        if all_tried {
                            self.read_anew();
                        }
                    }
                    Phase::Seal(now) if !rules.lowest_hole => {
                        let seals = self.new.view.iter().filter(|region| region[now] == Cell::Seal).count();
                        if seals >= rules.read_quorum() {
                            self.enter(Phase::Adopt(number(at)));
                        }
                    }
                    _ if rules.lowest_hole => self.enter(Phase::Seal(number(at))),
                    _ => self.enter(Phase::Seal(behind.map_or(0, |last| last + 1))),
                }
            }
            // What was read before the SEAL stood is too old to tell the end.
            (Closing::Sealed(_), Phase::Seal(_)) => self.read_anew(),
            (Closing::Sealed(at), _) => self.enter(Phase::Adopt(number(at))),
            (Closing::Ended, _) => {}
        }
    }

    fn show_up(&mut self, rules: &Rules) {
        // What nobody looks at any more needs no steps of its own.
        let alone = self.new.knows && self.old.phase != Phase::Begin;
        let phase = match () {
            () if !rules.claims || alone => Phase::Streams,
            () if self.new.begun.count() >= rules.quorum => Phase::Look,
            () => Phase::Begin,
        };
        self.enter(phase);
    }
}

fn number(at: u64) -> usize {
    usize::try_from(at).unwrap()
}

fn holdings(view: &Cells) -> Holdings<usize> {
    let mut holdings = BTreeMap::new();
    for (region, cells) in view.iter().enumerate() {
        for (number, cell) in cells.iter().enumerate().filter(|(_, cell)| **cell != Cell::Empty) {
            let holding = match cell {
                Cell::Seal => Holding::Seal,
                Cell::Damaged => Holding::Damaged,
                Cell::Empty | Cell::Wal | Cell::Beside => Holding::Wal,
            };
            holdings.entry(number as u64).or_insert_with(BTreeMap::new).insert(region, holding);
        }
    }
    holdings
}

/// Every state that any order of steps leads to: how many, or the first that loses something.
fn explore(rules: &Rules) -> Result<usize, Box<State>> {
    let first = State::first(rules);
    let (mut seen, mut open) = (HashSet::from([first]), vec![first]);
    while let Some(state) = open.pop() {
        for action in state.actions(rules) {
            let next = state.step(rules, action).sorted(rules.regions);
            if next.is_lossy() {
                return Err(Box::new(next));
            }
            if seen.insert(next) {
                open.push(next);
            }
        }
    }
    Ok(seen.len())
}

/// A random order of steps until nothing is left to do, or something is lost.
pub fn walk(rules: &Rules, seed: u64) -> (Vec<Action>, State) {
    let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let (mut state, mut trace) = (State::first(rules), Vec::new());
    let mut draw = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        number(random >> 33)
    };
    while trace.len() < 400 && !state.is_lossy() {
        let actions = state.actions(rules);
        if actions.is_empty() {
            break;
        }
        let action = actions[draw() % actions.len()];
        trace.push(action);
        state = state.step(rules, action);
    }
    (trace, state)
}

/// Whether the new owner comes to stream from here if the old one never wakes up again: it does whatever it can do, and
/// begins again only where nothing else is left.
fn gets_on(mut state: State, rules: &Rules) -> bool {
    for _ in 0..60 {
        if state.new.phase == Phase::Streams {
            return true;
        }
        let of_others = |action: &Action| {
            let of_old =
                matches!(action, Action::Send | Action::Arrive(..) | Action::Acknowledge | Action::OldLooks(_));
            of_old || matches!(action, Action::Mend(..))
        };
        let actions: Vec<_> = state.actions(rules).into_iter().filter(|action| !of_others(action)).collect();
        let works =
            |action: &&Action| !matches!(action, Action::Again | Action::Judge) && state.step(rules, **action) != state;
        let Some(action) = actions.iter().find(works).or_else(|| actions.first()) else { return false };
        let next = state.step(rules, *action);
        state = if next == state { state.step(rules, Action::Again) } else { next };
    }
    false
}

fn assert_sound(rules: &Rules) {
    let states = explore(rules).unwrap_or_else(|state| panic!("{rules:?} loses: {state:?}"));
    assert!(states > 5_000, "{rules:?} has {states} states");
}

#[test]
fn no_order_of_steps_loses_what_was_acknowledged() {
    assert_sound(&Rules::of(3, 2, 2, 2));
}

#[test]
fn nor_does_any_with_another_quorum() {
    for (regions, quorum, in_flight, frames) in [(2, 2, 2, 3), (2, 1, 2, 3), (3, 1, 1, 2), (3, 3, 1, 2)] {
        assert_sound(&Rules::of(regions, quorum, in_flight, frames));
    }
}

#[test]
fn nor_does_any_while_frames_are_put_beside_seals() {
    for (regions, quorum, in_flight, frames) in [(3, 2, 1, 2), (2, 1, 2, 2)] {
        assert_sound(&Rules::of(regions, quorum, in_flight, frames).mended());
    }
}

#[test]
fn nor_does_any_where_bytes_lie_that_nobody_signed() {
    for (regions, quorum, in_flight, frames, forged) in [(3, 2, 1, 2, 1), (2, 1, 2, 2, 1)] {
        let rules = Rules::of(regions, quorum, in_flight, frames).forged_at(forged);
        let states = explore(&rules).unwrap_or_else(|state| panic!("{rules:?} loses: {state:?}"));
        assert!(states > 2_000, "{rules:?} has {states} states");
    }
}

#[test]
fn without_any_one_of_its_rules_the_protocol_loses() {
    let (two, three) = (Rules::of(2, 2, 2, 3), Rules::of(3, 2, 2, 3));
    let broken = [
        ("no SEAL", Rules { seals: false, ..three }),
        ("one region too few", Rules { reads_enough: false, ..three }),
        ("one region too few, degraded", Rules { reads_enough: false, ..Rules::of(2, 1, 2, 2) }),
        ("a SEAL behind a hole", Rules { lowest_hole: false, ..two }),
        ("nobody looks round", Rules { claims: false, ..three }),
    ];
    for (what, rules) in broken {
        assert!(explore(&rules).is_err(), "nobody notices: {what}");
    }
}

#[test]
fn long_walks_lose_nothing() {
    for seed in 0..4_000 {
        let rules = Rules::of(3, 1 + number(seed % 3), 4, 5).mended();
        let (trace, state) = walk(&rules, seed);
        assert!(!state.is_lossy(), "seed {seed} of {rules:?} loses: {trace:?}");
    }
}

/// Nothing that a sleeper leaves behind keeps its successor from streaming for ever.
#[test]
fn wherever_the_old_owner_falls_asleep_the_new_one_gets_on() {
    for seed in 0..3_000 {
        let (regions, quorum) = [(2, 2), (2, 1), (3, 2), (3, 1), (3, 3)][number(seed % 5)];
        let rules = Rules::of(regions, quorum, 3, 4).mended();
        let mut state = State::first(&rules);
        for action in walk(&rules, seed).0 {
            assert!(gets_on(state, &rules), "seed {seed} of {rules:?} is stuck at {state:?}");
            state = state.step(&rules, action);
        }
    }
}
