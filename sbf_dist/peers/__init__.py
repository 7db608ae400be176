"""Other ways to a cheaper network, each as strong as we can make it: what SBF is measured by."""
