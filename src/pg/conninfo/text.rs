//! The two spellings of libpq: `postgresql://…` and `key=value …`, both read into pairs.
//!
//! No error here repeats the text that was read: it may hold a password.

use crate::pg::PgError;

type Pairs = Vec<(String, String)>;

/// Reads either spelling; later pairs win over earlier ones.
pub(super) fn pairs(text: &str) -> Result<Pairs, PgError> {
    match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
        Some(rest) => uri(rest),
        None => key_values(text),
    }
}

fn wrong(what: &str) -> PgError {
    PgError::Config(format!("connection settings: {what}"))
}

fn uri(rest: &str) -> Result<Pairs, PgError> {
    let mut pairs = Pairs::new();
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, dbname) = rest.split_once('/').unwrap_or((rest, ""));
    let hosts = match authority.split_once('@') {
        Some((user, hosts)) => {
            let (user, password) = user.split_once(':').map_or((user, None), |(user, word)| (user, Some(word)));
            push_decoded(&mut pairs, "user", user)?;
            if let Some(password) = password {
                push_decoded(&mut pairs, "password", password)?;
            }
            hosts
        }
        None => authority,
    };
    uri_hosts(hosts, &mut pairs)?;
    push_decoded(&mut pairs, "dbname", dbname)?;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (key, value) =
            parameter.split_once('=').ok_or_else(|| wrong("a parameter after `?` has no `=`, or a `?` is not %3F"))?;
        pairs.push((decode(key)?, decode(value)?));
    }
    Ok(pairs)
}

fn push_decoded(pairs: &mut Pairs, key: &str, value: &str) -> Result<(), PgError> {
    if !value.is_empty() {
        pairs.push((key.to_owned(), decode(value)?));
    }
    Ok(())
}

/// `a:1,[::1]:2,c` becomes two parallel lists, as the keywords `host` and `port` have them.
fn uri_hosts(text: &str, pairs: &mut Pairs) -> Result<(), PgError> {
    if text.is_empty() {
        return Ok(());
    }
    let (mut hosts, mut ports) = (Vec::new(), Vec::new());
    for entry in text.split(',') {
        let (host, port) = match entry.strip_prefix('[') {
            Some(rest) => {
                let (host, tail) = rest.split_once(']').ok_or_else(|| wrong("an IPv6 address lacks its `]`"))?;
                let port = tail.strip_prefix(':').or_else(|| tail.is_empty().then_some(""));
                (host, port.ok_or_else(|| wrong("only `:port` may follow an IPv6 address"))?)
            }
            None => entry.split_once(':').unwrap_or((entry, "")),
        };
        hosts.push(decode(host)?);
        ports.push(decode(port)?);
    }
    if hosts.iter().any(|host| !host.is_empty()) {
        pairs.push(("host".to_owned(), hosts.join(",")));
    }
    if ports.iter().any(|port| !port.is_empty()) {
        pairs.push(("port".to_owned(), ports.join(",")));
    }
    Ok(())
}

fn decode(text: &str) -> Result<String, PgError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        let code = digit().zip(digit()).map(|(high, low)| high * 16 + low).and_then(|code| u8::try_from(code).ok());
        match code {
            Some(code) if code != 0 => bytes.push(code),
            _ => return Err(wrong("a `%` is not followed by two hex digits (write %25 for the sign itself)")),
        }
    }
    String::from_utf8(bytes).map_err(|_| wrong("a percent-encoded part is not UTF-8"))
}

fn key_values(text: &str) -> Result<Pairs, PgError> {
    let mut pairs = Pairs::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (key, tail) = rest.split_once('=').ok_or_else(|| wrong("a keyword has no `=`"))?;
        let key = key.trim_end();
        if key.is_empty() || key.contains(char::is_whitespace) {
            return Err(wrong("a keyword has no `=`"));
        }
        let (value, tail) = value(tail.trim_start())?;
        pairs.push((key.to_owned(), value));
        rest = tail.trim_start();
    }
    Ok(pairs)
}

/// One value and what follows it: quoted by `'…'` or up to white space; `\` takes the next character as it is.
fn value(text: &str) -> Result<(String, &str), PgError> {
    let (quoted, body) = text.strip_prefix('\'').map_or((false, text), |body| (true, body));
    let mut value = String::new();
    let mut characters = body.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => match characters.next() {
                Some((_, escaped)) => value.push(escaped),
                None => return Err(wrong("a value ends in `\\`")),
            },
            '\'' if quoted => return Ok((value, body.get(at + 1..).unwrap_or(""))),
            space if space.is_whitespace() && !quoted => return Ok((value, body.get(at..).unwrap_or(""))),
            other => value.push(other),
        }
    }
    if quoted { Err(wrong("a quoted value has no end")) } else { Ok((value, "")) }
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert_eq, proptest};

    use super::*;

    fn read(text: &str) -> Vec<(String, String)> {
        pairs(text).unwrap()
    }

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn both_spellings_are_read() {
        let expected = [pair("user", "u"), pair("password", "p@/:"), pair("host", "a,::1,c"), pair("port", "1,2,")];
        let mut from_uri = read("postgresql://u:p%40%2F%3A@a:1,[::1]:2,c/db?sslmode=require");
        assert_eq!(from_uri.drain(..4).collect::<Vec<_>>(), expected);
        assert_eq!(from_uri, [pair("dbname", "db"), pair("sslmode", "require")]);
        assert_eq!(
            read(r"host=/tmp  user = 'o\'brien \\' password=a\ b dbname=''"),
            [pair("host", "/tmp"), pair("user", r"o'brien \"), pair("password", "a b"), pair("dbname", "")]
        );
        assert_eq!(read("postgres:///db?host=%2Frun%2Fpg"), [pair("dbname", "db"), pair("host", "/run/pg")]);
        assert_eq!(read("postgres://%2Frun%2Fpg:5433"), [pair("host", "/run/pg"), pair("port", "5433")]);
    }

    #[test]
    fn broken_text_is_an_error_that_keeps_the_secret() {
        for text in [
            "postgresql://u:hunter2@[::1",
            "postgresql://u:hunter2%zz@h",
            "postgresql://u:hunter2%00@h",
            "password='hunter2",
            "password=hunter2\\",
            "hunter2",
            "=hunter2",
            "a hunter2=1",
            "postgresql://h?hunter2",
        ] {
            let error = pairs(text).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_quoted_value_reads_back(value in "[^\0]{0,20}") {
            let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
            prop_assert_eq!(read(&format!("user='{quoted}' host=h")), [pair("user", &value), pair("host", "h")]);
        }

        #[test]
        fn no_text_panics(text in ".{0,40}") {
            let _ = pairs(&text);
            let _ = pairs(&format!("postgresql://{text}"));
        }
    }
}
