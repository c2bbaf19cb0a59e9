//! The restored cluster is asked: is the heartbeat there, is what its owner asserts true, and would a lie be noticed?

use crate::jobs::context::{Assertion, Context, Target};
use crate::jobs::drill::checks;
use crate::jobs::drill::login::Login;
use crate::jobs::drill::report::{Control, Level, Report};
use crate::jobs::drill::scratch::Scratch;
use crate::model::{Error, Result, ResultExt, SystemId, TargetName};
use crate::source::postgres::heartbeat;

/// Runs every check that needs the server.
pub(super) async fn all(
    context: &Context,
    (target, system_id): (&Target, Option<SystemId>),
    (scratch, arrived): (&Scratch, Option<heartbeat::Beat>),
    report: &mut Report,
) -> Result<()> {
    let login = Login::find(scratch, target.conninfo.user(), &target.heartbeat_database).await?;
    let found = found_heartbeat(&login, &target.heartbeat_database, &target.name).await;
    if let Ok(beat) = &found {
        report.found(beat.clone());
    }
    let found = found.and_then(|found| match arrived.filter(|beat| beat.seq > found.seq) {
        None => Ok(found),
        Some(beat) => {
            let text = format!("beat {} was durable in the region, and beat {} came back", beat.seq, found.seq);
            Err(Error::damaged(text))
        }
    });
    let told = |beat: heartbeat::Beat| format!("number {}, written at {}", beat.seq, beat.at.to_rfc3339());
    match found {
        // There may have been no beat yet at that time.
        Err(_) if !report.asked.is_newest() => {}
        found => report.check("heartbeat", Level::L6, found.map(told)),
    }
    for assertion in &target.assertions {
        let answer = login.ask(assertion).await.and_then(|answer| judge(&assertion.expect, &answer));
        report.check(assertion.name.clone(), Level::L6, answer);
        report.controls.extend(broken(&login, assertion).await);
    }
    let identity = system_id.map(|system_id| identity(system_id, &target.heartbeat_database));
    if let Some(identity) = &identity {
        let answer = login.ask(identity).await.and_then(|answer| judge(&identity.expect, &answer));
        report.check(identity.name.clone(), Level::L4, answer);
    }
    report.control = control(&login, (target, identity), report).await;
    checks::amcheck(context, scratch, &login, report).await;
    Ok(())
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

/// The cluster is the one that was backed up.
fn identity(system_id: SystemId, database: &str) -> Assertion {
    Assertion {
        name: "system identifier".to_owned(),
        sql: "SELECT system_identifier FROM pg_control_system()".to_owned(),
        expect: system_id.to_string(),
        database: database.to_owned(),
        control: None,
    }
}

/// Breaks what an assertion is about, as its owner said, and sees whether its answer changes. A control that does not even
/// run shows nothing, so it counts as not caught.
async fn broken(login: &Login, assertion: &Assertion) -> Option<Control> {
    let sql = assertion.control.as_ref()?;
    let (caught, expectation) = match login.ask_broken(assertion, sql).await {
        Ok(answer) => (judge(&assertion.expect, &answer).is_err(), sql.clone()),
        Err(error) => (false, format!("{sql}, which could not be tried: {error}")),
    };
    Some(Control { name: assertion.name.clone(), expectation, caught })
}

/// Gives one of the checks a wrong expectation, another one each time, and sees whether it is told.
async fn control(login: &Login, (target, identity): (&Target, Option<Assertion>), report: &Report) -> Option<Control> {
    let turn = usize::try_from(report.started_at.timestamp()).unwrap_or_default();
    let heartbeat = Assertion {
        name: "heartbeat".to_owned(),
        sql: format!("SELECT seq FROM drctl.heartbeat WHERE target = '{}'", target.name),
        expect: report.heartbeat.as_ref().map_or(0, |beat| beat.seq).to_string(),
        database: target.heartbeat_database.clone(),
        control: None,
    };
    let mut candidates: Vec<_> =
        target.assertions.iter().chain(report.heartbeat.as_ref().map(|_| &heartbeat)).collect();
    if candidates.is_empty() {
        candidates.extend(&identity);
    }
    let chosen = *candidates.get(turn.checked_rem(candidates.len())?)?;
    let expectation = format!("{} or anything else", chosen.expect);
    // Only an answer that was judged wrong counts: a question that could not be asked catches nothing.
    let caught = match login.ask(chosen).await {
        Ok(answer) => judge(&expectation, &answer).is_err(),
        Err(_) => false,
    };
    Some(Control { name: chosen.name.clone(), expectation, caught })
}
