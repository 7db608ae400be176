"""SBF beside other methods, at equal cost and with equal training."""
