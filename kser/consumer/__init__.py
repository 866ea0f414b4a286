"""The consumer code shared by all transports."""
