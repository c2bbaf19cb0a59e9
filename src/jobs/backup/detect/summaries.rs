//! What PostgreSQL's own summaries of WAL say, since 17: asked through SQL, they need no file access and no receiver.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::SimpleQueryMessage;

use crate::jobs::context::Target;
use crate::jobs::wal::changes::Stretch;
use crate::model::Lsn;
use crate::pg::sql::{self, SqlClient};
use crate::pg::wal::{ChangedBlocks, Locator, Touch};

/// The first version that writes them.
const FIRST: u32 = 170_000;
/// The summarizer looks for new WAL every few hundred milliseconds while it has work, and every half minute at rest.
const LIMIT: Duration = Duration::from_secs(40);
const PAUSE: Duration = Duration::from_millis(100);

type Text = Vec<Option<String>>;

/// The pages that changed in `wanted`, or why nobody knows.
pub(super) async fn changed(target: &Target, version: u32, wanted: &Stretch) -> Result<ChangedBlocks, String> {
    if version < FIRST {
        return Err(format!("PostgreSQL {} writes no summaries of WAL", version / 10_000));
    }
    let info = target.conninfo.primary().with_application_name("drctl backup");
    let client = sql::connect(&info).await.map_err(|error| error.to_string())?;
    let on = rows(&client, "SHOW summarize_wal").await?;
    if on.first().and_then(|row| row.first()) != Some(&Some("on".to_owned())) {
        return Err("summarize_wal is off".to_owned());
    }
    let mut changed = ChangedBlocks::default();
    for (start, end) in covering(&client, wanted).await? {
        let query = format!(
            "SELECT reltablespace, reldatabase, relfilenode, relforknumber, relblocknumber, is_limit_block \
             FROM pg_wal_summary_contents({}, '{start}', '{end}')",
            wanted.timeline
        );
        for row in rows(&client, &query).await? {
            let touch = touch(&row).ok_or_else(|| format!("a summary of WAL is not understood: {row:?}"))?;
            changed.add(&touch)?;
        }
    }
    Ok(changed)
}

/// The summaries that hold all of it, without a hole.
async fn covering(client: &SqlClient, wanted: &Stretch) -> Result<Vec<(Lsn, Lsn)>, String> {
    let query = format!(
        "SELECT start_lsn, end_lsn FROM pg_available_wal_summaries() \
         WHERE tli = {} AND end_lsn > '{}' AND start_lsn < '{}' ORDER BY 1, 2",
        wanted.timeline, wanted.from, wanted.to
    );
    let deadline = Instant::now() + LIMIT;
    loop {
        let available = rows(client, &query).await?;
        let available: Option<Vec<(Lsn, Lsn)>> =
            available.iter().map(|row| Some((number(row, 0)?, number(row, 1)?))).collect();
        let available = available.ok_or("the list of summaries is not understood")?;
        let end = reached(&available, wanted.from);
        if end >= wanted.to {
            return Ok(available);
        }
        let hole = available.iter().find(|(start, _)| *start > end);
        if let Some((next, _)) = hole {
            return Err(format!("summaries of WAL have a hole from {end} to {next}"));
        }
        if Instant::now() >= deadline {
            return Err(format!("WAL is summarized up to {end} alone, not up to {}", wanted.to));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// How far they reach from there without a hole.
fn reached(summaries: &[(Lsn, Lsn)], from: Lsn) -> Lsn {
    summaries.iter().fold(from, |end, (start, next)| if *start <= end { end.max(*next) } else { end })
}

/// One row of a summary. A limit block stands for all pages from there on; relation 0, for a whole database.
fn touch(row: &Text) -> Option<Touch> {
    let relation = Locator { tablespace: number(row, 0)?, database: number(row, 1)?, node: number(row, 2)? };
    let fork = number(row, 3)?;
    let is_limit = row.get(5)?.as_deref()? == "t";
    match (relation.node, is_limit) {
        (0, true) => Some(Touch::Database(relation.database)),
        (0, false) => None,
        (_, true) if fork > 0 => Some(Touch::Block { relation, fork, block: 0 }),
        (_, true) => Some(Touch::From { relation, block: number(row, 4)? }),
        (_, false) => Some(Touch::Block { relation, fork, block: number(row, 4)? }),
    }
}

fn number<T: std::str::FromStr>(row: &Text, column: usize) -> Option<T> {
    row.get(column)?.as_deref()?.parse().ok()
}

async fn rows(client: &SqlClient, query: &str) -> Result<Vec<Text>, String> {
    let messages = client.simple_query(query).await.map_err(|error| crate::pg::PgError::from(error).to_string())?;
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|column| row.get(column).map(str::to_owned)).collect()),
        _ => None,
    };
    Ok(messages.into_iter().filter_map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_reach_as_far_as_they_join() {
        let lsn = |pairs: &[(u64, u64)]| pairs.iter().map(|(a, b)| (Lsn(*a), Lsn(*b))).collect::<Vec<_>>();
        assert_eq!(reached(&lsn(&[(5, 20), (20, 30), (25, 28), (30, 41)]), Lsn(10)), Lsn(41));
        assert_eq!(reached(&lsn(&[(5, 20), (21, 30)]), Lsn(10)), Lsn(20));
        assert_eq!(reached(&lsn(&[(11, 20)]), Lsn(10)), Lsn(10));
        assert_eq!(reached(&[], Lsn(10)), Lsn(10));
    }

    #[test]
    fn rows_are_understood_or_nothing_is() {
        let row = |text: &str| text.split(' ').map(|word| Some(word.to_owned())).collect::<Text>();
        let relation = Locator { tablespace: 1663, database: 5, node: 16384 };
        assert_eq!(touch(&row("1663 5 16384 0 7 f")), Some(Touch::Block { relation, fork: 0, block: 7 }));
        assert_eq!(touch(&row("1663 5 16384 0 7 t")), Some(Touch::From { relation, block: 7 }));
        assert_eq!(touch(&row("1663 5 16384 2 7 t")), Some(Touch::Block { relation, fork: 2, block: 0 }));
        assert_eq!(touch(&row("1663 5 0 0 0 t")), Some(Touch::Database(5)));
        for text in ["1663 5 0 0 0 f", "1663 5 x 0 7 f", "1663 5 16384 0", "1663 5 16384 0 -1 f"] {
            assert_eq!(touch(&row(text)), None, "{text}");
        }
    }
}
