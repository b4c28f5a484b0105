//! API keys: `pr_live_ID_SECRET`. The id finds the key, the secret proves it. Both are random.

use sha2::{Digest, Sha256};

const PREFIX: &str = "pr_live_";
const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;

/// Hash of a secret.
pub type Hash = [u8; 32];

/// A key that was just made: only now is it known.
pub struct NewKey {
    pub id: String,
    /// The whole key, for its owner.
    pub key: String,
    pub secret_hash: Hash,
}

/// Error of a system without randomness.
#[derive(Debug, thiserror::Error)]
#[error("the system has no random numbers: {0}")]
pub struct NoRandomness(#[from] getrandom::Error);

impl NewKey {
    pub fn random() -> Result<Self, NoRandomness> {
        let (id, secret) = (random_hex::<ID_BYTES>()?, random_hex::<SECRET_BYTES>()?);
        Ok(Self { key: format!("{PREFIX}{id}_{secret}"), secret_hash: hash(&secret), id })
    }
}

/// Returns random bytes as hexadecimal digits.
pub fn random_hex<const BYTES: usize>() -> Result<String, NoRandomness> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes)?;
    Ok(hex(&bytes))
}

/// Returns bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the SHA-256 of a secret. A slow hash would protect short secrets; these are random and
/// have 256 bits.
pub fn hash(secret: &str) -> Hash {
    Sha256::digest(secret.as_bytes()).into()
}

/// Returns the id and the secret of a text that has the form of a key.
pub fn split(token: &str) -> Option<(&str, &str)> {
    token.strip_prefix(PREFIX)?.split_once('_')
}

/// Compares hashes in constant time.
pub fn equal(one: &Hash, other: &Hash) -> bool {
    openssl::memcmp::eq(one, other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_key_has_an_id_and_a_secret_that_its_hash_proves() {
        let new = NewKey::random().unwrap();
        let (id, secret) = split(&new.key).unwrap();
        assert_eq!((id, id.len(), secret.len()), (new.id.as_str(), 16, 64));
        assert!(equal(&hash(secret), &new.secret_hash) && !equal(&hash("x"), &new.secret_hash));
        assert_ne!(new.key, NewKey::random().unwrap().key);
        for other in ["", "pr_live_", "pr_live_abc", "Pr_live_a_b", "eyJ.x.y"] {
            assert_eq!(split(other), None, "{other}");
        }
    }
}
