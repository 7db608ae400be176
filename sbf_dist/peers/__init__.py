"""Other ways to a network of the same cost, as strong as we can make them: what SBF is measured by."""
