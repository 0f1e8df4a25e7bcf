//! Hash slots of Redis Cluster: the slot of a stream's key, and a tag that puts another key into the same slot.
//!
//! Source: Redis cluster specification, "Key distribution model" and "Hash tags"; CRC16 as in its appendix A (XMODEM:
//! polynomial 0x1021, initial value 0, nothing reflected).

use std::sync::OnceLock;

/// How many hash slots there are.
pub const HASH_SLOTS: u16 = 16_384;

const REMAINDERS: [u16; 256] = remainders();

const fn remainders() -> [u16; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let (mut remainder, mut bit) = ((byte as u16) << 8, 0);
        while bit < 8 {
            remainder = match remainder & 0x8000 {
                0 => remainder << 1,
                _ => (remainder << 1) ^ 0x1021,
            };
            bit += 1;
        }
        table[byte] = remainder;
        byte += 1;
    }
    table
}

fn crc16(bytes: &[u8]) -> u16 {
    let step = |crc: u16, byte: &u8| (crc << 8) ^ REMAINDERS[usize::from((crc >> 8) as u8 ^ byte)];
    bytes.iter().fold(0, step)
}

/// The hash slot of a key.
pub fn hash_slot_of(key: &[u8]) -> u16 {
    crc16(hashed(key)) % HASH_SLOTS
}

/// The part of a key that is hashed: the text between the first `{` and the first `}` after it, if it is not empty.
fn hashed(key: &[u8]) -> &[u8] {
    let tag = key.iter().position(|b| *b == b'{').and_then(|open| {
        let rest = &key[open + 1..];
        let close = rest.iter().position(|b| *b == b'}')?;
        Some(&rest[..close])
    });
    tag.filter(|tag| !tag.is_empty()).unwrap_or(key)
}

/// A short tag for this hash slot: a key with `{tag}` is in that slot. It is the smallest number whose digits hash to
/// it. Keys of guards contain it, so it must never change.
pub fn tag_of(hash_slot: u16) -> String {
    static TAGS: OnceLock<Vec<u32>> = OnceLock::new();
    let tags = TAGS.get_or_init(|| {
        let mut tags = vec![u32::MAX; usize::from(HASH_SLOTS)];
        let (mut missing, mut number, mut digits) = (tags.len(), 0, itoa::Buffer::new());
        while missing > 0 {
            let tag = &mut tags[usize::from(hash_slot_of(digits.format(number).as_bytes()))];
            if *tag == u32::MAX {
                (*tag, missing) = (number, missing - 1);
            }
            number += 1;
        }
        tags
    });
    tags[usize::from(hash_slot % HASH_SLOTS)].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An independent implementation of the same checksum.
    fn reference(bytes: &[u8]) -> u16 {
        crc::Crc::<u16>::new(&crc::CRC_16_XMODEM).checksum(bytes)
    }

    fn random_key(random: &mut fastrand::Rng) -> Vec<u8> {
        let length = random.usize(..20);
        // Often braces, and any other bytes.
        let byte = |random: &mut fastrand::Rng| match random.u8(..4) {
            0 => b'{',
            1 => b'}',
            _ => random.u8(..),
        };
        (0..length).map(|_| byte(random)).collect()
    }

    #[test]
    fn the_checksum_agrees_with_the_reference() {
        // The example in the specification.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..100_000 {
            let key = random_key(&mut random);
            assert_eq!(crc16(&key), reference(&key), "{key:?}");
        }
    }

    #[test]
    fn only_the_tag_is_hashed() {
        // The examples in the specification.
        assert_eq!(hashed(b"{user1000}.following"), b"user1000");
        assert_eq!(hashed(b"foo{}{bar}"), b"foo{}{bar}");
        assert_eq!(hashed(b"foo{{bar}}zap"), b"{bar");
        assert_eq!(hashed(b"foo{bar}{zap}"), b"bar");
        for whole in [b"".as_slice(), b"{", b"}", b"a{b", b"}a{b", b"{}"] {
            assert_eq!(hashed(whole), whole);
        }
    }

    #[test]
    fn every_slot_has_a_short_tag_that_never_changes() {
        let mut checksum = 0;
        for hash_slot in 0..HASH_SLOTS {
            let tag = tag_of(hash_slot);
            assert!(tag.len() <= 6, "{tag}");
            assert_eq!(
                hash_slot_of(format!("outbox_relay:guard:x:1:2:{{{tag}}}").as_bytes()),
                hash_slot
            );
            checksum = crc16(format!("{checksum}{tag}").as_bytes());
        }
        assert_eq!([0, 5_000, 16_383].map(tag_of), ["3560", "1324", "39296"]);
        assert_eq!(checksum, 15752);
    }

    #[test]
    fn a_tag_puts_a_guard_beside_any_stream() {
        let mut random = fastrand::Rng::with_seed(2);
        for _ in 0..10_000 {
            let stream = random_key(&mut random);
            let guard = format!("outbox_relay:guard:x:1:2:{{{}}}", tag_of(hash_slot_of(&stream)));
            assert_eq!(hash_slot_of(guard.as_bytes()), hash_slot_of(&stream), "{stream:?}");
        }
    }
}
