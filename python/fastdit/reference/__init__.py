"""The formulas in plain PyTorch: the numeric definition of every op, a backend, and the fp64 oracle of the tests."""
