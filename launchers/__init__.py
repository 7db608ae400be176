"""The command line, and what it starts: runs, comparisons and single compressions."""
