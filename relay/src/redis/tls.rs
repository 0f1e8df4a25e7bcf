//! TLS on a TCP stream: rustls with ring as its provider, which is not installed for the whole process. A server is
//! accepted if its certificate's chain leads to a trusted authority and the certificate names the host (or address)
//! that was connected to.

use crate::failure::{Class, Failure, Trouble};
use crate::redis::deadline::Deadline;
use crate::redis::destination::Tls;
use crate::redis::server_file;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, Error, RootCertStore,
    SignatureScheme,
};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A TCP stream with TLS. Written data is passed to the socket before the call returns.
pub(super) struct TlsStream {
    session: ClientConnection,
    stream: TcpStream,
}

/// The configuration, from the present content of the files.
pub(super) fn config(tls: &Tls) -> Result<Arc<ClientConfig>, Failure> {
    let provider = Arc::new(ring::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = if tls.insecure {
        Arc::new(Anybody(Arc::clone(&provider)))
    } else {
        let roots = Arc::new(roots(tls.ca_file.as_deref())?);
        WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| {
                Failure::of(
                    Trouble::Tls,
                    format!("the verification of TLS servers cannot be set up: {error}"),
                )
            })?
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::of(Trouble::Tls, format!("TLS cannot be set up: {error}")))?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match &tls.client {
        None => builder.with_no_client_auth(),
        Some(client) => {
            let chain = certificates("TLS certificate file", &client.cert_file)?;
            let key = server_file::read_secret("TLS key file", &client.key_file)?;
            let of_key = |what: &str| {
                Failure::of(
                    Trouble::Tls,
                    format!("TLS key file \"{}\" {what}", client.key_file.display()),
                )
            };
            let key = PrivateKeyDer::from_pem_slice(&key)
                .map_err(|_| of_key("has no unencrypted private key in PEM format"))?;
            builder.with_client_auth_cert(chain, key).map_err(|error| match error {
                Error::InconsistentKeys(_) => of_key("does not belong to the certificate"),
                _ => of_key("or its certificate cannot be used"),
            })?
        }
    };
    // Each connection has its own configuration, so there is no session to resume.
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, Failure> {
    let mut roots = RootCertStore::empty();
    match ca_file {
        Some(path) => {
            let (usable, _) = roots.add_parsable_certificates(certificates("TLS CA file", path)?);
            if usable == 0 {
                let message = format!("TLS CA file \"{}\" has no certificate that can be used", path.display());
                return Err(Failure::of(Trouble::Tls, message));
            }
        }
        None => {
            // Some of the system's certificates may be unusable; the others are enough.
            let (usable, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if usable == 0 {
                return Err(Failure::of(
                    Trouble::Tls,
                    "TLS found no certificate authorities of this system",
                ));
            }
        }
    }
    Ok(roots)
}

/// All certificates in a file. The parser's own errors are not shown, because they repeat the file's content.
fn certificates(what: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let bytes = server_file::read(what, path)?;
    match CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>() {
        Ok(certificates) if !certificates.is_empty() => Ok(certificates),
        _ => {
            let message = format!("{what} \"{}\" has no certificates in PEM format", path.display());
            Err(Failure::of(Trouble::Tls, message))
        }
    }
}

impl TlsStream {
    /// Makes the handshake, within `timeout` in total.
    pub(super) fn open(
        config: Arc<ClientConfig>,
        insecure: bool,
        host: &str,
        stream: TcpStream,
        timeout: Duration,
    ) -> Result<Self, Failure> {
        let name = match ServerName::try_from(host.trim_end_matches('.').to_owned()) {
            Ok(name) => name,
            // The name is not verified, so the address is sufficient.
            Err(_) if insecure => stream.peer_addr().map_err(interrupted)?.ip().into(),
            Err(_) => {
                return Err(Failure::of(
                    Trouble::Tls,
                    format!("TLS cannot verify \"{host}\": it is not a host name"),
                ));
            }
        };
        let session = ClientConnection::new(config, name)
            .map_err(|error| Failure::of(Trouble::Tls, format!("TLS cannot be set up: {error}")))?;
        let mut tls = Self { session, stream };
        tls.shake_hands(Instant::now() + timeout).map_err(interrupted)?;
        Ok(tls)
    }

    fn shake_hands(&mut self, deadline: Instant) -> io::Result<()> {
        while self.session.is_handshaking() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
            self.stream.set_write_timeout(Some(left))?;
            self.flush()?;
            if self.session.wants_read() && self.take_in()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.flush()
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// Writes within `timeout` for each piece, see [`Deadline`].
    pub(super) fn write_all(&mut self, mut bytes: &[u8], timeout: Duration) -> io::Result<()> {
        let mut deadline = Deadline::new(timeout, Instant::now());
        while !bytes.is_empty() {
            // As much as fits into its buffer of 64 kB.
            let taken = self.session.writer().write(bytes)?;
            bytes = &bytes[taken..];
            if let Err(error) = self.flush_before(Some(&mut deadline)) {
                return Err(self.why(error));
            }
        }
        Ok(())
    }

    /// Receives at most once. If that gives no whole record, it reports an interruption, so that the caller can check
    /// the time.
    pub(super) fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        for received in [false, true] {
            match self.session.reader().read(room) {
                // Everything that was decrypted has been read.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            if !received && self.take_in()? == 0 {
                return Ok(0);
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    /// Receives, and decrypts complete records; 0: the other side has closed the connection.
    fn take_in(&mut self) -> io::Result<usize> {
        let received = self.session.read_tls(&mut self.stream)?;
        if let Err(error) = self.session.process_new_packets() {
            // Notifies the server, if it still listens.
            let _ = self.flush();
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        // For example the answer to a key update.
        self.flush()?;
        Ok(received)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flush_before(None)
    }

    fn flush_before(&mut self, mut deadline: Option<&mut Deadline>) -> io::Result<()> {
        while self.session.wants_write() {
            let written = match self.session.write_tls(&mut self.stream) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            let left = deadline
                .as_mut()
                .map(|deadline| deadline.moved(written, Instant::now()));
            if left == Some(None) && self.session.wants_write() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }

    /// The real reason for an error: a server that refuses our certificate sends an alert and closes when the handshake
    /// has ended on our side.
    fn why(&mut self, error: io::Error) -> io::Error {
        if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) {
            return error;
        }
        match self.take_in() {
            Err(said) if said.kind() == io::ErrorKind::InvalidData => said,
            _ => error,
        }
    }
}

/// The failure if a handshake did not finish.
fn interrupted(error: io::Error) -> Failure {
    if let Some(failure) = failure(&error) {
        return failure;
    }
    let what = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "timed out".to_owned(),
        io::ErrorKind::UnexpectedEof => "was cut off by the server".to_owned(),
        _ => error.to_string(),
    };
    Failure::of(Trouble::TlsBroken, format!("TLS handshake: {what}"))
}

/// An error of TLS in words that do not vary between attempts; `None`: it is an error of the network.
pub(super) fn failure(error: &io::Error) -> Option<Failure> {
    let error = error.get_ref()?.downcast_ref::<Error>()?;
    let (class, what) = match error {
        Error::InvalidCertificate(why) => (Class::Configuration, format!("the server's certificate {}", fault(why))),
        Error::AlertReceived(alert) => said(*alert),
        Error::InvalidMessage(_) => (
            Class::Configuration,
            "the server does not speak TLS on this port".to_owned(),
        ),
        Error::PeerIncompatible(_) => (Class::Configuration, error.to_string()),
        _ => (Class::Backend, error.to_string()),
    };
    let trouble = match class {
        Class::Configuration => Trouble::Tls,
        _ => Trouble::TlsBroken,
    };
    Some(Failure::of(trouble, format!("TLS: {what}")))
}

fn fault(why: &CertificateError) -> String {
    use CertificateError::*;
    match why {
        Expired | ExpiredContext { .. } => "has expired".to_owned(),
        NotValidYet | NotValidYetContext { .. } => "is not valid yet".to_owned(),
        UnknownIssuer | BadSignature => "is not signed by a trusted authority".to_owned(),
        Revoked => "was revoked".to_owned(),
        NotValidForName => "is for another host".to_owned(),
        NotValidForNameContext { presented, .. } if presented.is_empty() => "names no host".to_owned(),
        NotValidForNameContext { presented, .. } => format!("is for another host: {}", presented.join(", ")),
        other => format!("cannot be used: {other}"),
    }
}

/// The reason in an alert from the server.
fn said(alert: AlertDescription) -> (Class, String) {
    use AlertDescription::*;
    match alert {
        CertificateRequired => (
            Class::Configuration,
            "the server requires a client certificate".to_owned(),
        ),
        // Older versions send this alert for a missing client certificate.
        HandshakeFailure
        | BadCertificate
        | UnsupportedCertificate
        | CertificateRevoked
        | CertificateExpired
        | CertificateUnknown
        | UnknownCA
        | AccessDenied
        | DecryptError => (
            Class::Configuration,
            format!("the server refuses the connection or the client certificate: {alert:?}"),
        ),
        ProtocolVersion | InsufficientSecurity | UnrecognisedName => (
            Class::Configuration,
            format!("the server refuses the connection: {alert:?}"),
        ),
        _ => (Class::Backend, format!("the server ended the handshake: {alert:?}")),
    }
}

/// Accepts any server (`tls_insecure`).
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    // The signature is not verified either: a certificate that cannot be parsed may be the reason for `tls_insecure`.
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
