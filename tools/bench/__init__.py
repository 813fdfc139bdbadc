"""Compare our server with others, run by run on the same machine: `python -m tools.bench --help`."""
