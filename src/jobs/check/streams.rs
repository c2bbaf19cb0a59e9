//! What is read as streams: the roots of files, the server of a dump.

use std::path::PathBuf;
use std::time::Duration;

use super::Subject;
use super::finding::{Finding, Findings};
use crate::jobs::context::{Streamed, What};
use crate::source::{dump, files};

pub(super) async fn check(subject: &Subject, target: &Streamed, deadline: Duration) -> Vec<Finding> {
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
            let (options, own) = (options.clone(), own(subject));
            let looked = tokio::task::spawn_blocking(move || (roots(&options), taken(&options, own)));
            // A file system that hangs must not hang the check.
            match tokio::time::timeout(deadline, looked).await {
                Ok(Ok((results, taken))) => {
                    results.into_iter().for_each(|(root, result)| match result {
                        Ok(()) => findings.ok(format!("{root} can be read")),
                        Err(error) => findings.fail(
                            format!("{root} cannot be read: {error}"),
                            format!(
                                "give the user that runs drctl read access to it, or mend roots of {}",
                                target.name
                            ),
                        ),
                    });
                    taken.into_iter().for_each(|(path, harm)| {
                        findings.warn(
                            format!("{} is archived as well: {harm}", path.display()),
                            format!("name it in `exclude` of {}, or move it out of the roots", target.name),
                        );
                    });
                }
                _ => findings.fail("the roots do not answer", "mount them, or take them out of `roots`"),
            }
        }
    }
    findings.into_list()
}

fn roots(options: &files::Options) -> Vec<(String, std::io::Result<()>)> {
    let look = |root: &PathBuf| match std::fs::metadata(root) {
        Ok(found) if found.is_dir() => std::fs::read_dir(root).map(drop),
        Ok(_) => std::fs::File::open(root).map(drop),
        Err(error) => Err(error),
    };
    options.roots.iter().map(|root| (root.display().to_string(), look(root))).collect()
}

/// What of ours does harm in an archive.
fn own(subject: &Subject) -> Vec<(PathBuf, &'static str)> {
    let places = subject.addresses.iter().filter_map(|region| region.url.strip_prefix("dir://"));
    let grows = "it is a region, and every archive would hold those before it";
    let regions = places.map(|place| (PathBuf::from(place), grows));
    let keys = subject.identities.iter();
    regions.chain(keys.map(|path| (path.clone(), "it opens every backup"))).collect()
}

fn taken(options: &files::Options, mut own: Vec<(PathBuf, &'static str)>) -> Vec<(PathBuf, &'static str)> {
    own.retain(|(path, _)| options.take(path));
    own
}

fn server(findings: &mut Findings, found: dump::Found) {
    findings.ok(format!("answers SQL; dumps {}", found.databases.join(", ")));
    for closed in found.closed {
        // No privilege opens it, not even a superuser's.
        findings.warn(closed, "ALTER DATABASE … ALLOW_CONNECTIONS true;   or list `databases` of the target");
    }
    for refused in found.refused {
        findings.warn(refused, "GRANT CONNECT ON DATABASE … TO our role;   or list `databases` of the target");
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
