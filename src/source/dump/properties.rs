//! What belongs to a database itself and not to what is in it: its owner, who may connect, its settings. `pg_restore` brings
//! them only under the name that was dumped; here they come back under any name, after everything else.

use serde::{Deserialize, Serialize};

use crate::pg::PgError;
use crate::pg::sql::SqlClient;

/// As it was when the dump was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Properties {
    /// Its owner.
    pub owner: Option<String>,
    /// How many may connect at once; `null` = no limit.
    pub connection_limit: Option<i32>,
    /// Who may do what, its owner left out; `null` = as for every new database.
    pub grants: Option<Vec<Grant>>,
    /// `ALTER DATABASE … SET` and `ALTER ROLE … IN DATABASE … SET`.
    pub settings: Vec<Setting>,
    /// Its comment.
    pub comment: Option<String>,
}

/// One privilege.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// The role; `null` = everybody.
    pub to: Option<String>,
    /// `CONNECT`, `CREATE`, `TEMPORARY`.
    pub privilege: String,
    /// Whether the role may hand it on.
    pub grantable: bool,
}

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// For whom; `null` = everybody.
    pub role: Option<String>,
    /// Its name.
    pub name: String,
    /// Its value, as the catalog holds it.
    pub value: String,
}

const OWN: &str = "SELECT pg_catalog.pg_get_userbyid(datdba)::text, NULLIF(datconnlimit, -1)::int4,
    pg_catalog.shobj_description(oid, 'pg_database'), datacl IS NOT NULL
  FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database()";

const GRANTS: &str = "SELECT CASE grantee WHEN 0 THEN NULL ELSE pg_catalog.pg_get_userbyid(grantee)::text END,
    privilege_type::text, is_grantable
  FROM pg_catalog.pg_database, pg_catalog.aclexplode(datacl)
  WHERE datname = pg_catalog.current_database() AND grantee <> datdba ORDER BY 1 NULLS FIRST, 2";

const SETTINGS: &str = "SELECT r.rolname::text, pg_catalog.split_part(c, '=', 1),
    pg_catalog.substr(c, pg_catalog.strpos(c, '=') + 1)
  FROM pg_catalog.pg_db_role_setting s CROSS JOIN LATERAL pg_catalog.unnest(s.setconfig) c
  LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole
  WHERE s.setdatabase = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
  ORDER BY 1 NULLS FIRST, 2";

impl Properties {
    /// Those of the database that `client` is connected to.
    pub(super) async fn read(client: &SqlClient) -> Result<Self, PgError> {
        let own = client.query_one(OWN, &[]).await?;
        let grants = match own.get(3) {
            true => Some(client.query(GRANTS, &[]).await?),
            false => None,
        };
        let grant = |row: &tokio_postgres::Row| Grant { to: row.get(0), privilege: row.get(1), grantable: row.get(2) };
        let settings = client.query(SETTINGS, &[]).await?;
        let setting = |row: &tokio_postgres::Row| Setting { role: row.get(0), name: row.get(1), value: row.get(2) };
        Ok(Self {
            owner: own.get(0),
            connection_limit: own.get(1),
            grants: grants.map(|rows| rows.iter().map(grant).collect()),
            settings: settings.iter().map(setting).collect(),
            comment: own.get(2),
        })
    }

    /// What makes a new database `name` such a one. The owner comes last: who is not a superuser has no say afterwards.
    pub(super) fn statements(&self, name: &str, no_owner: bool) -> Vec<Statement> {
        let (name, mut all) = (identifier(name), Vec::new());
        for Setting { role, name: setting, value } in &self.settings {
            let set = format!("SET {} TO {}", identifier(setting), as_value(setting, value));
            let (what, sql) = match role {
                None => (format!("the setting {setting}"), format!("ALTER DATABASE {name} {set}")),
                Some(role) => {
                    let sql = format!("ALTER ROLE {} IN DATABASE {name} {set}", identifier(role));
                    (format!("the setting {setting} of {role}"), sql)
                }
            };
            all.push(Statement { what, role: role.clone(), sql, owns: role.is_some() });
        }
        let plain = |what: &str, sql| Statement { what: what.to_owned(), role: None, sql, owns: false };
        if let Some(comment) = &self.comment {
            all.push(plain("its comment", format!("COMMENT ON DATABASE {name} IS {}", literal(comment))));
        }
        if let Some(limit) = self.connection_limit {
            all.push(plain("its limit of connections", format!("ALTER DATABASE {name} CONNECTION LIMIT {limit}")));
        }
        if let Some(grants) = &self.grants {
            let sql = format!("REVOKE ALL ON DATABASE {name} FROM PUBLIC");
            all.push(Statement { owns: true, ..plain("what everybody may", sql) });
            for Grant { to, privilege, grantable } in grants {
                let who = to.as_ref().map_or_else(|| "PUBLIC".to_owned(), |role| identifier(role));
                let more = if *grantable { " WITH GRANT OPTION" } else { "" };
                let what = format!("{privilege} for {}", to.as_deref().unwrap_or("everybody"));
                let sql = format!("GRANT {privilege} ON DATABASE {name} TO {who}{more}");
                all.push(Statement { what, role: to.clone(), sql, owns: true });
            }
        }
        if let Some(owner) = &self.owner {
            let sql = format!("ALTER DATABASE {name} OWNER TO {}", identifier(owner));
            all.push(Statement { what: format!("its owner {owner}"), role: Some(owner.clone()), sql, owns: true });
        }
        all.retain(|statement| !(no_owner && statement.owns));
        all
    }
}

/// One step, and which role it takes.
#[derive(Debug)]
pub(super) struct Statement {
    pub(super) what: String,
    pub(super) role: Option<String>,
    pub(super) sql: String,
    /// Whether it is about owners and grants.
    owns: bool,
}

/// Settings whose value is a list of names, each quoted by itself; as one string it would be one name with commas in it.
const LISTS: [&str; 7] = [
    "local_preload_libraries",
    "search_path",
    "session_preload_libraries",
    "shared_preload_libraries",
    "temp_tablespaces",
    "unix_socket_directories",
    "restrict_nonsystem_relation_kind",
];

fn as_value(name: &str, value: &str) -> String {
    if !LISTS.contains(&name.to_lowercase().as_str()) {
        return literal(value);
    }
    let names: Vec<_> = names(value).iter().map(|name| literal(name)).collect();
    if names.is_empty() { "''".to_owned() } else { names.join(", ") }
}

/// The names in a list as the catalog holds it: `"$user", public`.
fn names(list: &str) -> Vec<String> {
    let (mut names, mut name, mut quoted, mut was_quoted) = (Vec::new(), String::new(), false, false);
    let mut characters = list.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.next_if_eq(&'"').is_some() => name.push('"'),
            '"' => (quoted, was_quoted) = (!quoted, true),
            ',' if !quoted => {
                names.push(std::mem::take(&mut name));
                was_quoted = false;
            }
            c if c.is_whitespace() && !quoted => {}
            c => name.push(c),
        }
    }
    if !name.is_empty() || was_quoted {
        names.push(name);
    }
    names
}

pub(super) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

pub(super) fn literal(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('\'', "''");
    format!("E'{escaped}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_names_stay_lists() {
        assert_eq!(as_value("search_path", "\"$user\", public"), "E'$user', E'public'");
        assert_eq!(as_value("search_path", "\"a, \"\"b\""), "E'a, \"b'");
        assert_eq!(as_value("search_path", "\"\""), "E''");
        assert_eq!(as_value("search_path", ""), "''");
        assert_eq!(as_value("application_name", "it's, \\so"), "E'it''s, \\\\so'");
    }

    #[test]
    fn the_owner_comes_last_and_only_with_owners() {
        let grant = Grant { to: Some("r".into()), privilege: "CONNECT".into(), grantable: true };
        let properties = Properties {
            owner: Some("o".into()),
            connection_limit: Some(3),
            grants: Some(vec![grant]),
            settings: vec![Setting { role: Some("r".into()), name: "work_mem".into(), value: "1MB".into() }],
            comment: None,
        };
        let sql = |no_owner| properties.statements("d", no_owner).into_iter().map(|s| s.sql).collect::<Vec<_>>();
        assert_eq!(
            sql(false),
            [
                "ALTER ROLE \"r\" IN DATABASE \"d\" SET \"work_mem\" TO E'1MB'",
                "ALTER DATABASE \"d\" CONNECTION LIMIT 3",
                "REVOKE ALL ON DATABASE \"d\" FROM PUBLIC",
                "GRANT CONNECT ON DATABASE \"d\" TO \"r\" WITH GRANT OPTION",
                "ALTER DATABASE \"d\" OWNER TO \"o\"",
            ]
        );
        assert_eq!(sql(true), ["ALTER DATABASE \"d\" CONNECTION LIMIT 3"]);
    }
}
