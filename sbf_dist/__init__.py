"""SBF-Dist: CNNs whose pruned channels are rebuilt from the kept ones, distilled from teachers."""
