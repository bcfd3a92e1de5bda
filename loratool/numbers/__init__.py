"""Tensors in, tensors out: decompositions, ranks, rounding, devices and threads. Nothing here knows an adapter."""
