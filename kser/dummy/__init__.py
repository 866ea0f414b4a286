"""In-memory transport for tests of user code, with real encoding and decoding."""
