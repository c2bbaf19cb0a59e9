//! What is no cluster: directories and dumps, from backup to loss to restore.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::escape;
use crate::support::dirs::{Scratch, size_of};
use crate::support::drctl::{Drctl, Finished};
use crate::support::pg::{Cluster, Until, bin_dir};
use crate::support::process;

/// Two directory regions and one target named `kept`.
struct Protected {
    scratch: Scratch,
    majors: Vec<u32>,
}

impl Protected {
    async fn new(target: &str, majors: &[u32]) -> Self {
        let scratch = Scratch::new();
        let home = scratch.join("dr");
        Drctl::new(["init".as_ref(), home.as_os_str()]).run().await.ok();
        let mut text = fs::read_to_string(home.join("drctl.toml")).unwrap();
        text.push_str(&format!("\n[targets.kept]\n{target}"));
        fs::write(home.join("drctl.toml"), text).unwrap();
        Self { scratch, majors: majors.to_vec() }
    }

    fn home(&self) -> PathBuf {
        self.scratch.join("dr")
    }

    fn here(&self, drctl: Drctl) -> Drctl {
        let drctl = drctl.config(&self.home().join("drctl.toml"));
        self.majors.iter().fold(drctl, |drctl, major| drctl.env(&format!("DRCTL_PG_BIN_{major}"), bin_dir(*major)))
    }

    fn drctl(&self, arguments: &[&str]) -> Drctl {
        self.here(Drctl::new(arguments))
    }

    async fn json(&self, arguments: &[&str]) -> Value {
        self.drctl(&[arguments, &["--json"]].concat()).run().await.ok().json()
    }

    /// The plan, and then what its command does, pasted into a shell.
    async fn restore(&self, options: &[&str], log: &str) -> Finished {
        let plan = self.drctl(&[&["restore", "kept", "--json"], options].concat()).expect_log(log).run().await;
        let command = plan.ok().json()["command"].as_str().unwrap().to_owned();
        self.here(Drctl::pasted(&command)).expect_log(log).run().await
    }

    fn region(&self, name: &str) -> PathBuf {
        self.home().join(name)
    }
}

/// The objects of a kind in a region, and what is done to the bytes of the largest.
fn flip_largest_pack(region: &Path) -> PathBuf {
    let mut packs: Vec<_> = Vec::new();
    for backup in fs::read_dir(region.join("packs/kept")).unwrap() {
        packs.extend(fs::read_dir(backup.unwrap().path()).unwrap().map(|pack| pack.unwrap().path()));
    }
    let pack = packs.into_iter().max_by_key(|pack| fs::metadata(pack).unwrap().len()).unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes).unwrap();
    pack
}

fn tree(root: &Path) {
    fs::create_dir_all(root.join("deep/empty")).unwrap();
    fs::write(root.join("app.conf"), "port = 1\n").unwrap();
    fs::hard_link(root.join("app.conf"), root.join("deep/same")).unwrap();
    symlink("../app.conf", root.join("deep/link")).unwrap();
    let noise: Vec<u8> = (0..6_000_000u64).map(|n| n.wrapping_mul(n).to_le_bytes()[1]).collect();
    fs::write(root.join("archive.log"), noise).unwrap();
    fs::write(root.join("not.swp"), "x").unwrap();
    let sparse = fs::File::create(root.join("disk.img")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    sparse.write_all_at(b"superblock", 4096).unwrap();
    fs::set_permissions(root.join("app.conf"), fs::Permissions::from_mode(0o2640)).unwrap();
    rustix::fs::setxattr(root.join("app.conf"), "user.origin", b"here", rustix::fs::XattrFlags::empty()).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(root.join("archive.log"), Some(4321), Some(1234)).unwrap();
    }
}

/// Kind, mode, owner, time, contents and attribute of everything below a directory.
fn look(root: &Path) -> BTreeMap<PathBuf, String> {
    let (mut seen, mut open) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            let mut line = format!("{:o} {}:{} {}", found.mode(), found.uid(), found.gid(), found.mtime_nsec());
            if found.is_dir() {
                open.push(path.clone());
            } else if found.is_symlink() {
                line += &format!(" {:?}", fs::read_link(&path).unwrap());
            } else {
                let mut value = [0; 16];
                let origin = rustix::fs::getxattr(&path, "user.origin", &mut value[..]).unwrap_or(0);
                // The large one is nearly all hole.
                let mut bytes = vec![0; usize::try_from(found.len().min(1 << 23)).unwrap()];
                fs::File::open(&path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
                let sum = crc32c::crc32c(&bytes);
                line += &format!(" {} {sum:x} {} {:?}", found.len(), found.nlink(), &value[..origin]);
            }
            seen.insert(path.strip_prefix(root).unwrap().to_owned(), line);
        }
    }
    seen
}

#[tokio::test]
async fn directories_come_back_as_they_were_from_either_region() {
    let scratch = Scratch::new();
    let root = scratch.dir("srv");
    tree(&root);
    let target = format!("source = \"files\"\nroots = [\"{}\"]\nexclude = [\"*.swp\"]\nrpo = \"1h\"\n", root.display());
    let protected = Protected::new(&target, &[]).await;
    let checked = protected.json(&["check"]).await.to_string();
    assert!(checked.contains("can be read"), "{checked}");
    let backup = protected.json(&["backup", "kept"]).await;
    assert_eq!((&backup["backup"]["kind"], &backup["backup"]["wal"]), (&Value::from("files"), &Value::Null));
    assert!(backup["backup"]["stored_bytes"].as_u64().unwrap() < 8_000_000, "a hole was stored: {backup}");
    let listed = protected.drctl(&["list"]).run().await.ok();
    assert!(listed.stdout.contains("Restorable: as of 20") && listed.stdout.contains(" files "), "{listed}");
    let status = protected.json(&["status"]).await;
    assert!(status["targets"][0]["regions"][0]["exposure_seconds"].as_u64().unwrap() < 600, "{status}");
    for (arguments, code) in
        [(&["drill", "kept"][..], 5), (&["wal", "stream", "kept"], 5), (&["backup", "kept", "--full"], 2)]
    {
        let refused = protected.drctl(arguments).run().await.code(code);
        assert!(refused.stderr.contains("hint:"), "{refused}");
    }

    let (mut wanted, lost) = (look(&root), scratch.join("lost"));
    wanted.remove(Path::new("not.swp"));
    fs::rename(&root, &lost).unwrap();
    // A bit flipped in one region is taken from the other, and told.
    let pack = flip_largest_pack(&protected.region("region-a"));
    let out = scratch.join("out");
    let shown = out.display().to_string();
    let report = protected.restore(&["--target-dir", &shown], "taken from another region").await.ok().json();
    assert!(report["incidents"][0]["damaged"].as_bool().unwrap(), "{report}");
    let back = out.join(root.strip_prefix("/").unwrap());
    assert_eq!(look(&back), wanted);
    assert!(!out.join("drctl-restore.json").exists());
    assert!(fs::metadata(back.join("disk.img")).unwrap().blocks() < 100, "a hole was written");
    let again = protected.drctl(&["restore", "kept", "--target-dir", &shown]).run().await.code(5);
    assert!(again.stdout.contains("is not empty"), "{again}");

    // Bad in both: named, an error, and what is there says that it is a part.
    let verified = protected.drctl(&["verify", "kept", "--scrub", "--json"]).run().await.code(1);
    assert!(verified.stdout.contains(pack.file_name().unwrap().to_str().unwrap()), "{verified}");
    flip_largest_pack(&protected.region("region-b"));
    let half = scratch.join("half");
    let failed = protected.restore(&["--target-dir", half.to_str().unwrap()], "WARN").await.code(1);
    assert!(failed.stdout.contains("authenticate") && failed.stdout.contains("is a part of it"), "{failed}");
    assert!(half.join("drctl-restore.json").exists());

    // Repair needs no key, and what it repaired restores alone.
    flip_largest_pack(&protected.region("region-b"));
    fs::remove_dir_all(protected.region("region-a")).unwrap();
    protected.drctl(&["repair", "kept"]).expect_log("taken from another region").run().await.ok();
    protected.drctl(&["verify", "kept", "--level", "l2"]).run().await.ok();
    fs::remove_dir_all(protected.region("region-b")).unwrap();
    let raw = scratch.join("raw");
    let options = ["--target-dir", raw.to_str().unwrap(), "--raw", "--region", "region-a"];
    protected.restore(&options, "WARN").await.ok();
    // The program that lies in the region gives the same, without drctl.
    let (opened, key) = (scratch.join("opened"), protected.home().join("recovery.age"));
    let arguments = ["kept", opened.to_str().unwrap(), "--age-identity", key.to_str().unwrap()];
    let told = escape::succeeded(&escape::open(&protected.region("region-a"), &arguments));
    assert!(told.contains("tar --xattrs"), "{told}");
    assert!(fs::read(opened.join("files.tar")).unwrap() == fs::read(raw.join("files.tar")).unwrap());
    let mut tar = std::process::Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "-xpf"]).arg(raw.join("files.tar")).arg("-C").arg(&raw);
    process::run_async(tar).await;
    assert_eq!(look(&raw.join(root.strip_prefix("/").unwrap())), wanted);
}

/// Nothing is called safe that is not there: neither in the archive, nor in the region, nor at all.
#[tokio::test]
async fn what_is_not_there_is_told_and_is_never_a_success() {
    let scratch = Scratch::new();
    let (root, unmounted) = (scratch.dir("srv"), scratch.dir("unmounted"));
    fs::write(root.join("a"), "a").unwrap();
    let target = format!("source = \"files\"\nroots = [\"{}\", \"{}\"]\n", root.display(), unmounted.display());
    let protected = Protected::new(&target, &[]).await;
    let code = async |arguments: &[&str], code: i32| protected.drctl(arguments).run().await.code(code);
    assert!(code(&["verify"], 1).await.stdout.contains("NOTHING WAS VERIFIED"));
    code(&["repair", "nosuch"], 2).await;

    let report = code(&["backup", "kept", "--json"], 4).await.json();
    assert!(report["left_out"][0].as_str().unwrap().contains("is empty"), "{report}");
    let shown = protected.json(&["show", report["backup"]["id"].as_str().unwrap()]).await;
    assert_eq!((&shown["left_out"], &shown["left_out_count"]), (&report["left_out"], &Value::from(1)));
    assert!(code(&["list"], 0).await.stdout.contains("1 LEFT OUT"));
    assert!(code(&["status"], 1).await.stdout.contains("1 left out of the newest backup"));

    // The place of a region is there, and the region is not.
    let region = protected.region("region-b");
    fs::rename(&region, region.with_extension("away")).unwrap();
    fs::create_dir(&region).unwrap();
    let refused = protected.drctl(&["backup", "kept"]).expect_log("region").run().await.code(1);
    assert!(refused.stderr.contains("is not a region of this repository"), "{refused}");
    assert_eq!(fs::read_dir(&region).unwrap().count(), 0, "nothing is written where nothing is mounted");
    protected.drctl(&["repair"]).expect_log("taken from another region").run().await.ok();
    code(&["backup", "kept"], 4).await;

    fs::remove_file(root.join("a")).unwrap();
    assert!(code(&["backup", "kept"], 1).await.stderr.contains("nothing in"));
}

/// A database with most of what a dump can lose.
async fn load(cluster: &Cluster) {
    cluster.execute("CREATE ROLE app LOGIN").await;
    cluster.execute("CREATE DATABASE shop OWNER app").await;
    cluster.execute("CREATE DATABASE \"it's = odd\"").await;
    cluster.execute("ALTER DATABASE shop SET search_path = \"$user\", app, \"od,d\"").await;
    cluster.execute("ALTER ROLE app IN DATABASE shop SET application_name = 'it''s'").await;
    cluster.execute("REVOKE ALL ON DATABASE shop FROM PUBLIC").await;
    cluster.execute("GRANT CONNECT ON DATABASE shop TO pg_monitor WITH GRANT OPTION").await;
    cluster.execute("COMMENT ON DATABASE shop IS 'kept'").await;
    let mut psql = cluster.tool("psql");
    psql.args(["-Xq", "-v", "ON_ERROR_STOP=1", "-d", "shop", "-c"]).arg(
        "SET ROLE app;
         CREATE SCHEMA app; CREATE SEQUENCE app.ids;
         CREATE TABLE app.orders (id bigint DEFAULT nextval('app.ids') PRIMARY KEY, what text, at timestamptz, big bytea);
         INSERT INTO app.orders (what, at, big) SELECT md5(n::text), now(), decode(repeat(md5(n::text), 20), 'hex')
           FROM generate_series(1, 30000) n;
         CREATE INDEX ON app.orders (what); CREATE VIEW app.latest AS SELECT * FROM app.orders ORDER BY id DESC LIMIT 9;
         CREATE FUNCTION app.count() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM app.orders';
         SELECT lo_from_bytea(4711, 'large object');",
    );
    process::run_async(psql).await;
}

/// What must be the same in a copy.
async fn digest(cluster: &Cluster, database: &str) -> String {
    let mut psql = cluster.tool("psql");
    psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c"]).arg(
        "SELECT md5(string_agg(o::text, ',' ORDER BY id)), count(*), app.count(), nextval('app.ids') > 30000,
                (SELECT tableowner FROM pg_tables WHERE tablename = 'orders'), lo_get(4711)
         FROM app.orders o",
    );
    process::run_async(psql).await
}

/// What belongs to the database itself.
async fn properties(cluster: &Cluster, database: &str) -> String {
    let query = format!(
        "SELECT concat_ws(' | ', pg_get_userbyid(datdba), datacl, shobj_description(oid, 'pg_database'),
                (SELECT string_agg(setrole::regrole::text || setconfig::text, ';' ORDER BY setrole)
                   FROM pg_db_role_setting WHERE setdatabase = d.oid))
         FROM pg_database d WHERE datname = '{database}'"
    );
    cluster.query(&query).await
}

async fn dumped_and_restored(major: u32, more: &str) -> (Cluster, Protected) {
    let cluster = Cluster::start_new(major).await;
    load(&cluster).await;
    let target = format!("source = \"dump\"\nconninfo = \"{}\"\nrpo = \"6h\"\n{more}", cluster.conninfo());
    let protected = Protected::new(&target, &[major]).await;
    (cluster, protected)
}

#[tokio::test]
async fn a_dump_comes_back_into_a_database_and_as_files() {
    let (cluster, protected) = dumped_and_restored(15, "").await;
    let checked = protected.json(&["check"]).await.to_string();
    assert!(
        checked.contains("dumps it's = odd, postgres, shop") && checked.contains("pg_dump (PostgreSQL) 15"),
        "{checked}"
    );
    let before = chrono::Utc::now();
    let backup = protected.json(&["backup", "kept"]).await;
    assert_eq!(backup["backup"]["kind"], "dump");
    let names: Vec<_> = backup["streams"].as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["it%27s%20%3D%20odd.dump", "postgres.dump", "shop.dump", "globals.sql"]);
    let (wanted, own) = (digest(&cluster, "shop").await, properties(&cluster, "shop").await);
    assert!(own.starts_with("app | {") && own.contains("od,d") && own.contains("it's"), "{own}");
    cluster.execute("DROP DATABASE shop").await;

    let plain = protected.drctl(&["restore", "kept", "--into-database", "shop"]).run().await.code(2);
    assert!(plain.stderr.contains("--from-database"), "{plain}");
    for (name, code, why) in [("", 2, "names no database"), ("template1", 5, "is a template")] {
        let line = ["restore", "kept", "--from-database", "shop", "--into-database", name];
        let refused = protected.drctl(&line).run().await.code(code);
        assert!(format!("{}{}", refused.stdout, refused.stderr).contains(why), "{refused}");
    }
    let options = ["--into-database", "shop", "--from-database", "shop"];
    let plan = protected.json(&[&["restore", "kept"], &options[..]].concat()).await;
    let point = plan["backup"]["recovery_point"].as_str().unwrap().parse::<chrono::DateTime<chrono::Utc>>().unwrap();
    assert!(point > before && point < chrono::Utc::now(), "{point}");
    assert_eq!(
        cluster.query("SELECT count(*) FROM pg_database WHERE datname = 'shop'").await,
        "0",
        "a plan touched it"
    );
    let report = protected.restore(&options, "-").await.ok().json();
    assert_eq!(report["destination"]["create"], true);
    assert_eq!(digest(&cluster, "shop").await, wanted);
    assert_eq!(properties(&cluster, "shop").await, own);

    // What is there is not written over, and what clashes is rolled back.
    let occupied = protected.drctl(&[&["restore", "kept"], &options[..]].concat()).run().await.code(5);
    assert!(occupied.stdout.contains("is not empty"), "{occupied}");
    let clash = protected.restore(&[&options[..], &["--into-nonempty"]].concat(), "-").await.code(1);
    assert!(clash.stdout.contains("already exists") && clash.stdout.contains("rolled back"), "{clash}");
    assert_eq!(digest(&cluster, "shop").await, wanted);

    // Half a dump leaves nothing.
    for region in ["region-a", "region-b"] {
        flip_largest_pack(&protected.region(region));
    }
    let options = ["--into-database", "other", "--from-database", "shop"];
    let failed = protected.restore(&options, "WARN").await.code(1);
    assert!(failed.stdout.contains("authenticate") && failed.stdout.contains("gone again"), "{failed}");
    assert_eq!(cluster.query("SELECT count(*) FROM pg_database WHERE datname = 'other'").await, "0");
    flip_largest_pack(&protected.region("region-a"));

    // Another server, with stock tools: roles first.
    let other = Cluster::start_new(15).await;
    let conninfo = other.conninfo();
    let options = ["--into-database", "shop", "--from-database", "shop", "--conninfo", &conninfo];
    let refused = protected.drctl(&[&["restore", "kept"], &options[..]].concat()).run().await.code(5);
    assert!(refused.stdout.contains("lacks roles: app"), "{refused}");
    let files = protected.scratch.join("files");
    protected.restore(&["--target-dir", files.to_str().unwrap()], "taken from another region").await.ok();
    crate::support::dirs::give_to_postgres(&files);
    fs::set_permissions(&files, fs::Permissions::from_mode(0o755)).unwrap();
    let mut globals = other.tool("psql");
    // The superuser is there already.
    globals.args(["-Xq", "-f"]).arg(files.join("globals.sql"));
    process::run_async(globals).await;
    other.execute("CREATE DATABASE shop").await;
    let mut restore = other.tool("pg_restore");
    restore.args(["--exit-on-error", "--dbname=shop"]).arg(files.join("shop.dump"));
    process::run_async(restore).await;
    assert_eq!(digest(&other, "shop").await, wanted);

    // A database that we may not connect to any more is not in the dump, which is told at once and to whoever restores.
    cluster.execute("CREATE ROLE dumper LOGIN; GRANT pg_read_all_data TO dumper").await;
    let path = protected.home().join("drctl.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("user=postgres"));
    fs::write(&path, text.replace("user=postgres", "user=dumper")).unwrap();
    let partial = protected.drctl(&["backup", "kept", "--json"]).run().await.code(4).json();
    let why = "database shop is not dumped: we may not connect to it";
    assert_eq!(partial["left_out"], serde_json::json!([why]), "{partial}");
    let options = ["--target-dir", files.to_str().unwrap(), "--json"];
    let plan = protected.drctl(&[&["restore", "kept"], &options[..]].concat()).run().await.stdout;
    assert!(plan.contains(&format!("left out of the backup: {why}")), "{plan}");
}

#[tokio::test]
async fn the_newest_major_is_dumped_with_its_own_programs_and_half_a_dump_is_no_backup() {
    let more = "databases = [\"shop\"]\nexclude_table_data = [\"app.nothing\"]\nlock_wait_timeout = \"1m\"\n";
    let (cluster, protected) = dumped_and_restored(18, more).await;
    protected.drctl(&["backup", "kept"]).run().await.ok();
    let wanted = digest(&cluster, "shop").await;
    protected.restore(&["--into-database", "copy"], "-").await.ok();
    assert_eq!(digest(&cluster, "copy").await, wanted);

    // pg_dump waits for a lock and is killed there.
    let holder = cluster.client_of("shop").await;
    holder.batch_execute("BEGIN; LOCK TABLE app.orders IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let backup = protected.drctl(&["backup", "kept"]).spawn();
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    process::eventually("pg_dump waits", Duration::from_secs(30), async || cluster.query(waiting).await == "1").await;
    // A drctl that is killed takes it along; its session would wait for the lock for ever.
    let left = process::children(backup.pid());
    backup.kill9();
    let is_gone = |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).map_or(true, |line| line.is_empty());
    process::eventually("pg_dump is gone", Duration::from_secs(30), async || left.iter().all(is_gone)).await;
    assert!(!left.is_empty());
    let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
    process::eventually("its session is over", Duration::from_secs(30), async || cluster.query(end).await == "0").await;
    let backup = protected.drctl(&["backup", "kept"]).spawn();
    process::eventually("pg_dump waits", Duration::from_secs(30), async || cluster.query(waiting).await == "1").await;
    process::children(backup.pid()).into_iter().for_each(|pid| process::signal(pid, rustix::process::Signal::KILL));
    let failed = backup.wait().await.code(1);
    assert!(failed.stderr.contains("pg_dump") && failed.stderr.contains("signal: 9"), "{failed}");
    drop(holder);
    let listed = protected.json(&["list"]).await;
    assert_eq!(listed["backups"].as_array().unwrap().len(), 1, "{listed}");
    let mut broken = fs::File::options().append(true).open(protected.home().join("drctl.toml")).unwrap();
    broken.write_all(b"tables = [\"no.such\"]\n").unwrap();
    let failed = protected.drctl(&["backup", "kept"]).run().await.code(1);
    assert!(failed.stderr.contains("no matching tables were found"), "{failed}");
    assert!(size_of(&protected.region("region-a").join("commits")) > 0);
}

#[tokio::test]
async fn a_dump_of_a_standby_promises_what_was_replayed() {
    let (primary, place) = (Cluster::start_new(16).await, Scratch::new());
    primary.execute("CREATE TABLE t AS SELECT 1 n").await;
    let data = place.postgres_dir("standby");
    let mut basebackup = primary.tool("pg_basebackup");
    basebackup.arg("-D").arg(&data).args(["-R", "-c", "fast"]);
    process::run_async(basebackup).await;
    let standby = Cluster::try_start_restored(&data, 16, &[], Until::Ready).await.unwrap();
    let target = format!("source = \"dump\"\nconninfo = \"{}\"\nrpo = \"6h\"\n", standby.conninfo());
    let protected = Protected::new(&target, &[16]).await;
    primary.execute("INSERT INTO t VALUES (2)").await;
    let rows = "SELECT count(*) FROM t";
    process::eventually("it is replayed", Duration::from_secs(30), async || standby.query(rows).await == "2").await;
    standby.execute("SELECT pg_wal_replay_pause()").await;
    primary.execute("INSERT INTO t VALUES (3)").await;
    let replayed = standby.query("SELECT to_json(pg_last_xact_replay_timestamp())#>>'{}'").await;
    let replayed = chrono::DateTime::parse_from_rfc3339(&replayed).unwrap();
    let backup = protected.json(&["backup", "kept"]).await;
    let began = chrono::DateTime::parse_from_rfc3339(backup["backup"]["started_at"].as_str().unwrap()).unwrap();
    assert!(began <= replayed, "{began} is promised, and {replayed} is there");
    protected.restore(&["--into-database", "copy", "--conninfo", &primary.conninfo()], "-").await.ok();
    let copied = primary.client_of("copy").await.query_one(rows, &[]).await.unwrap();
    assert_eq!(copied.get::<_, i64>(0), 2);
}
