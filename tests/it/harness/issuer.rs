//! An issuer of tokens: its keys, its signatures, and its JWKS.

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey},
    ecdsa::EcdsaSig,
    hash::MessageDigest,
    nid::Nid,
    pkey::{PKey, Private},
    rsa::Rsa,
    sign::Signer,
};
use serde_json::{Value, json};

/// A key of the issuer.
pub struct SigningKey {
    pub id: String,
    pub algorithm: &'static str,
    key: PKey<Private>,
}

pub fn base64url(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

impl SigningKey {
    pub fn rsa(id: &str) -> Self {
        let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
        Self { id: id.to_owned(), algorithm: "RS256", key }
    }

    pub fn ec(id: &str) -> Self {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap();
        Self { id: id.to_owned(), algorithm: "ES256", key }
    }

    pub fn ed25519(id: &str) -> Self {
        Self { id: id.to_owned(), algorithm: "EdDSA", key: PKey::generate_ed25519().unwrap() }
    }

    pub fn hmac(secret: &[u8]) -> Self {
        Self { id: String::new(), algorithm: "HS256", key: PKey::hmac(secret).unwrap() }
    }

    /// Returns the public key as PEM.
    pub fn public_pem(&self) -> Vec<u8> {
        self.key.public_key_to_pem().unwrap()
    }

    /// Returns the public key as a JWK.
    pub fn jwk(&self) -> Value {
        match self.algorithm {
            "RS256" => {
                let rsa = self.key.rsa().unwrap();
                let [n, e] = [rsa.n(), rsa.e()].map(|number| base64url(number.to_vec()));
                json!({"kty": "RSA", "kid": self.id, "use": "sig", "alg": "RS256", "n": n, "e": e})
            }
            "ES256" => {
                let key = self.key.ec_key().unwrap();
                let (mut x, mut y) = (BigNum::new().unwrap(), BigNum::new().unwrap());
                let mut context = BigNumContext::new().unwrap();
                key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context).unwrap();
                let [x, y] = [x, y].map(|number| base64url(number.to_vec_padded(32).unwrap()));
                json!({"kty": "EC", "crv": "P-256", "kid": self.id, "x": x, "y": y})
            }
            _ => {
                let x = base64url(self.key.raw_public_key().unwrap());
                json!({"kty": "OKP", "crv": "Ed25519", "kid": self.id, "x": x})
            }
        }
    }

    fn signature(&self, text: &[u8]) -> Vec<u8> {
        match self.algorithm {
            "EdDSA" => Signer::new_without_digest(&self.key).unwrap().sign_oneshot_to_vec(text).unwrap(),
            algorithm => {
                let mut signer = Signer::new(MessageDigest::sha256(), &self.key).unwrap();
                signer.update(text).unwrap();
                let signature = signer.sign_to_vec().unwrap();
                if algorithm != "ES256" {
                    return signature;
                }
                let parts = EcdsaSig::from_der(&signature).unwrap();
                [parts.r(), parts.s()].map(|number| number.to_vec_padded(32).unwrap()).concat()
            }
        }
    }

    /// Returns a token with this head and these claims, signed with this key.
    pub fn sign_with_head(&self, head: &Value, claims: &Value) -> String {
        let text = format!("{}.{}", base64url(head.to_string()), base64url(claims.to_string()));
        format!("{text}.{}", base64url(self.signature(text.as_bytes())))
    }

    /// Returns a token with these claims.
    pub fn sign(&self, claims: &Value) -> String {
        self.sign_with_head(&json!({"alg": self.algorithm, "kid": self.id, "typ": "JWT"}), claims)
    }
}

/// Returns the JWKS of these keys.
pub fn jwks(keys: &[&SigningKey]) -> Value {
    json!({"keys": keys.iter().map(|key| key.jwk()).collect::<Vec<_>>()})
}
