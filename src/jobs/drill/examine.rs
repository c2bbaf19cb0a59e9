//! The restored cluster is asked: is the heartbeat there, is what its owner asserts true, and would a lie be noticed?

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::jobs::context::{Assertion, Context, Target};
use crate::jobs::drill::checks;
use crate::jobs::drill::report::{Control, Level, Report};
use crate::jobs::drill::scratch::Scratch;
use crate::jobs::restore::SCRATCH_PORT;
use crate::model::{Error, Result, ResultExt, TargetName};
use crate::pg::conninfo::ConnInfo;
use crate::pg::sql::{self, SqlClient};
use crate::source::postgres::heartbeat;

/// An assertion that takes longer has not been answered.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(600);

/// Runs every check that needs the server.
pub(super) async fn all(
    context: &Context,
    target: &Target,
    (scratch, fault_at): (&Scratch, DateTime<Utc>),
    report: &mut Report,
) -> Result<()> {
    let login = Login::find(scratch, target.conninfo.user(), &target.heartbeat_database).await?;
    let found = found_heartbeat(&login, &target.heartbeat_database, &target.name).await;
    if let Ok(beat) = &found {
        report.found(beat.clone(), fault_at);
    }
    let told = |beat: heartbeat::Beat| format!("number {}, written at {}", beat.seq, beat.at.to_rfc3339());
    report.check("heartbeat", Level::L6, found.map(told));
    for assertion in &target.assertions {
        let answer = login.ask(assertion).await.and_then(|answer| judge(&assertion.expect, &answer));
        report.check(assertion.name.clone(), Level::L6, answer);
    }
    report.control = control(&login, target, report).await;
    checks::amcheck(context, scratch, &login, report).await;
    Ok(())
}

/// A way into the scratch cluster, as one of its superusers.
#[derive(Debug)]
pub(super) struct Login {
    socket_dir: String,
    /// The superuser.
    pub(super) user: String,
}

impl Login {
    /// Everybody may log in, so the role that the target is known by asks who the superusers are.
    async fn find(scratch: &Scratch, known: &str, database: &str) -> Result<Self> {
        let directory = scratch.socket_dir();
        let socket_dir = directory.to_str().ok_or_else(|| Error::usage("the scratch directory is not UTF-8"))?;
        let mut login = Self { socket_dir: socket_dir.to_owned(), user: known.to_owned() };
        let client = login.connect(database).await.during(|| "log in to the scratch cluster")?;
        let query = "SELECT rolname::text FROM pg_roles WHERE rolsuper AND rolcanlogin ORDER BY oid LIMIT 1";
        let row = client.query_opt(query, &[]).await.map_err(crate::pg::PgError::from)?;
        let superuser = row.ok_or_else(|| Error::refused("the restored cluster has no superuser who may log in"))?;
        login.user = superuser.get(0);
        Ok(login)
    }

    /// The directory of the socket.
    pub(super) fn socket_dir(&self) -> &str {
        &self.socket_dir
    }

    async fn connect(&self, database: &str) -> Result<SqlClient> {
        let quote = |value: &str| format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"));
        let (host, user) = (quote(&self.socket_dir), quote(&self.user));
        let text = format!("host={host} port={SCRATCH_PORT} user={user} dbname={}", quote(database));
        let info = ConnInfo::from_text(&text)?.with_application_name("drctl drill");
        Ok(sql::connect(&info).await?)
    }

    /// What a query gives, as text.
    async fn ask(&self, assertion: &Assertion) -> Result<String> {
        let Assertion { name, sql, database, .. } = assertion;
        let client = self.connect(database).await.during(|| format!("connect to database {database}"))?;
        let timeout = STATEMENT_TIMEOUT.as_millis();
        let settings = format!("SET statement_timeout = {timeout}; SET default_transaction_read_only = on");
        let failed = |error| Error::from(crate::pg::PgError::from(error)).during(format!("ask {name}"));
        client.batch_execute(&settings).await.map_err(failed)?;
        let rows = client.simple_query(sql).await.map_err(failed)?;
        let rows: Vec<_> = rows
            .iter()
            .filter_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
                _ => None,
            })
            .collect();
        match rows.as_slice() {
            [row] if row.len() == 1 => Ok(row.get(0).unwrap_or("NULL").to_owned()),
            rows => Err(Error::failed(format!("{name} gives {} rows, not one value", rows.len()))),
        }
    }
}

async fn found_heartbeat(login: &Login, database: &str, target: &TargetName) -> Result<heartbeat::Beat> {
    let client = login.connect(database).await.during(|| format!("connect to database {database}"))?;
    let missing =
        || Error::failed(format!("no heartbeat of {target} is in database {database} of the restored cluster"));
    heartbeat::read(&client, target).await?.ok_or_else(missing)
}

fn judge(expected: &str, answer: &str) -> Result<String> {
    if expected == answer {
        return Ok(answer.to_owned());
    }
    Err(Error::failed(format!("expected {expected}, got {answer}")))
}

/// Gives one of the checks a wrong expectation, another one each time, and sees whether it is told.
async fn control(login: &Login, target: &Target, report: &Report) -> Option<Control> {
    let turn = usize::try_from(report.started_at.timestamp()).unwrap_or_default();
    let heartbeat = Assertion {
        name: "heartbeat".to_owned(),
        sql: format!("SELECT seq FROM drctl.heartbeat WHERE target = '{}'", target.name),
        expect: report.heartbeat.as_ref().map_or(0, |beat| beat.seq).to_string(),
        database: target.heartbeat_database.clone(),
    };
    let candidates: Vec<_> = target.assertions.iter().chain(report.heartbeat.as_ref().map(|_| &heartbeat)).collect();
    let chosen = *candidates.get(turn.checked_rem(candidates.len())?)?;
    let expectation = format!("{} or anything else", chosen.expect);
    // Only an answer that was judged wrong counts: a question that could not be asked catches nothing.
    let caught = match login.ask(chosen).await {
        Ok(answer) => judge(&expectation, &answer).is_err(),
        Err(_) => false,
    };
    Some(Control { name: chosen.name.clone(), expectation, caught })
}
