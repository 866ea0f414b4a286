"""What every consumer shares, whatever its transport."""
