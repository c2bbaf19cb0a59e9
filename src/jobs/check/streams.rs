//! What is read as streams: the roots of files, the server of a dump.

use std::time::Duration;

use super::finding::{Finding, Findings};
use crate::jobs::context::{Streamed, What};
use crate::source::{dump, files};

pub(super) async fn check(target: &Streamed, deadline: Duration) -> Vec<Finding> {
    let mut findings = Findings::about(target.source(), &target.name);
    match &target.what {
        What::Dump(options) => match tokio::time::timeout(deadline, dump::look(options)).await {
            Ok(Ok(found)) => server(&mut findings, found),
            Ok(Err(error)) => {
                let fix = error.hint_text().unwrap_or("the server, and conninfo of the target").to_owned();
                findings.fail(format!("cannot be dumped: {error}"), fix);
            }
            Err(_) => findings.fail(format!("no answer within {} s", deadline.as_secs()), "the server, and conninfo"),
        },
        What::Files(options) => {
            let options = options.clone();
            let looked = tokio::task::spawn_blocking(move || roots(&options));
            // A file system that hangs must not hang the check.
            match tokio::time::timeout(deadline, looked).await {
                Ok(Ok(results)) => results.into_iter().for_each(|(root, result)| match result {
                    Ok(()) => findings.ok(format!("{root} can be read")),
                    Err(error) => findings.fail(
                        format!("{root} cannot be read: {error}"),
                        format!("give the user that runs drctl read access to it, or mend roots of {}", target.name),
                    ),
                }),
                _ => findings.fail("the roots do not answer", "mount them, or take them out of `roots`"),
            }
        }
    }
    findings.into_list()
}

fn roots(options: &files::Options) -> Vec<(String, std::io::Result<()>)> {
    let look = |root: &std::path::PathBuf| match std::fs::metadata(root) {
        Ok(found) if found.is_dir() => std::fs::read_dir(root).map(drop),
        Ok(_) => std::fs::File::open(root).map(drop),
        Err(error) => Err(error),
    };
    options.roots.iter().map(|root| (root.display().to_string(), look(root))).collect()
}

fn server(findings: &mut Findings, found: dump::Found) {
    findings.ok(format!("answers SQL; dumps {}", found.databases.join(", ")));
    for left_out in found.left_out {
        findings.warn(left_out, "GRANT CONNECT ON DATABASE … TO our role;   or list `databases` of the target");
    }
    let major = found.version / 10_000;
    match found.pg_dump {
        Ok(version) => findings.ok(version),
        Err(error) => findings.fail(
            format!("no pg_dump for PostgreSQL {major}: {error}"),
            format!("install postgresql-client-{major}, or set DRCTL_PG_BIN_{major}, or bin_dir of the target"),
        ),
    }
    if found.hidden_rows {
        let fix = "ALTER ROLE … BYPASSRLS;   where that is not possible, dump as the owner of the tables";
        findings.warn("row security may hide rows from our role: a dump of such a table fails", fix);
    }
}
