//! The `drctl` command.

fn main() {}
