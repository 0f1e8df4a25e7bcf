//! Passwords as they are stored in a table: sealed (AES-256-GCM), so that somebody who sees the table, for example
//! through logical decoding, cannot read them.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

pub const KEY_BYTES: usize = 32;
/// A new nonce is drawn for each password.
pub const NONCE_BYTES: usize = NONCE_LEN;

pub type SealKey = [u8; KEY_BYTES];

/// The nonce, and the password of this backend sealed with it; `None` if the password is too long.
pub fn seal(key: &SealKey, nonce: [u8; NONCE_BYTES], backend_number: i32, password: &str) -> Option<Vec<u8>> {
    let mut sealed = password.as_bytes().to_vec();
    opener(key)?
        .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), about(backend_number), &mut sealed)
        .ok()?;
    Some([nonce.as_slice(), &sealed].concat())
}

/// `None`: it was sealed with another key or for another backend, or it is damaged.
pub fn open(key: &SealKey, backend_number: i32, sealed: &[u8]) -> Option<String> {
    let (nonce, sealed) = sealed.split_first_chunk()?;
    let mut bytes = sealed.to_vec();
    let nonce = Nonce::assume_unique_for_key(*nonce);
    let password = opener(key)?
        .open_in_place(nonce, about(backend_number), &mut bytes)
        .ok()?;
    String::from_utf8(password.to_vec()).ok()
}

fn opener(key: &SealKey) -> Option<LessSafeKey> {
    UnboundKey::new(&AES_256_GCM, key).ok().map(LessSafeKey::new)
}

fn about(backend_number: i32) -> Aad<[u8; 4]> {
    Aad::from(backend_number.to_be_bytes())
}

/// A key as text, in hexadecimal digits.
pub fn key_text(key: &SealKey) -> String {
    key.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn key_of_text(text: &str) -> Option<SealKey> {
    let mut key = [0; KEY_BYTES];
    if text.len() != 2 * KEY_BYTES || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in key.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SealKey = [7; KEY_BYTES];

    #[test]
    fn a_password_is_opened_only_with_its_key_and_for_its_backend() {
        for password in ["", "secret", "ü \u{1f600}", &"x".repeat(100_000)] {
            let sealed = seal(&KEY, [1; NONCE_BYTES], 5, password).expect("sealed");
            assert_eq!(open(&KEY, 5, &sealed).as_deref(), Some(password));
            assert_eq!(open(&KEY, 6, &sealed), None, "another backend's");
            assert_eq!(open(&[8; KEY_BYTES], 5, &sealed), None, "another key");
            for at in [0, NONCE_BYTES, sealed.len() - 1] {
                let mut damaged = sealed.clone();
                damaged[at] ^= 1;
                assert_eq!(open(&KEY, 5, &damaged), None, "damaged at {at}");
            }
        }
        let sealed = seal(&KEY, [1; NONCE_BYTES], 5, "secret").expect("sealed");
        assert!(!sealed.windows(6).any(|bytes| bytes == b"secret"));
        for length in 0..sealed.len() {
            assert_eq!(open(&KEY, 5, &sealed[..length]), None);
        }
    }

    #[test]
    fn keys_are_texts() {
        let key = std::array::from_fn(|index| index as u8 * 8);
        assert_eq!(key_of_text(&key_text(&key)), Some(key));
        for text in [
            "",
            "00",
            &"0g".repeat(KEY_BYTES),
            &"é".repeat(KEY_BYTES),
            &"+1".repeat(KEY_BYTES),
        ] {
            assert_eq!(key_of_text(text), None, "{text}");
        }
    }
}
