"""What is measured against which peer; `python -m benchmarks [name ...]` runs them and stores the results."""
