"""Whether this machine computes what the formulas say: values, gradients, repeats."""
