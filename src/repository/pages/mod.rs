//! What says where a page is: maps, packs, manifests.

pub mod manifest;
pub mod map;
pub mod pack;
pub mod relocation;
