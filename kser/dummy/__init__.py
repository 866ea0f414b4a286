"""In-memory transport for users' tests, with real encoding and decoding."""
