//! What another process asks of a standby, by its control socket, or by its directory when nobody feeds it.

use std::path::Path;
use std::time::Duration;

use crate::disk::lock::Lock;
use crate::jobs::context::Context;
use crate::jobs::standby::control;
use crate::jobs::standby::finish::finish_alone;
use crate::jobs::standby::record::{LOCK, Record};
use crate::jobs::standby::server;
use crate::jobs::standby::status::Status;
use crate::jobs::standby::words::{Promoted, Wish};
use crate::model::{Error, Kind, Result};
use crate::pg::instance::{Postmaster, postmaster_of};

/// How often it is looked whether the process that feeds a standby has ended.
const LOOK: Duration = Duration::from_millis(500);

/// How a standby is.
///
/// # Errors
/// It answers, and not as it should.
pub async fn status(record: &Record) -> Result<Status> {
    match control::status(record, false).await? {
        Some(status) => Ok(status),
        None => {
            let server = match postmaster_of(&record.directory)? {
                Postmaster::Alive { pid } => Some(pid),
                _ => None,
            };
            let status = Status::not_fed(record, server);
            Ok(match (server::must_be_standby(&record.directory).await, record.promotion) {
                (Err(_), Some(at)) => Status { server_pid: server, ..Status::promoted(record, at) },
                (Err(promoted), None) => Status { why: Some(promoted.to_string()), ..status },
                (Ok(()), _) => status,
            })
        }
    }
}

/// Promotes a standby that is fed, and waits until it takes writes. One that followed the order of a process which died is
/// tidied up behind.
///
/// # Errors
/// Nobody feeds it, or what stopped it.
pub async fn order_promotion(context: &Context, record: &Record, wish: Wish) -> Result<Promoted> {
    if let Some(promoted) = control::order_promotion(record, wish).await? {
        return Ok(promoted);
    }
    if let Some(at) = server::followed(record).await? {
        return finish_alone(context, record, at).await;
    }
    let error = Error::new(Kind::Unavailable, format!("nobody feeds the standby of {}", record.target));
    Err(error.hint(format!("drctl standby start {} --to {}", record.target, record.directory.display())))
}

/// Stops feed and server of a standby. Returns whether anything ran.
///
/// # Errors
/// What stopped it.
pub async fn stop(record: &Record) -> Result<bool> {
    server::must_be_standby(&record.directory).await?;
    let was_fed = control::order_stop(record).await?.is_some();
    let was_running = matches!(postmaster_of(&record.directory)?, Postmaster::Alive { .. });
    if was_fed {
        wait_released(&record.directory).await?;
    } else if was_running {
        server::stop_found(&record.directory).await?;
    }
    Ok(was_fed || was_running)
}

/// The feed's process lets go of its lock when everything has ended.
async fn wait_released(directory: &Path) -> Result<()> {
    loop {
        match Lock::acquire(&directory.join(LOCK)) {
            Ok(_lock) => return Ok(()),
            Err(crate::disk::DiskError::Locked { .. }) => tokio::time::sleep(LOOK).await,
            Err(error) => return Err(error.into()),
        }
    }
}
