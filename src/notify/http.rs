//! HTTP to the outside: hyper on a connection of its own for each request, because there is one a minute at most; TLS by
//! rustls on aws-lc-rs with the authorities of this machine; no redirects, no proxies.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::notify::NotifyError;
use crate::observe::task;

/// The longest that one request may take, its answer included.
const LIMIT: Duration = Duration::from_secs(10);
/// More of an answer is not read.
const ANSWER_LIMIT: usize = 64 * 1024;
/// Characters of an answer that are told.
const TOLD: usize = 200;

/// Where requests go. It may hold a secret in its path, and shows its host alone.
#[derive(Clone, PartialEq, Eq)]
pub struct Address(Uri);

impl Address {
    /// Reads a URL.
    ///
    /// # Errors
    /// It is no URL of HTTP. The error does not repeat it.
    pub fn parse(text: &str) -> Result<Self, NotifyError> {
        let wrong =
            || NotifyError::Invalid { reason: "the address is not a URL that begins with http:// or https://".into() };
        let uri: Uri = text.parse().map_err(|_| wrong())?;
        let fits = matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some();
        if fits { Ok(Self(uri)) } else { Err(wrong()) }
    }

    /// The same with `path` behind its own.
    ///
    /// # Errors
    /// The sum is no URL.
    pub fn join(&self, path: &str) -> Result<Self, NotifyError> {
        Self::parse(&format!("{}{path}", self.0.to_string().trim_end_matches('/')))
    }

    /// Scheme, host and port.
    pub fn host(&self) -> String {
        let authority = self.0.authority().map(|authority| authority.as_str()).unwrap_or_default();
        // Whatever stands before the @ is a password.
        let host = authority.rsplit('@').next().unwrap_or_default();
        format!("{}://{host}", self.0.scheme_str().unwrap_or("http"))
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/…", self.host())
    }
}

/// The client.
#[derive(Clone)]
pub struct Client {
    tls: TlsConnector,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// A client that trusts whom this machine trusts.
    ///
    /// # Errors
    /// TLS cannot be had.
    pub fn new() -> Result<Self, NotifyError> {
        let mut roots = RootCertStore::empty();
        // A machine without authorities can still speak to a receiver beside it.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.map_err(|error| NotifyError::Invalid { reason: error.to_string() })?;
        let config = builder.with_root_certificates(roots).with_no_client_auth();
        Ok(Self { tls: TlsConnector::from(Arc::new(config)) })
    }

    /// Puts JSON to an address.
    ///
    /// # Errors
    /// As [`NotifyError`] says; only 2xx is success.
    pub async fn post(
        &self,
        to: &Address,
        token: Option<&str>,
        json: &serde_json::Value,
    ) -> Result<String, NotifyError> {
        let body = serde_json::to_vec(json).map_err(|error| NotifyError::Invalid { reason: error.to_string() })?;
        self.send(Method::POST, to, token, body).await
    }

    /// Asks an address for whatever it says.
    ///
    /// # Errors
    /// As [`post`](Self::post).
    pub async fn get(&self, to: &Address) -> Result<String, NotifyError> {
        self.send(Method::GET, to, None, Vec::new()).await
    }

    async fn send(
        &self,
        method: Method,
        to: &Address,
        token: Option<&str>,
        body: Vec<u8>,
    ) -> Result<String, NotifyError> {
        let unavailable = |reason: String| NotifyError::Unavailable { host: to.host(), reason };
        let answer = tokio::time::timeout(LIMIT, self.exchange(method, to, token, body)).await;
        let late = |_| unavailable(format!("no answer within {} s", LIMIT.as_secs()));
        let (status, answer) = answer.map_err(late)??;
        let words: String = answer.chars().map(|c| if c.is_control() { ' ' } else { c }).take(TOLD).collect();
        let told = format!("{status} {words}").trim().to_owned();
        match status {
            200..=299 => Ok(told),
            // Come again: too slow, too many, not now.
            408 | 425 | 429 | 500..=599 => Err(unavailable(told)),
            _ => Err(NotifyError::Refused { host: to.host(), reason: told }),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        to: &Address,
        token: Option<&str>,
        body: Vec<u8>,
    ) -> Result<(u16, String), NotifyError> {
        let request = request(method, to, token, body)?;
        let unavailable = |what: &str, error: &dyn std::error::Error| NotifyError::Unavailable {
            host: to.host(),
            reason: format!("{what}: {}", chain(error)),
        };
        let (host, secure) = (to.0.host().unwrap_or_default(), to.0.scheme_str() == Some("https"));
        let port = to.0.port_u16().unwrap_or(if secure { 443 } else { 80 });
        // An IPv6 address stands in brackets in a URL and nowhere else.
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let stream = TcpStream::connect((host, port)).await.map_err(|error| unavailable("connect", &error))?;
        let response = if secure {
            let name = ServerName::try_from(host.to_owned());
            let name = name.map_err(|error| NotifyError::Invalid { reason: error.to_string() })?;
            let stream = self.tls.connect(name, stream).await.map_err(|error| unavailable("TLS", &error))?;
            ask(stream, request).await
        } else {
            ask(stream, request).await
        };
        let (_sender, response) = response.map_err(|error| unavailable("HTTP", &error))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_LIMIT).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }
}

fn request(
    method: Method,
    to: &Address,
    token: Option<&str>,
    body: Vec<u8>,
) -> Result<Request<Full<Bytes>>, NotifyError> {
    let path = to.0.path_and_query().map_or("/", |path| path.as_str());
    let host = to.0.authority().map(|authority| authority.as_str().rsplit('@').next().unwrap_or_default());
    let mut request = Request::builder().method(method).uri(path).header(HOST, host.unwrap_or_default());
    request = request.header(USER_AGENT, concat!("drctl/", env!("CARGO_PKG_VERSION")));
    if !body.is_empty() {
        request = request.header(CONTENT_TYPE, "application/json");
    }
    if let Some(token) = token {
        let bearer = HeaderValue::from_str(&format!("Bearer {token}"));
        let mut bearer =
            bearer.map_err(|_| NotifyError::Invalid { reason: "the token is not fit for a header".into() })?;
        bearer.set_sensitive(true);
        request = request.header(AUTHORIZATION, bearer);
    }
    request.body(Full::new(Bytes::from(body))).map_err(|error| NotifyError::Invalid { reason: error.to_string() })
}

async fn ask(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> hyper::Result<(http1::SendRequest<Full<Bytes>>, Response<hyper::body::Incoming>)> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the sender, which is kept until the answer was read.
    task::spawn("notify-http", connection);
    let response = sender.send_request(request).await?;
    Ok((sender, response))
}

/// The causes of an error, which hyper and rustls leave out of their own words.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_shows_its_host_and_never_its_secret() {
        let address = Address::parse("https://user:pass@hooks.example:8443/services/T0/SECRET?key=SECRET").unwrap();
        assert_eq!(address.host(), "https://hooks.example:8443");
        assert!(!format!("{address:?}").contains("SECRET"));
        for wrong in ["hooks.example/SECRET", "ftp://a/SECRET", "http:///SECRET", "SECRET"] {
            assert!(!format!("{:?}", Address::parse(wrong).unwrap_err()).contains("SECRET"));
        }
    }
}
