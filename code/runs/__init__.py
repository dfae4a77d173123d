"""A run on disk: its folder, log and checkpoints, how it stops and resumes, and comparisons of runs."""
