//! From a host name to an authenticated walsender: socket, TLS, startup packet, authentication.

use std::time::Duration;

use bytes::BytesMut;
use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::backend::{AuthenticationSaslBody, Message};
use postgres_protocol::message::frontend;
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use zeroize::Zeroizing;

use crate::pg::PgError;
use crate::pg::conninfo::{ConnInfo, Host, Server};
use crate::pg::replication::wire::{Duplex, Wire, malformed, server_error, unexpected};
use crate::pg::tls::{Tls, handshake_reason};

/// Physical replication has no database; password files call it this.
const PASSFILE_DATABASE: &str = "replication";

/// A stream to the server, and what TLS says about it.
struct Channel {
    io: Box<dyn Duplex>,
    encrypted: bool,
    end_point: Option<Vec<u8>>,
}

/// An authenticated connection on which the server has not yet said that it is ready.
pub(super) async fn authenticate(info: &ConnInfo, server: &Server) -> Result<Wire, PgError> {
    let tls = Tls::new(info, server)?;
    let password = info.password(server, PASSFILE_DATABASE)?;
    let channel = open(server, tls).await?;
    let mut wire = Wire::new(channel.io);
    let mut parameters = vec![
        ("user", info.user()),
        ("replication", "true"),
        ("client_encoding", "UTF8"),
        ("application_name", &info.application_name),
    ];
    if let Some(options) = &info.options {
        parameters.push(("options", options));
    }
    frontend::startup_message(parameters, &mut wire.output).map_err(|error| PgError::Config(error.to_string()))?;
    let (user, encrypted, end_point) = (info.user(), channel.encrypted, channel.end_point);
    Login { wire: &mut wire, user, password, encrypted, end_point }.run().await?;
    wire.authenticated();
    Ok(wire)
}

async fn open(server: &Server, tls: Option<Tls>) -> Result<Channel, PgError> {
    let unreachable =
        |error: std::io::Error| PgError::Connect { server: server.to_string(), reason: error.to_string() };
    match &server.host {
        Host::Unix(directory) => {
            let path = directory.join(format!(".s.PGSQL.{}", server.port));
            let io = UnixStream::connect(path).await.map_err(unreachable)?;
            Ok(Channel { io: Box::new(io), encrypted: false, end_point: None })
        }
        Host::Tcp(name) => {
            let io = TcpStream::connect((name.as_str(), server.port)).await.map_err(unreachable)?;
            watch(&io).map_err(unreachable)?;
            match tls {
                None => Ok(Channel { io: Box::new(io), encrypted: false, end_point: None }),
                Some(tls) => encrypt(server, name, io, &tls).await,
            }
        }
    }
}

/// A base backup may wait long for its first byte; without keepalive a vanished server would be waited for for ever.
fn watch(io: &TcpStream) -> std::io::Result<()> {
    io.set_nodelay(true)?;
    sockopt::set_socket_keepalive(io, true)?;
    sockopt::set_tcp_keepidle(io, Duration::from_secs(30))?;
    sockopt::set_tcp_keepintvl(io, Duration::from_secs(10))?;
    sockopt::set_tcp_keepcnt(io, 3)?;
    Ok(())
}

async fn encrypt(server: &Server, host: &str, mut io: TcpStream, tls: &Tls) -> Result<Channel, PgError> {
    let no_tls = |reason: String| PgError::Tls { server: server.to_string(), reason };
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    let asked = async {
        io.write_all(&request).await?;
        // One byte more than the answer: whatever follows `S` in clear text was put there by somebody in between
        // (CVE-2021-23222), for a server waits for the handshake.
        let mut answer = [0; 2];
        let length = io.read(&mut answer).await?;
        Ok((answer, length))
    };
    let (answer, length) = asked.await.map_err(|error: std::io::Error| PgError::from_read(&error))?;
    match answer.get(..length) {
        Some([b'S']) => {}
        Some([b'S', ..]) => return Err(no_tls("clear text follows the server's consent to TLS".to_owned())),
        Some([b'N', ..]) => return Err(no_tls("the server does not offer it".to_owned())),
        Some([]) => return Err(PgError::Closed("by the server, when asked for TLS".to_owned())),
        // A server out of resources answers with an error in clear text; nothing of it can be trusted.
        _ => return Err(no_tls("the server answers neither yes nor no".to_owned())),
    }
    let stream = tls.handshake(host, io).await.map_err(|error| no_tls(handshake_reason(&error)))?;
    let end_point = stream.server_end_point();
    Ok(Channel { io: Box::new(stream), encrypted: true, end_point })
}

/// The exchange from the startup packet to `AuthenticationOk`.
struct Login<'a> {
    wire: &'a mut Wire,
    user: &'a str,
    password: Option<Zeroizing<String>>,
    encrypted: bool,
    end_point: Option<Vec<u8>>,
}

impl Login<'_> {
    async fn run(mut self) -> Result<(), PgError> {
        match self.next().await? {
            Message::AuthenticationOk => return Ok(()),
            Message::AuthenticationCleartextPassword if !self.encrypted => {
                return Err(auth("the server wants the password in clear text and there is no TLS"));
            }
            Message::AuthenticationCleartextPassword => {
                let password = self.password()?;
                self.send(|out| frontend::password_message(password.as_bytes(), out))?;
            }
            Message::AuthenticationMd5Password(body) => {
                let hash = md5_hash(self.user.as_bytes(), self.password()?.as_bytes(), body.salt());
                self.send(|out| frontend::password_message(hash.as_bytes(), out))?;
            }
            Message::AuthenticationSasl(body) => self.scram(&body).await?,
            _ => return Err(auth("the server wants a method that drctl does not have (GSSAPI, SSPI, …)")),
        }
        match self.next().await? {
            Message::AuthenticationOk => Ok(()),
            _ => Err(auth("the server asks again after the password")),
        }
    }

    /// Ends only after the server has proven that it knows the password too.
    async fn scram(&mut self, body: &AuthenticationSaslBody) -> Result<(), PgError> {
        let offered: Vec<&str> = body.mechanisms().collect().map_err(|error| malformed(&error))?;
        let (mechanism, binding) = match self.end_point.take() {
            Some(hash) if offered.contains(&SCRAM_SHA_256_PLUS) => {
                (SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(hash))
            }
            // "Could have bound": if the server offered it after all, somebody in between removed it from the list and
            // the server will see that.
            Some(_) => (SCRAM_SHA_256, ChannelBinding::unrequested()),
            None => (SCRAM_SHA_256, ChannelBinding::unsupported()),
        };
        if !offered.contains(&mechanism) {
            return Err(auth("the server offers no SCRAM-SHA-256"));
        }
        let mut scram = ScramSha256::new(self.password()?.as_bytes(), binding);
        self.send(|out| frontend::sasl_initial_response(mechanism, scram.message(), out))?;
        let Message::AuthenticationSaslContinue(body) = self.next().await? else {
            return Err(auth("the server breaks off SCRAM"));
        };
        scram.update(body.data()).map_err(|error| auth(&error.to_string()))?;
        self.send(|out| frontend::sasl_response(scram.message(), out))?;
        let Message::AuthenticationSaslFinal(body) = self.next().await? else {
            return Err(auth("the server does not prove that it knows the password"));
        };
        scram.finish(body.data()).map_err(|error| auth(&error.to_string()))
    }

    fn password(&self) -> Result<Zeroizing<String>, PgError> {
        self.password.clone().ok_or_else(|| auth("the server wants a password and none is configured"))
    }

    fn send(&mut self, write: impl FnOnce(&mut BytesMut) -> std::io::Result<()>) -> Result<(), PgError> {
        write(&mut self.wire.output).map_err(|error| PgError::Config(error.to_string()))
    }

    async fn next(&mut self) -> Result<Message, PgError> {
        loop {
            match self.wire.message().await? {
                Message::ErrorResponse(body) => return Err(server_error(body.fields())),
                Message::NoticeResponse(_) => {}
                message @ (Message::AuthenticationOk
                | Message::AuthenticationCleartextPassword
                | Message::AuthenticationMd5Password(_)
                | Message::AuthenticationSasl(_)
                | Message::AuthenticationSaslContinue(_)
                | Message::AuthenticationSaslFinal(_)
                | Message::AuthenticationGss
                | Message::AuthenticationGssContinue(_)
                | Message::AuthenticationKerberosV5
                | Message::AuthenticationScmCredential
                | Message::AuthenticationSspi) => return Ok(message),
                other => return Err(unexpected(&other, "authentication")),
            }
        }
    }
}

fn auth(reason: &str) -> PgError {
    PgError::Auth(reason.to_owned())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// What the client says to a server that answers each of its messages with the next of `answers`.
    async fn against(settings: &str, answers: &[&[u8]]) -> PgError {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let text = format!("host=127.0.0.1 port={port} user=u password=p connect_timeout=5 {settings}");
        let info = ConnInfo::parse(&text, &|_| None).unwrap();
        let server = async {
            let (mut io, _) = listener.accept().await.unwrap();
            for answer in answers {
                let mut request = [0; 4096];
                assert!(io.read(&mut request).await.unwrap() > 0);
                io.write_all(answer).await.unwrap();
            }
            io
        };
        let (outcome, _io) = tokio::join!(authenticate(&info, &info.servers()[0]), server);
        outcome.err().unwrap()
    }

    #[tokio::test]
    async fn nothing_in_clear_text_is_believed_where_tls_was_asked_for() {
        for answer in [&b"SR\0\0\0\x08\0\0\0\0"[..], b"N", b"E\0\0\0\x05\0"] {
            let error = against("sslmode=require", &[answer]).await;
            assert!(matches!(error, PgError::Tls { .. }), "{answer:?}: {error:?}");
        }
    }

    #[tokio::test]
    async fn a_server_that_does_not_know_the_password_is_not_let_in() {
        let offer = b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0";
        let welcome = b"R\0\0\0\x08\0\0\0\0";
        assert!(matches!(against("", &[offer, welcome]).await, PgError::Auth(_)));
        let foreign_nonce = b"R\0\0\0\x19\0\0\0\x0br=x,s=YWJj,i=4096";
        assert!(matches!(against("", &[offer, foreign_nonce]).await, PgError::Auth(_)));
        let clear = b"R\0\0\0\x08\0\0\0\x03";
        assert!(matches!(against("", &[clear]).await, PgError::Auth(_)));
    }

    #[tokio::test]
    async fn a_huge_message_before_authentication_is_refused() {
        let error = against("", &[b"E\0\x10\0\0"]).await;
        assert!(matches!(error, PgError::Protocol(_)), "{error:?}");
    }
}
