//! Signatures of tokens, checked by the OpenSSL of the system, as everything else is.

use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind,
    crypto::{CryptoProvider, JwkUtils, JwtVerifier},
    errors::{Error, ErrorKind},
};
use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey, EcPoint},
    ecdsa::EcdsaSig,
    error::ErrorStack,
    hash::MessageDigest,
    memcmp,
    nid::Nid,
    pkey::{Id, PKey, Private, Public},
    rsa::Rsa,
    sign::{Signer, Verifier as OpensslVerifier},
};

/// Shortest modulus of an RSA key, in bytes.
const MIN_MODULUS_BYTES: usize = 256;
/// Bytes of each of the two numbers of a signature by P-256.
const P256_BYTES: usize = 32;

/// Makes tokens be checked by OpenSSL. Later calls change nothing.
pub fn install() {
    static OPENSSL: CryptoProvider = CryptoProvider {
        signer_factory: |_, _| Err(ErrorKind::InvalidAlgorithm.into()),
        verifier_factory: |algorithm, key| Ok(Box::new(Verifier::new(*algorithm, key)?)),
        jwk_utils: JwkUtils::new_unimplemented(),
    };
    let _ = OPENSSL.install_default();
}

struct Verifier {
    algorithm: Algorithm,
    key: Key,
}

enum Key {
    Hmac(PKey<Private>),
    Public(PKey<Public>),
}

impl Verifier {
    fn new(algorithm: Algorithm, key: &DecodingKey) -> Result<Self, Error> {
        let wrong = |_: ErrorStack| Error::from(ErrorKind::InvalidKeyFormat);
        let key = match (algorithm, key.kind()) {
            (Algorithm::HS256, DecodingKeyKind::SecretOrDer(secret)) => Key::Hmac(PKey::hmac(secret).map_err(wrong)?),
            (Algorithm::RS256, DecodingKeyKind::RsaModulusExponent { n, e }) if n.len() >= MIN_MODULUS_BYTES => {
                Key::Public(rsa(n, e).map_err(wrong)?)
            }
            (Algorithm::ES256, DecodingKeyKind::SecretOrDer(point)) => Key::Public(p256(point).map_err(wrong)?),
            (Algorithm::EdDSA, DecodingKeyKind::SecretOrDer(bytes)) => {
                Key::Public(PKey::public_key_from_raw_bytes(bytes, Id::ED25519).map_err(wrong)?)
            }
            _ => return Err(ErrorKind::InvalidAlgorithm.into()),
        };
        Ok(Self { algorithm, key })
    }

    fn is_valid(&self, message: &[u8], signature: &[u8]) -> Result<bool, ErrorStack> {
        match (&self.key, self.algorithm) {
            (Key::Hmac(key), _) => {
                let made = Signer::new(MessageDigest::sha256(), key)?.sign_oneshot_to_vec(message)?;
                Ok(made.len() == signature.len() && memcmp::eq(&made, signature))
            }
            (Key::Public(key), Algorithm::EdDSA) => {
                OpensslVerifier::new_without_digest(key)?.verify_oneshot(signature, message)
            }
            (Key::Public(key), Algorithm::ES256) => {
                if signature.len() != 2 * P256_BYTES {
                    return Ok(false);
                }
                let (r, s) = signature.split_at(P256_BYTES);
                let der =
                    EcdsaSig::from_private_components(BigNum::from_slice(r)?, BigNum::from_slice(s)?)?.to_der()?;
                OpensslVerifier::new(MessageDigest::sha256(), key)?.verify_oneshot(&der, message)
            }
            (Key::Public(key), _) => {
                OpensslVerifier::new(MessageDigest::sha256(), key)?.verify_oneshot(signature, message)
            }
        }
    }
}

fn rsa(modulus: &[u8], exponent: &[u8]) -> Result<PKey<Public>, ErrorStack> {
    let (modulus, exponent) = (BigNum::from_slice(modulus)?, BigNum::from_slice(exponent)?);
    PKey::from_rsa(Rsa::from_public_components(modulus, exponent)?)
}

/// Reads an uncompressed point of P-256.
fn p256(point: &[u8]) -> Result<PKey<Public>, ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    let point = EcPoint::from_bytes(&group, point, &mut *BigNumContext::new()?)?;
    let key = EcKey::from_public_key(&group, &point)?;
    key.check_key()?;
    PKey::from_ec_key(key)
}

impl signature::Verifier<Vec<u8>> for Verifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        match self.is_valid(message, signature) {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(signature::Error::new()),
        }
    }
}

impl JwtVerifier for Verifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}
