//! Whether the primary of a target lives, as far as asking it tells.

use std::io;
use std::time::Duration;

use futures::future::join_all;
use rustix::io::Errno;
use serde::Serialize;

use crate::jobs::context::Target;
use crate::model::SystemId;
use crate::pg::PgError;
use crate::pg::conninfo::ConnInfo;
use crate::pg::sql;

/// How long the old primary may take to answer.
const PRIMARY_DEADLINE: Duration = Duration::from_secs(3);

/// What came of asking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "why")]
pub enum Primary {
    /// One of the target's servers takes writes as this cluster.
    Answers,
    /// Nothing listens where they listened, or what does is no primary of this cluster.
    Silent,
    /// It may live: a server that turns us away, a host that is out of reach from here, no answer in time.
    Unknown(String),
}

/// Asks every server of a target, whichever of them the target prefers.
pub(super) async fn ask(target: &Target, system: SystemId) -> Primary {
    let servers: Vec<_> = target.conninfo.each_server().collect();
    let answers = join_all(servers.iter().map(|server| ask_one(server, system))).await;
    answers.into_iter().fold(Primary::Silent, Primary::or)
}

async fn ask_one(server: &ConnInfo, system: SystemId) -> Primary {
    let asked = async {
        let client = sql::connect(server).await?;
        let question = "SELECT system_identifier::text, pg_is_in_recovery() FROM pg_control_system()";
        let row = client.query_one(question, &[]).await?;
        Ok((row.get(0), row.get(1)))
    };
    let late = || PgError::Timeout(format!("no answer within {} s", PRIMARY_DEADLINE.as_secs()));
    let answer = tokio::time::timeout(PRIMARY_DEADLINE, asked).await.unwrap_or_else(|_| Err(late()));
    Primary::of(answer, system)
}

impl Primary {
    /// What an answer means: the cluster and whether it recovers.
    fn of(answer: Result<(String, bool), PgError>, system: SystemId) -> Self {
        match answer {
            Ok((id, is_standby)) if id == system.to_string() && !is_standby => Self::Answers,
            Ok(_) => Self::Silent,
            Err(PgError::Connect { reason, .. }) if is_proof(&reason) => Self::Silent,
            Err(error) => Self::Unknown(error.to_string()),
        }
    }

    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Answers, _) | (_, Self::Answers) => Self::Answers,
            (Self::Unknown(why), _) | (_, Self::Unknown(why)) => Self::Unknown(why),
            (Self::Silent, Self::Silent) => Self::Silent,
        }
    }
}

/// Only the host itself says that nothing listens there; every other failure may lie between.
fn is_proof(reason: &str) -> bool {
    [Errno::CONNREFUSED, Errno::NOENT].into_iter().any(|errno| reason.contains(&io::Error::from(errno).to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_hears_that_nothing_listens_calls_a_primary_dead() {
        let of = |answer| Primary::of(answer, SystemId(7));
        assert_eq!(of(Ok(("7".into(), false))), Primary::Answers);
        assert_eq!(of(Ok(("7".into(), true))), Primary::Silent);
        assert_eq!(of(Ok(("8".into(), false))), Primary::Silent);
        let connect = |errno: Errno| {
            let reason = io::Error::from(errno).to_string();
            of(Err(PgError::Connect { server: "db:5432".into(), reason }))
        };
        assert_eq!([Errno::CONNREFUSED, Errno::NOENT].map(connect), [Primary::Silent, Primary::Silent]);
        let alive = [
            connect(Errno::HOSTUNREACH),
            connect(Errno::ACCESS),
            of(Err(PgError::Auth("password authentication failed".into()))),
            of(Err(PgError::Timeout("no answer".into()))),
            of(Err(PgError::Closed("the server or the network ended it".into()))),
        ];
        for answer in alive {
            assert!(matches!(answer, Primary::Unknown(_)), "{answer:?}");
            assert_eq!(answer.clone().or(Primary::Answers), Primary::Answers);
            assert_eq!(Primary::Silent.or(answer.clone()), answer);
        }
    }
}
