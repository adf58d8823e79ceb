"""Attention and its gradients in float64 NumPy, from the paper alone.

Nothing in this folder comes from the library, and none of it is differentiated by
machine: a fault would have to be made twice to stay unseen.
"""
