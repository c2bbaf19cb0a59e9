//! Whether the newest backup holds what it should.

use super::TargetStatus;
use crate::jobs::Context;
use crate::jobs::backup::streams::left_out;
use crate::repository::survey::Survey;

impl TargetStatus {
    /// What was left out is lost with the source, however fresh the backup is. Without a key nothing is said of it.
    pub(super) async fn judge_contents(&mut self, context: &Context, survey: &Survey) {
        let newest = survey.backups.iter().find(|(backup, _)| self.last_backup.as_ref() == Some(&backup.commit.id));
        let Some(commit) = newest.map(|(backup, _)| &backup.commit) else { return };
        let count = left_out(context, commit).await.map_or(0, |list| list.len());
        if count > 0 {
            self.violated = true;
            self.problems.push(format!("{count} left out of the newest backup"));
            self.next.get_or_insert_with(|| format!("drctl show {}", commit.id));
        }
    }
}
