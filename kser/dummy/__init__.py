"""An in-memory transport for users' own tests: real encoding and decoding, no broker."""
