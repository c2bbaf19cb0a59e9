//! Keeping the stock current: a look at the names of the next frames all the time, a whole look from time to time.

use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::jobs::feed::stock::{Reach, Shelf, Stock};
use crate::jobs::feed::way::Way;
use crate::jobs::feed::{Position, Shared};
use crate::jobs::lineage;
use crate::jobs::wal::reaches;
use crate::model::commit::WalNeed;
use crate::model::{Error, Lsn, RegionName, Result, Timeline};
use crate::repository::wal::gaps;
use crate::repository::wal::index::BranchId;

/// How long WAL that was stored waits before it is seen, at most.
pub(super) const POLL: Duration = Duration::from_millis(500);
/// Every so many looks is a whole one: all regions, new epochs, new timelines, recorded gaps, new signers. These
/// are listings, which cost ten times as much as the look at a name.
const WHOLE: u64 = 10;
/// Whole looks between two times that frames which were replayed long ago are let go.
const FORGET: u64 = 12;
/// Whoever did not look for so long lists everything anew: half of the shortest time after which prune takes the frames that
/// lie in a bundle, too, and which are asked for by their own names.
const BLINK: Duration = Duration::from_secs(30 * 60);
/// While something is missing everything is listed anew so often: it may be where nobody asks.
const SEARCH: Duration = Duration::from_secs(30);

/// When everything was seen for the last time.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sight {
    /// The last whole look. By both clocks: one of them may stand still while the machine sleeps.
    looked_at: Option<(Duration, DateTime<Utc>)>,
    /// The last list of everything.
    listed_at: Duration,
}

/// How thoroughly a look looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// The nearest region is asked for the next frames.
    Next,
    /// Every region is asked for everything that is new.
    New,
    /// Every region is listed, whatever is known.
    All,
}

pub(super) async fn keep_looking(shared: Arc<Shared>) {
    let mut turn: u64 = 0;
    loop {
        tokio::time::sleep(POLL).await;
        turn += 1;
        let depth = if turn.is_multiple_of(WHOLE) { Depth::New } else { Depth::Next };
        if let Err(error) = shared.look(depth).await {
            tracing::debug!(%error, "the stored WAL is not seen");
        }
        if turn.is_multiple_of(WHOLE * FORGET) {
            shared.forget().await;
        }
    }
}

impl Shared {
    /// Looks for more.
    pub(super) async fn look(&self, depth: Depth) -> Result<()> {
        let _one = self.looking.lock().await;
        let looked = self.look_once(depth).await;
        let told = match looked {
            Ok(()) => self.tell().await,
            Err(error) => Err(error),
        };
        match &told {
            Err(error) => self.position().trouble = Some(error.to_string()),
            Ok(()) if depth != Depth::Next => self.judge().await,
            Ok(()) => {}
        }
        told
    }

    /// Whether what was seen is all there is.
    async fn judge(&self) {
        let stock = self.stock.read().await;
        let mut position = self.position();
        let hole = position.end.as_ref().and_then(|end| stock.hole(end));
        let mut suspected = self.suspected.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = *suspected == hole;
        suspected.clone_from(&hole);
        position.trouble = hole.filter(|_| is_known).or_else(|| left_behind(&stock, position.replayed));
    }

    async fn look_once(&self, depth: Depth) -> Result<()> {
        let whole = depth != Depth::Next;
        if whole {
            // A signer that was enrolled since this process began signs what nobody here can check.
            if self.is_damaged().await {
                self.context.repository.trust.refresh(&self.context.repository.regions).await?;
            }
            self.look_for_timelines().await?;
        }
        let (mut grown, mut silent) = (false, BTreeSet::new());
        for branch in self.open_branches().await {
            grown |= self.look_on(&branch, whole, &mut silent).await?;
        }
        if whole {
            if depth == Depth::All || self.is_out_of_sight() || self.is_back(&silent).await {
                grown |= self.list_anew(&mut silent).await?;
            }
            self.sight().looked_at = Some((self.context.clock.monotonic(), self.context.clock.now()));
            self.position().silent = silent.into_iter().collect();
        }
        if grown {
            self.changed.send_modify(|turn| *turn += 1);
        }
        Ok(())
    }

    fn sight(&self) -> MutexGuard<'_, Sight> {
        self.sight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether what was seen may have gone on unseen, or not be all there is.
    fn is_out_of_sight(&self) -> bool {
        let (now, date) = (self.context.clock.monotonic(), self.context.clock.now());
        let Sight { looked_at, listed_at } = *self.sight();
        let slept = |(at, on): (Duration, DateTime<Utc>)| {
            now.saturating_sub(at) > BLINK || (date - on).abs().to_std().is_ok_and(|slept| slept > BLINK)
        };
        let is_searched = self.suspected.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        looked_at.is_some_and(slept) || (is_searched && now.saturating_sub(listed_at) > SEARCH)
    }

    /// Whether a region answers again that did not: what it holds between known frames no look at the next ones shows.
    async fn is_back(&self, silent: &BTreeSet<RegionName>) -> bool {
        let stock = self.stock.read().await;
        let unlisted = stock.shelves.values().flat_map(|shelf| shelf.log.index.unreadable());
        let mut missed: BTreeSet<_> = unlisted.map(|(region, _)| region.clone()).collect();
        missed.extend(self.position().silent.iter().cloned());
        missed.iter().any(|region| !silent.contains(region))
    }

    /// Lists the open branches in every region. Returns whether anything new was there.
    async fn list_anew(&self, silent: &mut BTreeSet<RegionName>) -> Result<bool> {
        let mut grown = false;
        for branch in self.open_branches().await {
            let later = Shelf::load(&self.context, branch.clone()).await?;
            silent.extend(later.log.index.unreadable().iter().map(|(region, _)| region.clone()));
            {
                let mut stock = self.stock.write().await;
                let Some(shelf) = stock.shelves.get_mut(&branch) else { continue };
                grown |= shelf.absorb(later);
            }
            grown |= self.count(&branch).await;
        }
        self.sight().listed_at = self.context.clock.monotonic();
        Ok(grown)
    }

    /// Counts the runs of a branch anew. Returns whether they are other ones.
    async fn count(&self, branch: &BranchId) -> bool {
        let counted = {
            let stock = self.stock.read().await;
            let Some(shelf) = stock.shelves.get(branch) else { return false };
            shelf.log.index.runs(&self.context.repository, None).await
        };
        let mut stock = self.stock.write().await;
        stock.shelves.get_mut(branch).is_some_and(|shelf| shelf.count(counted))
    }

    async fn is_damaged(&self) -> bool {
        self.stock.read().await.shelves.values().any(|shelf| !shelf.log.damaged.is_empty())
    }

    /// New histories, and the way that they make.
    async fn look_for_timelines(&self) -> Result<()> {
        let known = self.stock.read().await.histories.clone();
        let histories = lineage::histories(&self.context.repository, &self.options.origin, &known).await?;
        let is_new = histories.len() != known.len();
        let way = match &self.options.way {
            Some(way) => way.clone(),
            None => Way::newest(&histories, &self.origin())?,
        };
        let missing: Vec<BranchId> = {
            let stock = self.stock.read().await;
            let branches = way.branches.keys().filter_map(|timeline| way.branch(*timeline));
            branches.filter(|branch| !stock.shelves.contains_key(branch)).collect()
        };
        let mut loaded = Vec::new();
        for branch in missing {
            loaded.push((branch.clone(), Shelf::load(&self.context, branch).await?));
        }
        let mut stock = self.stock.write().await;
        let is_changed = is_new || stock.way != way || !loaded.is_empty();
        stock.histories = histories;
        stock.way = way;
        stock.shelves.extend(loaded);
        drop(stock);
        if is_changed {
            self.changed.send_modify(|turn| *turn += 1);
        }
        Ok(())
    }

    /// Branches on which more may come that is served: nobody passes over a hole, wherever in its timeline it is.
    async fn open_branches(&self) -> Vec<BranchId> {
        let passed = self.position().end.map(|end| end.timeline);
        let stock = self.stock.read().await;
        let open = stock.way.branches.keys().filter(|timeline| passed.is_none_or(|passed| **timeline >= passed));
        open.filter_map(|timeline| stock.way.branch(*timeline)).collect()
    }

    /// What came of one branch. Returns whether anything did.
    async fn look_on(&self, branch: &BranchId, whole: bool, silent: &mut BTreeSet<RegionName>) -> Result<bool> {
        let regions = self.context.repository.regions.all();
        let looks = {
            let stock = self.stock.read().await;
            let Some(shelf) = stock.shelves.get(branch) else { return Ok(false) };
            let nearest = regions.get(..1).unwrap_or_default();
            let mut looks = shelf.log.index.look_on(if whole { regions } else { nearest }, whole).await;
            if !whole && looks.iter().all(|(_, look)| look.is_err()) {
                looks = shelf.log.index.look_on(regions.get(1..).unwrap_or_default(), false).await;
            }
            looks
        };
        let gaps = if whole { Some(gaps::barriers(&self.context.repository, branch).await?) } else { None };
        let (mut grown, mut failed) = (false, None::<Error>);
        let mut stock = self.stock.write().await;
        let Some(shelf) = stock.shelves.get_mut(branch) else { return Ok(false) };
        let asked = looks.len();
        let mut deaf = 0;
        for (region, look) in looks {
            match look {
                Ok(arrivals) => grown |= shelf.log.index.take_in(arrivals),
                Err(error) => {
                    deaf += 1;
                    silent.insert(region);
                    failed.get_or_insert(error);
                }
            }
        }
        if let Some(gaps) = gaps {
            grown |= shelf.record(gaps);
        }
        drop(stock);
        if deaf == asked
            && let Some(error) = failed
        {
            return Err(error);
        }
        // Damage may have been mended.
        let is_damaged = !self.stock.read().await.shelves.get(branch).is_none_or(|shelf| shelf.log.damaged.is_empty());
        if grown || whole && is_damaged {
            grown |= self.count(branch).await;
        }
        Ok(grown)
    }

    /// Notes the end of what can be served, and how long what lies before it has been waiting.
    async fn tell(&self) -> Result<()> {
        let stock = self.stock.read().await;
        self.move_origin(&stock.way);
        let WalNeed { timeline, stop_lsn, .. } = self.origin();
        let from = Self::aligned(&stock, (timeline, stop_lsn));
        let end = stock.end(from)?;
        let waiting = match stock.reach(from.0, from.1)? {
            Reach::To(_) => stock.written_at(&self.context, from.0, from.1).await?,
            _ => None,
        };
        let mut position = self.position();
        (position.end, position.waiting_since) = (Some(end), waiting.filter(|_| end.lsn > from.1));
        (position.newest, position.streaming) = (Some(stock.way.history.timeline()), stock.streaming(&end));
        Ok(())
    }

    /// A reader that replayed to a page's end stands behind the header of the next page: nothing lies between, and the
    /// WAL may not go that far yet.
    fn aligned(stock: &Stock, (timeline, at): (Timeline, Lsn)) -> (Timeline, Lsn) {
        match stock.way.next(timeline) {
            Some((_, switch)) if at > switch && reaches(switch, at) => (timeline, switch),
            _ => (timeline, at),
        }
    }

    async fn forget(&self) {
        let Position { replayed: Some(replayed), .. } = self.position().clone() else { return };
        let size = self.options.origin.wal_segment_size;
        // A walreceiver begins at its segment's first byte; one that lost some of its own asks for more, and finds it.
        let below = Lsn(size.segment_start(replayed).0.saturating_sub(size.bytes()));
        for shelf in self.stock.write().await.shelves.values_mut() {
            shelf.log.index.forget(below);
        }
    }

    /// Loads branches anew that do not reach back to `at` any more.
    pub(super) async fn reach_back(&self, timeline: Timeline, at: Lsn) -> Result<()> {
        let _one = self.looking.lock().await;
        let branch = {
            let stock = self.stock.read().await;
            if !matches!(stock.reach(timeline, at), Ok(Reach::Nothing)) {
                return Ok(());
            }
            stock.way.branch(if at < stock.way.reign(timeline)?.begin {
                stock.way.history.timeline_at(at)
            } else {
                timeline
            })
        };
        if let Some(branch) = branch {
            let shelf = Shelf::load(&self.context, branch.clone()).await?;
            self.stock.write().await.shelves.insert(branch, shelf);
        }
        Ok(())
    }
}

/// A newer timeline that left the reader's own one before the position that the reader has replayed: it cannot follow.
fn left_behind(stock: &Stock, replayed: Option<Lsn>) -> Option<String> {
    let at = replayed?;
    let own = stock.way.history.timeline();
    let newer = stock.histories.iter().filter(|stored| stored.timeline > own);
    let mut left = newer.filter_map(|stored| {
        let switch = stored.history.reign_of(own)?.end?;
        let shares = stored.history.entries().starts_with(stock.way.history.entries());
        (shares && switch < at).then_some((stored.timeline, switch))
    });
    let (timeline, switch) = left.next()?;
    Some(format!(
        "timeline {timeline} left timeline {own} at {switch}, and this standby has replayed {at}: it cannot follow; \
         start another one from a newer backup"
    ))
}
