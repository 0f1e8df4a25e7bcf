//! Certificates of unknown authorities, and Redis servers that use them.

use std::path::PathBuf;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;

use crate::{Redis, env};

/// A certificate authority, whose files are removed with it.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    dir: TempDir,
}

/// Two PEM files that the server's user can read.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub cert_file: String,
    pub key_file: String,
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "outbox_relay tests");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        let dir = env::server_dir("tls");
        env::server_file(&dir.path().join("ca.pem"), certificate.pem().as_bytes(), 0o644);
        let issuer = Issuer::new(params, key);
        Authority { issuer, dir }
    }

    /// Its own certificate.
    pub fn ca_file(&self) -> String {
        self.path("ca.pem").display().to_string()
    }

    /// A certificate for these names and addresses.
    pub fn issue(&self, names: &[&str]) -> Certificate {
        self.issue_until(2040, names)
    }

    /// A certificate that has expired.
    pub fn issue_until(&self, year: i32, names: &[&str]) -> Certificate {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let mut params = CertificateParams::new(names).expect("names for a certificate");
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let number = uuid::Uuid::new_v4().simple();
        Certificate {
            cert_file: self.file(&format!("{number}.pem"), certificate.pem().as_bytes(), 0o644),
            key_file: self.file(&format!("{number}.key"), key.serialize_pem().as_bytes(), 0o600),
        }
    }

    /// Another file beside its own, of the server's user.
    pub fn file(&self, name: &str, bytes: &[u8], mode: u32) -> String {
        let path = self.path(name);
        env::server_file(&path, bytes, mode);
        path.display().to_string()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Redis {
    /// A server that uses this certificate on its [`tls_port`](Self::tls_port), and asks clients for none; later
    /// arguments may change that.
    #[track_caller]
    pub fn tls(certificate: &Certificate, args: &[&str]) -> Self {
        let mut all = vec![
            "--tls-cert-file",
            &certificate.cert_file,
            "--tls-key-file",
            &certificate.key_file,
        ];
        // Nobody's, unless clients are asked for one.
        if !args.contains(&"--tls-ca-cert-file") {
            all.extend(["--tls-ca-cert-file", &certificate.cert_file, "--tls-auth-clients", "no"]);
        }
        all.extend(args);
        Self::with_tls_port(&all)
    }
}
