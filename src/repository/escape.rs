//! What every region carries so that it can be restored without drctl: instructions, the format, two programs.

/// Names below `escape/1/`, and contents. Object names have no capitals, hence `readme.md`.
pub const FILES: [(&str, &[u8]); 4] = [
    ("readme.md", include_bytes!("../../docs/escape/README.md")),
    ("format.md", include_bytes!("../../docs/format.md")),
    ("drctl_open.py", include_bytes!("../../docs/escape/drctl_open.py")),
    ("floe.py", include_bytes!("../../docs/escape/floe.py")),
];
