"""Campaigns: crashes, bad input, endurance. Long forms of what the tests do in short."""
