"""What happens to devices in virtual time."""
