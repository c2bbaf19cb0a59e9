//! Little-endian fields at fixed offsets: PostgreSQL writes its structs in the order of the machine, and every machine
//! that drctl supports is little-endian.

fn chunk<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

pub(super) fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    chunk(bytes, offset).map(u16::from_le_bytes)
}

pub(super) fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    chunk(bytes, offset).map(u32::from_le_bytes)
}

pub(super) fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    chunk(bytes, offset).map(u64::from_le_bytes)
}

pub(super) fn i64_at(bytes: &[u8], offset: usize) -> Option<i64> {
    chunk(bytes, offset).map(i64::from_le_bytes)
}
