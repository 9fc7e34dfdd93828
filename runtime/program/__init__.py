"""The program of one role: its data structure, its files, and the checks it must pass."""
