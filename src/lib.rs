//! drctl keeps PostgreSQL recoverable, and proves it.
//!
//! # The house
//! Arrows point down only; `tests/architecture.rs` fails on any other, and on any cycle between modules.
//!
//! | floor | rooms | what they are |
//! |---|---|---|
//! | 4 doors | [`cli`], [`daemon`], [`app`], [`config`] | arguments and text; what runs by itself; the composition root; settings |
//! | 3 stories | [`jobs`] | one folder per job; a story sees no bucket and no key |
//! | 2 vault | [`repository`] | what is stored, where, and how it is read back; the restore engine |
//! | 1b rooms | [`source`], [`store`], [`keys`], [`notify`] | what is protected; one copy of the repository; who can open it; who is told |
//! | 1a tools | [`pg`], [`codec`], [`disk`], [`observe`] | PostgreSQL's words; seals and signatures; durable files; time and progress |
//! | 0 words | [`model`] | ids, positions, errors, the words of COMMIT, schedules and their slots |
//!
//! # The path of a page
//! [`source::postgres`] reads it beside a server in backup mode → [`jobs::backup`] hands batches to
//! [`repository::backup::writer`] → [`repository::backup::packer`] fingerprints, leaves out what the parent holds
//! ([`repository::backup::parent`]), compresses and seals frames into packs →
//! [`repository::regions::fan_out`] puts each pack into every region and waits for the write quorum → manifest, inventory and, last,
//! COMMIT. Back: [`repository::catalog`] finds COMMIT → [`jobs::restore`] plans → [`repository::restore`] fetches frames in
//! pack order, authenticates, writes → WAL is staged, `pg_control` is put in place last.
//!
//! # The path of a dump, or of files
//! [`source::dump`] runs `pg_dump`, [`source::files`] packs a tar archive → [`jobs::backup::streams`] hands the bytes to
//! [`repository::backup::stream`], which cuts them into files of pages; from there on they are pages like any other. Back:
//! [`repository::restore::streams`] gives the bytes in order, each frame authenticated → [`jobs::restore_streams`] → the
//! archive is unpacked, or `pg_restore` fed.
//!
//! # The path of a WAL record
//! [`pg::replication`] receives → [`pg::wal`] walks records → [`jobs::wal`] collects a frame of at most a second →
//! [`repository::wal::log`] seals and fans it out → PostgreSQL is told "flushed". On the way [`jobs::wal::changes`] notes which
//! pages it changes, and the next backup leaves the others unread.
#![forbid(unsafe_code)]

pub mod model;

pub mod codec;
pub mod disk;
pub mod observe;
pub mod pg;

pub mod keys;
pub mod notify;
pub mod source;
pub mod store;

pub mod repository;

pub mod jobs;

pub mod app;
pub mod cli;
pub mod config;
pub mod daemon;
