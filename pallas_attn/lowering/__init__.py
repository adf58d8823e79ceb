"""Kernels without a GPU: lowered on any machine, and what machine code they become."""
