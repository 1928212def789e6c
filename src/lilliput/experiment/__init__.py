"""A run: its loop over rounds, when it stops, what it evaluates and how it resumes."""
