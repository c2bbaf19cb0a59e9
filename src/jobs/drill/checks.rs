//! What PostgreSQL's own tools say of the restored cluster.

use std::time::Duration;

use crate::jobs::context::Context;
use crate::jobs::drill::login::Login;
use crate::jobs::drill::report::{Level, Report};
use crate::jobs::drill::scratch::Scratch;
use crate::jobs::restore::SCRATCH_PORT;
use crate::model::{Error, Result};
use crate::pg::control::{self, ControlFile};
use crate::pg::instance::PgBinaries;

/// The end of what a tool printed that goes into the report.
const SHOWN: usize = 2000;
/// A tool that takes longer has not answered.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Every table and every B-tree index, each index entry against its table.
pub(super) async fn amcheck(context: &Context, scratch: &Scratch, login: &Login, report: &mut Report) {
    let phase = context.progress.begin("amcheck", None);
    let outcome = run_amcheck(scratch, login).await;
    drop(phase);
    report.check("amcheck with heapallindexed", Level::L5, outcome);
}

async fn run_amcheck(scratch: &Scratch, login: &Login) -> Result<String> {
    let binaries = binaries(scratch).await?;
    if binaries.major < 14 {
        return Err(Error::refused("pg_amcheck exists from PostgreSQL 14 on"));
    }
    let mut command = binaries.command("pg_amcheck");
    command.args(["--all", "--install-missing", "--heapallindexed", "--jobs=2", "-h", login.socket_dir()]);
    command.args(["-p", &SCRATCH_PORT.to_string(), "-U", &login.user]);
    // Timeouts of production would cut a check short, and a check that was cut short looks like damage.
    command.env("PGOPTIONS", "-c statement_timeout=0 -c lock_timeout=0");
    match run(command, "pg_amcheck").await? {
        (0, _) => Ok("no error".to_owned()),
        // 2: it found something. Everything else: it could not look.
        (2, told) => Err(Error::damaged(told)),
        (code, told) => Err(Error::refused(format!("pg_amcheck ended with {code}: {told}"))),
    }
}

/// After the server has stopped: every page against its checksum, if the cluster has them.
pub(super) async fn offline(scratch: &Scratch, report: &mut Report) -> Result<()> {
    let control = control(scratch)?;
    if control.data_checksum_version == 0 {
        report.warnings.push("the cluster has no data checksums: pages are proven by their seals alone".to_owned());
        return Ok(());
    }
    let binaries = binaries(scratch).await?;
    let mut command = binaries.command("pg_checksums");
    command.args(["--check", "-D"]).arg(scratch.data());
    let outcome = match run(command, "pg_checksums").await {
        Ok((0, _)) => Ok("no page differs".to_owned()),
        Ok((_, told)) => Err(Error::damaged(told)),
        Err(error) => Err(error),
    };
    report.check("page checksums", Level::L5, outcome);
    Ok(())
}

fn control(scratch: &Scratch) -> Result<ControlFile> {
    let path = scratch.data().join(control::PATH);
    let bytes = std::fs::read(&path).map_err(|error| crate::disk::DiskError::new("read", &path, error))?;
    Ok(ControlFile::parse(&bytes)?)
}

async fn binaries(scratch: &Scratch) -> Result<PgBinaries> {
    let version = scratch.data().join("PG_VERSION");
    let text = std::fs::read_to_string(&version);
    let text = text.map_err(|error| crate::disk::DiskError::new("read", &version, error))?;
    let major = text.trim().parse().map_err(|_| Error::damaged(format!("PG_VERSION says `{}`", text.trim())))?;
    Ok(PgBinaries::find(major, None).await?)
}

/// Runs a tool; gives its exit code and the end of what it printed.
async fn run(mut command: tokio::process::Command, name: &str) -> Result<(i32, String)> {
    command.kill_on_drop(true);
    let output = tokio::time::timeout(LIMIT, command.output()).await;
    let output = output.map_err(|_| Error::refused(format!("{name} did not end")))?;
    let output = output.map_err(|error| Error::refused(format!("{name} could not be run")).because(error))?;
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    let told = told.trim();
    let cut = told.char_indices().rev().nth(SHOWN).map_or(0, |(at, _)| at);
    let code = output.status.code().ok_or_else(|| Error::refused(format!("{name} was killed")))?;
    Ok((code, told.get(cut..).unwrap_or(told).to_owned()))
}
