"""Tasks, operations and the registry that routes messages to them."""
