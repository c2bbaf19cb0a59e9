//! A folder as a person leaves it.

use std::collections::BTreeSet;

use super::*;
use crate::config::parse;
use crate::model::schedule::{CatchUp, Depth, Overlap, Pick, Work};

const SETTINGS: &str = "[regions.us-east-1]\nurl = \"a\"\n[targets.ledger]\nsource = \"postgres\"\nconninfo = \"host=a\"\n\
     [targets.app]\nsource = \"dump\"\nconninfo = \"host=a\"\n[targets.etc]\nsource = \"files\"\nroots = [\"/etc\"]\n";

fn settings(dir: &Path) -> Settings {
    let mut settings = parse(SETTINGS, "drctl.toml", Path::new("/etc/drctl")).unwrap();
    settings.schedules.dir = dir.to_owned();
    settings
}

/// The folder with these files, read.
fn read(files: &[(&str, &str)]) -> Result<Vec<Schedule>, Vec<String>> {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::io::Write::write_all(&mut std::fs::File::create(dir.path().join(name)).unwrap(), text.as_bytes()).unwrap();
    }
    let told = |mistake: &Mistake| {
        let file = mistake.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let hint = mistake.hint.as_ref().map(|hint| format!(" / {hint}")).unwrap_or_default();
        format!("{file}:{}:{}: {}{hint}", mistake.line.unwrap_or(0), mistake.column.unwrap_or(0), mistake.what)
    };
    load_schedules(&settings(dir.path())).map_err(|mistakes| mistakes.list.iter().map(told).collect())
}

const BASE: &str = "job = \"backup\"\ntarget = \"ledger\"\ncron = \"0 1 * * *\"\n";

#[test]
fn a_file_is_a_schedule_and_gets_every_default() {
    let files = [("ledger-base.toml", BASE), (".hidden.toml", "junk"), ("notes.txt", "junk")];
    let schedules = read(&files).unwrap();
    let [base] = schedules.as_slice() else { panic!("{schedules:?}") };
    assert_eq!((base.name.as_str(), base.enabled, base.timezone), ("ledger-base", true, chrono_tz::Tz::UTC));
    assert_eq!((base.catch_up, base.overlap, base.retry.max), (CatchUp::One, Overlap::Skip, 0));
    assert_eq!(base.work, Work::Backup { target: "ledger".parse().unwrap(), fast: false, verify_detection: false });
    assert_eq!(base.timeout.as_secs(), 24 * 3600);
}

#[test]
fn a_drill_takes_the_newest_point_unless_told_otherwise() {
    let base = "job = \"drill\"\ntarget = \"ledger\"\ncron = \"0 5 * * sat\"\n";
    let drill = |text: &str| read(&[("ledger-drill.toml", &format!("{base}{text}"))]).map(|list| list[0].work.clone());
    let work = |select| Work::Drill { target: "ledger".parse().unwrap(), region: None, select };
    assert_eq!(drill("").unwrap(), work(Pick::Latest));
    assert_eq!(drill("params = { select = \"random\" }\n").unwrap(), work(Pick::Random));
    assert!(drill("params = { select = \"newest\" }\n").unwrap_err()[0].contains("select"));
}

#[test]
fn every_key_says_what_it_means() {
    let text = "description = \"d\"\nenabled = false\njob = \"verify\"\ntarget = \"ledger\"\ncron = \"@daily\"\n\
                timezone = \"Europe/Berlin\"\njitter = \"5m\"\ncatch_up = \"none\"\noverlap = \"queue-one\"\n\
                timeout = \"2h\"\nretry = { max = 3, pause = \"30s\" }\nafter = \"ledger-base\"\nmax_age = \"2d\"\n\
                [params]\nlevel = \"l2\"\nscrub = true\nregion = \"us-east-1\"\n";
    let schedules = read(&[("ledger-base.toml", BASE), ("ledger-verify.toml", text)]).unwrap();
    let verify = &schedules[1];
    let region = Some("us-east-1".parse().unwrap());
    let target = Some("ledger".parse().unwrap());
    assert_eq!(verify.work, Work::Verify { target, level: Depth::L2, scrub: true, region });
    assert_eq!((verify.enabled, verify.slots_after(chrono::DateTime::UNIX_EPOCH).next()), (false, None));
    assert_eq!((verify.catch_up, verify.overlap, verify.retry.max), (CatchUp::None, Overlap::QueueOne, 3));
    assert_eq!((verify.retry.pause.as_secs(), verify.jitter.as_secs(), verify.timeout.as_secs()), (30, 300, 7200));
    assert_eq!(verify.after.as_ref().unwrap().as_str(), "ledger-base");
}

#[test]
fn every_mistake_of_every_file_is_told_at_once_with_its_place() {
    let broken = "job = \"bakup\"\ntarget = \"leger\"\n  cron = \"61 1 * * *\"\ntimezone = \"Europe/Berln\"\ncatchup = \"one\"\n\
                  timeout = \"0s\"\njitter = 5\nretry = { max = 99, paus = \"1m\" }\n";
    let more = "cron = \"0 1 * * *\"\njob = \"compact\"\noverlap = \"wait\"\nafter = \"ledger-bas\"\n";
    let told = read(&[
        ("a.toml", broken),
        ("b.toml", more),
        ("c.toml", "job = \"wal\"\ncron = \"@hourly\"\n"),
        ("d.toml", "job = \"backup\"\nparams = { fast = 1, level = \"l1\" }\n"),
        ("e.toml", "job = \n"),
        ("Bad.toml", BASE),
        ("ledger-base.toml", BASE),
    ])
    .unwrap_err();
    let expected = [
        "Bad.toml:0:0: the file names its schedule: `Bad` is not a schedule name / use a-z",
        "a.toml:1:7: `job`: there is no job `bakup` / did you mean `backup`?",
        "a.toml:2:10: `target`: there is no target `leger` in the configuration / did you mean `ledger`?",
        "a.toml:3:10: `cron`: `61` is not a minute / write 0 to 59",
        "a.toml:4:12: `timezone`: there is no time zone `Europe/Berln` / did you mean `Europe/Berlin`?",
        "a.toml:5:1: unknown key `catchup` / did you mean `catch_up`?",
        "a.toml:6:11: `timeout`: it must be longer than 0s",
        "a.toml:7:10: `jitter`: expected a string in quotes, found 5",
        "a.toml:8:17: `max`: expected a whole number from 0 to 20, found 99",
        "a.toml:8:21: unknown key `paus` / did you mean `pause`?",
        "b.toml:1:1: `target` is missing: a compaction has one",
        "b.toml:3:11: `overlap`: `wait` is not one of its values / use skip or queue-one",
        "b.toml:4:9: `after`: there is no schedule `ledger-bas` / did you mean `ledger-base`?",
        "c.toml:1:7: `job`: WAL has no schedule / the daemon streams",
        "d.toml:1:1: `cron` is missing: every schedule has one",
        "d.toml:1:1: `target` is missing: a backup has one",
        "d.toml:2:19: `fast`: expected true or false, found 1",
        "d.toml:2:22: unknown key `level` / known keys: fast, verify_detection",
        "e.toml:1:",
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, expected) in told.iter().zip(expected) {
        assert!(told.starts_with(expected), "{told}\n{expected}");
    }
}

#[test]
fn a_job_is_of_the_kind_of_its_target() {
    let schedule = |job: &str, target: &str| {
        read(&[("a.toml", &format!("job = \"{job}\"\ntarget = \"{target}\"\ncron = \"@daily\"\n"))])
    };
    for (job, target) in [("backup", "ledger"), ("dump", "app"), ("files", "etc"), ("verify", "etc"), ("repair", "app")]
    {
        assert_eq!(schedule(job, target).unwrap()[0].work.target().unwrap().as_str(), target, "{job}");
    }
    for (job, target, right) in
        [("backup", "app", "dump"), ("drill", "etc", "files"), ("dump", "ledger", "backup"), ("files", "app", "dump")]
    {
        let told = schedule(job, target).unwrap_err();
        assert!(
            told.len() == 1 && told[0].starts_with("a.toml:2:10: `target`: ") && told[0].contains(right),
            "{told:?}"
        );
    }
    assert!(read(&[("a.toml", "job = \"dump\"\ncron = \"@daily\"\n")]).unwrap_err()[0].contains("`target` is missing"));
}

#[test]
fn after_ends_somewhere() {
    let after = |name: &str| format!("{BASE}after = \"{name}\"\n");
    let (a, b, c) = (after("b"), after("c"), after("a"));
    let told = read(&[("a.toml", &a), ("b.toml", &b), ("c.toml", &c), ("d.toml", &after("a"))]).unwrap_err();
    assert_eq!(told, ["a.toml:4:9: `after` goes in a circle: a → b → c → a / one of them must begin"]);
    let told = read(&[("a.toml", &after("a"))]).unwrap_err();
    assert_eq!(told, ["a.toml:4:9: `after` goes in a circle: a → a / one of them must begin"]);
    read(&[("a.toml", &a), ("b.toml", &b), ("c.toml", BASE)]).unwrap();
}

#[test]
fn a_jitter_or_an_age_that_cannot_be_meant_is_refused() {
    let told =
        |more: &str| read(&[("a.toml", &format!("job = \"repair\"\ncron = \"*/10 8 * * *\"\n{more}"))]).unwrap_err();
    assert_eq!(
        told("jitter = \"10m\"\n"),
        ["a.toml:3:10: `jitter` reaches the next slot: slots are only 10 min apart"]
    );
    assert!(told("max_age = \"9m\"\n")[0].contains("`max_age` is over before the next slot comes"));
    read(&[("a.toml", "job = \"repair\"\ncron = \"*/10 8 * * *\"\njitter = \"9m\"\nmax_age = \"2d\"\n")]).unwrap();
}

#[test]
fn a_folder_that_is_not_there_is_one_mistake() {
    let mistakes = load_schedules(&settings(Path::new("/nonexistent"))).unwrap_err();
    let error = Error::from(mistakes);
    assert_eq!(error.kind().exit_code(), 2);
    assert!(error.to_string().contains("/nonexistent: the folder cannot be read"), "{error}");
}

#[test]
fn a_file_that_waits_for_a_writer_is_a_mistake_and_no_wait() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("f.toml");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let mistakes = load_schedules(&settings(dir.path())).unwrap_err();
    assert!(mistakes.list[0].to_string().contains("not a regular file"), "{mistakes:?}");
}

#[test]
fn the_shipped_examples_are_good() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("schedules");
    let schedules = load_schedules(&settings(&dir)).unwrap_or_else(|mistakes| panic!("{mistakes:#?}"));
    let jobs: BTreeSet<_> = schedules.iter().map(|schedule| schedule.work.job().as_str()).collect();
    assert_eq!(jobs, BTreeSet::from(["backup", "bundle", "drill", "dump", "files", "prune", "repair", "verify"]));
    assert!(schedules.iter().all(|schedule| schedule.enabled && schedule.description.is_some()));
}

#[test]
fn the_documentation_describes_every_key_and_its_example_is_good() {
    let document = include_str!("../../../docs/schedules.md");
    let example = document.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    read(&[("ledger-base.toml", example)]).unwrap();
    let rows = document.lines().skip_while(|line| !line.starts_with("| key")).take_while(|line| line.starts_with('|'));
    let described: BTreeSet<_> = rows.filter_map(|row| row.strip_prefix("| `")?.split('`').next()).collect();
    let told = read(&[("a.toml", &format!("{BASE}qqqqqqqqqqqqqqqqqqqq = 1\n"))]).unwrap_err();
    let known = told[0].split("known keys: ").nth(1).unwrap();
    assert_eq!(known.split(", ").collect::<BTreeSet<_>>(), described);
}
