use super::*;

#[test]
fn a_stream_is_named_after_its_database_and_is_a_plain_file_name() {
    for (database, stream) in [
        ("app", "app.dump"),
        ("My App", "My%20App.dump"),
        ("../x", "%2E.%2Fx.dump"),
        ("a/b", "a%2Fb.dump"),
        (".hidden", "%2Ehidden.dump"),
        ("ü%", "%C3%BC%25.dump"),
    ] {
        assert_eq!(stream_name(database), stream);
    }
    assert_eq!(as_conninfo("it's \\ a=b"), "dbname='it\\'s \\\\ a=b'");
}

#[test]
fn what_is_dumped_goes_to_pg_dump_as_one_argument_each() {
    let scope = Scope {
        schemas: vec!["app".into()],
        exclude_table_data: vec!["app.log_*".into(), "--file=/etc/passwd".into()],
        ..Scope::default()
    };
    let arguments: Vec<_> = scope.arguments().collect();
    assert_eq!(
        arguments,
        ["--strict-names", "--schema=app", "--exclude-table-data=app.log_*", "--exclude-table-data=--file=/etc/passwd"]
    );
}
