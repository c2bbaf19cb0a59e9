//! A copy beside what it is a copy of. Whoever may sign a COMMIT can call anything a copy; that it starts does not say that it is the
//! same. Who has the keys can tell, as long as both are there.

use crate::model::commit::Commit;
use crate::model::{BackupId, Error, Kind, Result, ResultExt, TargetName};
use crate::repository::catalog;
use crate::repository::compact::compare::Comparison;
use crate::repository::compact::live::Live;
use crate::repository::compact::plan::Plan;
use crate::repository::compact::{Hands, Lines, Original, Survey};

/// Compares the backup `id`, if it is a copy, with everything of its moment that is older: page by page, and whether its inventory lists
/// all that it needs when the others are gone. Each answer is [`Kind::Damaged`] if they differ, and another
/// error if that one could not be read.
///
/// # Errors
/// No region answers.
pub async fn alike(hands: Hands<'_>, target: &TargetName, id: &BackupId) -> Result<Vec<(BackupId, Result<()>)>> {
    let (backups, _) = catalog::backups(hands.repository, Some(target)).await?;
    let commits: Vec<_> = backups.iter().map(|backup| &backup.commit).collect();
    let Some(copy) = commits.iter().find(|commit| commit.id == *id && commit.copy.is_some()) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for other in commits.iter().filter(|other| copy.is_copied_after(other)) {
        found.push((other.id.clone(), compare(hands, other, copy).await));
    }
    Ok(found)
}

async fn compare(hands: Hands<'_>, other: &Commit, copy: &Commit) -> Result<()> {
    let of_the_other = |error: Error| match error.kind() {
        Kind::Damaged => Error::new(Kind::Unavailable, format!("{} is damaged itself", other.id)).because(error),
        _ => error,
    };
    let inventory = catalog::inventory(hands.repository, other).await.map_err(of_the_other)?;
    let listed = catalog::inventory(hands.repository, copy).await?;
    let known: Lines = inventory.iter().map(|line| (line.key.clone(), line.clone())).collect();
    if let Some(line) = listed.iter().find(|line| known.get(&line.key).is_some_and(|known| known != *line)) {
        return Err(Error::damaged(format!("the inventories of {} and {} differ in {}", other.id, copy.id, line.key)));
    }
    let original = Original { commit: other.clone(), inventory };
    let mut live = Live::default();
    live.add(hands, &original).await.map_err(of_the_other).during(|| format!("read the map of {}", other.id))?;
    let survey = Survey { plan: Plan::default(), target: other.target.clone(), live, originals: Vec::new() };
    Comparison::default().compare((hands, &survey), &original, (copy, &listed)).await
}
