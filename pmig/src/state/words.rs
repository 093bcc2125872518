//! Numbers in and out of kernel structures held as bytes.

/// The `u64` at `offset`; 0 where the bytes end before it.
pub(crate) fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    bytes
        .get(offset..offset + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// The `u32` at `offset`; 0 where the bytes end before it.
pub(crate) fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    bytes
        .get(offset..offset + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

/// Words as the kernel reads them.
pub(crate) fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_bytes_read_as_zero() {
        let b = bytes_of(&[1, 2 << 32]);
        assert_eq!((u64_at(&b, 0), u32_at(&b, 12)), (1, 2));
        assert_eq!((u64_at(&b, 9), u32_at(&b, 13)), (0, 0));
    }
}
