"""What tests, benchmarks and the command line share: tolerances, poisoned memory, workloads, contracts, timing."""
