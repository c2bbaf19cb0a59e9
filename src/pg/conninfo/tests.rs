use super::*;

fn parse(text: &str) -> Result<ConnInfo, PgError> {
    ConnInfo::parse(text, &|_| None)
}

fn mode(text: &str) -> SslMode {
    let info = parse(text).unwrap();
    info.ssl_mode(&info.servers()[0])
}

#[test]
fn a_uri_and_its_keywords_are_the_same_settings() {
    let uri =
        "postgresql://u:p@a:1,b/db?sslmode=verify-ca&application_name=x&connect_timeout=3&target_session_attrs=standby";
    let words = "host=a,b port=1,5432 user=u password=p dbname=db sslmode=verify-ca application_name=x connect_timeout=3 target_session_attrs=standby";
    assert_eq!(parse(uri).unwrap(), parse(words).unwrap());
    assert_eq!(parse(uri).unwrap().to_string(), "postgresql://u@a:1,b:5432/db");
}

#[test]
fn tls_is_verified_unless_the_bytes_stay_on_this_machine() {
    assert_eq!(mode("host=db.example.org user=u"), SslMode::VerifyFull);
    assert_eq!(mode("host=10.0.0.1 user=u"), SslMode::VerifyFull);
    for host in ["localhost", "127.0.0.1", "127.8.8.8", "::1", "/tmp"] {
        assert_eq!(mode(&format!("host={host} user=u")), SslMode::Disable, "{host}");
    }
    assert_eq!(mode("host=localhost user=u sslmode=require"), SslMode::Require);
    assert_eq!(mode("host=/tmp user=u sslmode=verify-full"), SslMode::Disable);
    assert!(parse("host=a user=u sslmode=prefer").is_err());
}

#[test]
fn the_password_is_never_shown() {
    let info = parse("postgresql://u:hunter2@h/db").unwrap();
    assert!(!format!("{info:?} {info}").contains("hunter2"));
    assert_eq!(info.password(&info.servers()[0], "db").unwrap().unwrap().as_str(), "hunter2");
}

#[test]
fn passwords_come_from_settings_then_environment() {
    let environment = |name: &str| (name == "PGPASSWORD").then(|| "env".to_owned());
    let word = |text| {
        let info = ConnInfo::parse(text, &environment).unwrap();
        info.password(&info.servers()[0], "db").unwrap().unwrap().to_string()
    };
    assert_eq!(word("host=h user=u password=own"), "own");
    assert_eq!(word("host=h user=u"), "env");
}

#[test]
fn unknown_keywords_name_the_nearest() {
    let text = |settings: &str| parse(settings).unwrap_err().to_string();
    assert_eq!(
        text("host=h user=u ssl_mode=require"),
        "unknown connection keyword `ssl_mode`; the nearest known one is `sslmode`"
    );
    assert!(!text("host=h user=u HunTer2=x").contains("HunTer2"));
}

#[test]
fn what_is_missing_or_odd_is_an_error() {
    for text in [
        "",
        "user=u",
        "host=h",
        "host=a,,b user=u",
        "host=a,b port=1,2,3 user=u",
        "host=a port=0 user=u",
        "host=a port=65536 user=u",
        "host=a user=u connect_timeout=soon",
        "host=a user=u sslcert=/x",
        "host=a user=u target_session_attrs=master",
    ] {
        assert!(matches!(parse(text), Err(PgError::Config(_))), "{text}");
    }
}

#[test]
fn prefer_standby_is_two_passes() {
    let info = parse("host=h user=u target_session_attrs=prefer-standby").unwrap();
    assert_eq!(info.passes(), [TargetSessionAttrs::Standby, TargetSessionAttrs::Any]);
    let standby = SessionRole { in_recovery: true, read_only: true };
    assert!(TargetSessionAttrs::Standby.accepts(standby) && TargetSessionAttrs::ReadOnly.accepts(standby));
    assert!(!TargetSessionAttrs::Primary.accepts(standby) && !TargetSessionAttrs::ReadWrite.accepts(standby));
}
