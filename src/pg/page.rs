//! Data pages: checksum and LSN.

use super::le::{u16_at, u32_at};
use crate::model::Lsn;

/// Bytes per page.
pub const PAGE_SIZE: usize = 8192;

const LANES: usize = 32;
const ROW: usize = LANES * 4;
const FNV_PRIME: u32 = 16_777_619;
/// `pd_checksum` lies in the third word of a page, in its lower half.
const CHECKSUM_LANE: usize = 2;
const UPPER_OFFSET: usize = 14;

/// PostgreSQL's `checksumBaseOffsets`.
const OFFSETS: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// What a page's checksum says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// All zeros: allocated and never written. It has no checksum.
    New,
    /// The checksum is right.
    Ok,
    /// The checksum is wrong, or the page has no contents (`pd_upper` = 0) and is not all zeros. PostgreSQL refuses to
    /// read both.
    Bad,
}

/// The checksum of a page at `block`, counted from the start of the relation and not of its file.
pub fn checksum(page: &[u8; PAGE_SIZE], block: u32) -> u16 {
    let mut sums = OFFSETS;
    let (rows, _) = page.as_chunks::<ROW>();
    for (index, row) in rows.iter().enumerate() {
        let mut words = words(row);
        if index == 0 {
            // The stored checksum does not take part.
            words[CHECKSUM_LANE] &= 0xFFFF_0000;
        }
        mix(&mut sums, &words);
    }
    mix(&mut sums, &[0; LANES]);
    mix(&mut sums, &[0; LANES]);
    let folded = sums.iter().fold(block, |folded, sum| folded ^ sum);
    // At most 65535: zero means that there is no checksum.
    u16::try_from(folded % 65_535 + 1).unwrap_or(u16::MAX)
}

#[inline(always)]
fn words(row: &[u8; ROW]) -> [u32; LANES] {
    let (fields, _) = row.as_chunks::<4>();
    let mut words = [0; LANES];
    for (word, field) in words.iter_mut().zip(fields) {
        *word = u32::from_le_bytes(*field);
    }
    words
}

/// One FNV-1a round in each lane: no lane depends on another, which lets the compiler use vector registers.
#[inline(always)]
fn mix(sums: &mut [u32; LANES], words: &[u32; LANES]) {
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ word;
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

/// Checks the page at `block`, counted from the start of the relation and not of its file.
pub fn check(page: &[u8; PAGE_SIZE], block: u32) -> PageState {
    if u16_at(page, UPPER_OFFSET) == Some(0) {
        return if page.iter().all(|byte| *byte == 0) { PageState::New } else { PageState::Bad };
    }
    if u16_at(page, 8) == Some(checksum(page, block)) { PageState::Ok } else { PageState::Bad }
}

/// The end of the last record that changed the page, by its own account. Hint bits and the visibility map change pages
/// without it.
pub fn lsn(page: &[u8; PAGE_SIZE]) -> Lsn {
    // Two words, the upper one first: this field is no 64-bit integer.
    let word = |offset| u64::from(u32_at(page, offset).unwrap_or_default());
    Lsn(word(0) << 32 | word(4))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;
    use crate::pg::testing::{Cluster, block_on, files_below, installed};

    fn page() -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        for (index, byte) in page.iter_mut().enumerate() {
            *byte = u8::try_from((index * 31 + index / 256) % 251).unwrap();
        }
        let sum = checksum(&page, 7);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    /// Sixteen bits cannot tell 65,536 pages from the right one: about one of them has its checksum.
    #[test]
    fn flipped_bits_are_bad_as_far_as_sixteen_bits_can_tell() {
        let mut page = page();
        assert_eq!(check(&page, 7), PageState::Ok);
        assert_eq!(check(&page, 8), PageState::Bad);
        let mut missed = 0;
        for bit in 0..PAGE_SIZE * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            missed += u32::from(check(&page, 7) != PageState::Bad);
            page[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(missed <= 4, "{missed}");
    }

    /// Relations are split into files of 1 GiB; no file of a fresh cluster is the second of its relation.
    #[test]
    fn pages_of_real_clusters_are_right() {
        block_on(async {
            for binaries in installed().await {
                let cluster = Cluster::create(&binaries, &["--data-checksums"]).await;
                let (mut pages, mut bad) = (0, 0);
                for path in relation_files(&cluster.data()) {
                    let bytes = std::fs::read(&path).unwrap();
                    for (block, page) in bytes.as_chunks::<PAGE_SIZE>().0.iter().enumerate() {
                        let block = u32::try_from(block).unwrap();
                        assert_ne!(check(page, block), PageState::Bad, "{} {block}", path.display());
                        bad += u32::from(check(page, block + 1) == PageState::Bad);
                        pages += 1;
                    }
                }
                assert!(pages > 1000 && bad > pages / 10 * 9, "{pages} pages, {bad} wrong as other blocks");
            }
        });
    }

    fn relation_files(data: &Path) -> Vec<PathBuf> {
        let files = files_below(data).into_iter().filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            let is_relation = name.split('_').next().unwrap().bytes().all(|byte| byte.is_ascii_digit());
            is_relation && (path.starts_with("base") || path.starts_with("global"))
        });
        files.map(|path| data.join(path)).collect()
    }

    #[test]
    fn a_new_page_is_all_zeros() {
        let mut page = [0; PAGE_SIZE];
        assert_eq!(check(&page, 3), PageState::New);
        page[8191] = 1;
        assert_eq!(check(&page, 3), PageState::Bad);
    }

    #[test]
    fn the_lsn_has_its_upper_half_first() {
        let mut page = [0; PAGE_SIZE];
        page[0] = 0x16;
        page[4..8].copy_from_slice(&0xB374_D848_u32.to_le_bytes());
        assert_eq!(lsn(&page).to_string(), "16/B374D848");
    }
}
