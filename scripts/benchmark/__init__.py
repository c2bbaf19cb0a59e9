"""The rooms of scripts/bench: a cluster, S3 servers behind TLS, the contestants, and the works that they are measured at."""
