//! TLS to PostgreSQL with rustls: one configuration for the SQL and the replication client, with the channel binding
//! that SCRAM-SHA-256-PLUS needs.

use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use aws_lc_rs::digest;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs::default_provider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};
use tokio_rustls::{TlsConnector, client};

use crate::pg::PgError;
use crate::pg::conninfo::{ConnInfo, Server, SslMode, read_private};

/// Makes TLS connections to one server.
#[derive(Clone)]
pub struct Tls {
    connector: TlsConnector,
}

impl Tls {
    /// What `info` asks for at `server`; `None` is clear text.
    ///
    /// # Errors
    /// A certificate or key file cannot be read, or no authority is known to verify against.
    pub fn new(info: &ConnInfo, server: &Server) -> Result<Option<Self>, PgError> {
        let mode = info.ssl_mode(server);
        if mode == SslMode::Disable {
            return Ok(None);
        }
        let provider = Arc::new(default_provider());
        let verifier = verifier(mode, info.sslrootcert.as_deref(), &provider)?;
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| config(&error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut client = match &info.client_cert {
            None => builder.with_no_client_auth(),
            Some((cert, key)) => {
                let (chain, key) = (certificates(cert)?, private_key(key)?);
                builder.with_client_auth_cert(chain, key).map_err(|error| config(&error))?
            }
        };
        // PostgreSQL 17 and later check it, earlier ones ignore it: a server of another protocol cannot be confused.
        client.alpn_protocols = vec![b"postgresql".to_vec()];
        Ok(Some(Self { connector: TlsConnector::from(Arc::new(client)) }))
    }

    /// The handshake, over a stream on which the server has agreed to TLS.
    pub(in crate::pg) async fn handshake<S>(&self, host: &str, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        self.connector.connect(name, stream).await.map(TlsStream)
    }
}

fn config(reason: &dyn std::fmt::Display) -> PgError {
    PgError::Config(format!("TLS settings: {reason}"))
}

fn unreadable(path: &Path, reason: &dyn std::fmt::Display) -> PgError {
    PgError::Config(format!("{}: {reason}", path.display()))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, PgError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let certificates = read.map_err(|error| unreadable(path, &error))?;
    if certificates.is_empty() {
        return Err(unreadable(path, &"no certificate inside"));
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, PgError> {
    let pem = read_private(path).map_err(|error| unreadable(path, &error))?;
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|error| unreadable(path, &error))
}

fn roots(file: Option<&Path>) -> Result<RootCertStore, PgError> {
    let mut roots = RootCertStore::empty();
    match file {
        Some(path) => {
            for certificate in certificates(path)? {
                roots.add(certificate).map_err(|error| unreadable(path, &error))?;
            }
        }
        // A system store often holds a certificate or two that rustls does not take; the others still count.
        None => _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
    }
    if roots.is_empty() {
        return Err(config(&"no trusted authority on this system; set sslrootcert"));
    }
    Ok(roots)
}

type Verifier = Arc<dyn ServerCertVerifier>;

fn verifier(mode: SslMode, root_file: Option<&Path>, provider: &Arc<CryptoProvider>) -> Result<Verifier, PgError> {
    if mode == SslMode::VerifyFull {
        let roots = Arc::new(roots(root_file)?);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(provider)).build();
        return verifier.map(|verifier| verifier as Verifier).map_err(|error| config(&error));
    }
    let checked = mode == SslMode::VerifyCa || root_file.is_some();
    let roots = if checked { Some(roots(root_file)?) } else { None };
    Ok(Arc::new(NamelessVerifier { roots, provider: Arc::clone(provider) }))
}

/// Checks the chain without the host name (`verify-ca`), or nothing but the possession of the key (`require`).
#[derive(Debug)]
struct NamelessVerifier {
    roots: Option<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for NamelessVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let algorithms = self.provider.signature_verification_algorithms.all;
            let parsed = ParsedCertificate::try_from(end_entity)?;
            verify_server_cert_signed_by_trust_anchor(&parsed, roots, intermediates, now, algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// A TLS session that knows its channel binding.
pub struct TlsStream<S>(client::TlsStream<S>);

impl<S> TlsStream<S> {
    /// The `tls-server-end-point` of RFC 5929; `None` if the certificate's signature names no hash that it covers.
    pub(in crate::pg) fn server_end_point(&self) -> Option<Vec<u8>> {
        let (_, session) = self.0.get_ref();
        session.peer_certificates()?.first().and_then(|certificate| end_point_hash(certificate))
    }
}

fn end_point_hash(certificate: &[u8]) -> Option<Vec<u8>> {
    let algorithm = match signature_oid(certificate)? {
        // MD5 and SHA-1 are replaced by SHA-256 (RFC 5929 §4.1); 4, 5 and 11 are RSA with MD5, SHA-1 and SHA-256.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 4 | 5 | 11] => &digest::SHA256,
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 12] => &digest::SHA384,
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 13] => &digest::SHA512,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 1] | [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 3, 2] => &digest::SHA256,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 3, 3] => &digest::SHA384,
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 3, 4] => &digest::SHA512,
        _ => return None,
    };
    Some(digest::digest(algorithm, certificate).as_ref().to_vec())
}

/// `Certificate ::= SEQUENCE { tbsCertificate SEQUENCE, signatureAlgorithm SEQUENCE { algorithm OID, … }, … }`
fn signature_oid(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = der(0x30, certificate)?;
    let (_to_be_signed, rest) = der(0x30, certificate)?;
    let (algorithm, _) = der(0x30, rest)?;
    der(0x06, algorithm).map(|(oid, _)| oid)
}

/// The contents of the element with `tag` at the beginning, and what follows it.
fn der(tag: u8, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = bytes.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    (found == tag).then(|| rest.split_at_checked(length))?
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> tokio_postgres::tls::TlsStream for TlsStream<S> {
    fn channel_binding(&self) -> ChannelBinding {
        self.server_end_point().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

/// [`Tls`] for one host name, as tokio-postgres wants it.
pub struct HostTls {
    tls: Tls,
    host: String,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> MakeTlsConnect<S> for Tls {
    type Stream = TlsStream<S>;
    type TlsConnect = HostTls;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<HostTls> {
        Ok(HostTls { tls: self.clone(), host: domain.to_owned() })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> TlsConnect<S> for HostTls {
    type Stream = TlsStream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TlsStream<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move { self.tls.handshake(&self.host, stream).await })
    }
}

/// The reason inside a failed handshake, with advice for the two certificates that people make for themselves.
pub(in crate::pg) fn handshake_reason(error: &io::Error) -> String {
    let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return error.to_string();
    };
    match inner {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            format!("{inner}; set sslrootcert to the authority that signed it")
        }
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(reason)))
            if reason.to_string().contains("CaUsedAsEndEntity") =>
        {
            format!("{inner}; the server shows an authority's own certificate, it needs one signed by it")
        }
        _ => inner.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, proptest};

    use super::*;

    #[test]
    fn the_hash_follows_the_signature_algorithm() {
        let certificate = |oid: &[u8]| {
            let wrap = |tag: u8, body: &[u8]| [&[tag, u8::try_from(body.len()).unwrap()], body].concat();
            let algorithm = wrap(0x30, &wrap(0x06, oid));
            wrap(0x30, &[wrap(0x30, b"tbs"), algorithm, wrap(0x03, b"signature")].concat())
        };
        let length = |oid: &[u8]| end_point_hash(&certificate(oid)).map(|hash| hash.len());
        assert_eq!(length(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 5]), Some(32));
        assert_eq!(length(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 3, 3]), Some(48));
        assert_eq!(length(&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 13]), Some(64));
        // Ed25519 has no separate hash.
        assert_eq!(length(&[0x2b, 0x65, 0x70]), None);
    }

    proptest! {
        #[test]
        fn no_certificate_panics(mut bytes in vec(0u8.., 0..64)) {
            let _ = end_point_hash(&bytes);
            if let Some(first) = bytes.first_mut() {
                *first = 0x30;
            }
            let _ = end_point_hash(&bytes);
        }
    }
}
