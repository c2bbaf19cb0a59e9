//! A copy is compared with what it is a copy of, while both are there: that it starts does not say that it is the same.

use crate::jobs::context::Context;
use crate::jobs::drill::report::{Level, Report};
use crate::model::Kind;
use crate::repository::compact::{self, Hands};

const CHECK: &str = "the pages of its original";

/// Compares the drilled backup, if it is a copy, with what it may take the place of, in this region. What cannot be read of another backup
/// is no fault of the copy, which then does not take that one's place.
pub(super) async fn compare(context: &Context, report: &mut Report) {
    let (Some(id), Ok(writer)) = (report.backup.clone(), context.writer()) else { return };
    let Context { repository, ring, pack_size, progress, .. } = context;
    let hands = Hands { repository, writer, ring, pack_size: *pack_size, progress };
    let compared = match compact::alike(hands, &report.target, &id).await {
        Ok(compared) => compared,
        Err(error) => return report.warnings.push(format!("it was not compared with what it is a copy of: {error}")),
    };
    for (other, same) in compared {
        match same {
            Ok(()) => {
                report.check(CHECK, Level::L2, Ok(format!("compared with {other}")));
                report.same_as.push(other);
            }
            Err(error) if error.kind() == Kind::Damaged => report.check(CHECK, Level::L2, Err(error)),
            Err(error) => report.warnings.push(format!("it was not compared with {other}: {error}")),
        }
    }
}
