//! Contracts with the servers and stores that drctl talks to, checked against real ones.

mod pg_wire;
