"""The proof that kser equals the published package, but for the decided differences. See ``README.rst`` beside this."""
