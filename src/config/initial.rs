//! The configuration that `drctl init DIR` writes when there is none.

/// The text of `drctl.toml` for two directory regions beside it, sealed for one offline age recipient.
pub fn initial_text(age_recipient: &str) -> String {
    format!(
        r#"# Two regions on one disk protect from mistakes, not from the loss of this machine. Move region-b elsewhere, or
# replace it by a bucket, before you rely on it. Every key is described in docs/configuration.md.

[repository]
state_dir = "state"

[regions.region-a]
url = "region-a"

[regions.region-b]
url = "region-b"

# The identity is in recovery.age. Whoever has it can open every backup; without it none of them opens. Keep a copy away
# from this machine, and remove the last line once it is there.
[keys.recovery]
age = "{age_recipient}"
identity = "file:recovery.age"

# [targets.ledger]
# source = "postgres"
# conninfo = "host=/run/postgresql user=drctl dbname=postgres"
# rpo = "5s"
# rto_restore = "4h"
"#
    )
}
