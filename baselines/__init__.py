"""The methods that the systems were compared to: one file each, found by name."""
