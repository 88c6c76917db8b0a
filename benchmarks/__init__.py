"""Speed of fusednorm beside its peers and beside a copy of the same bytes: `python -m benchmarks.run FOLDER`."""
